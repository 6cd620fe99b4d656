"""The bars of a bench: decoding speeds with quartiles, those slower than full depth left white."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from offramp.report.runs import Timed
from offramp.report.svg import INK, PAPER, STEPS, Scale, document, rule, scale, tag, words
from offramp.shown import visible

_WIDE = 760


def draw_speeds(rows: Sequence[Timed]) -> Markup:
    """Draw decoding speeds with their quartiles, and say of each whether full depth is faster."""
    left, right, y, parts = 240, _WIDE - 20, 0, list[Markup]()
    for (batch, context), group in groupby(rows, key=lambda row: (row.batch, row.context)):
        these = [row for row in group if row.decode_tokens_per_second is not None]
        most = max((max(_speeds(row)) for row in these), default=1.0)
        x = scale(0, most * 1.02, left, right - 190)
        y += 26
        title = f"batch {batch}, {context} tokens of context: new tokens per second"
        parts.append(words(10, y, title, font_weight=600))
        y += 12
        for row in these:
            parts += _bar(row, x, left, y)
            y += 27
    return document(_WIDE, y + 12, parts, "decoding speeds")


def _speeds(row: Timed) -> tuple[float, ...]:
    return (row.decode_tokens_per_second or 0.0, *(row.decode_quartiles or ()))


def _bar(row: Timed, x: Scale, left: float, y: float) -> list[Markup]:
    speed, ratio = row.decode_tokens_per_second or 0.0, row.ratio_to_full
    slower = ratio is not None and ratio < 0.995
    fill = PAPER if slower else STEPS[0]
    name = visible(row.name) if len(row.name) < 36 else visible(row.name)[:34] + "…"
    end = max(x(v) for v in _speeds(row))
    parts = [
        words(left - 8, y + 15, name, text_anchor="end"),
        tag("rect", x=left, y=y + 3, width=x(speed) - left, height=16, class_="point", fill=fill,
            stroke=INK),
    ]  # fmt: skip
    if row.decode_quartiles:
        low, high = (x(v) for v in row.decode_quartiles)
        parts.append(rule(low, y + 11, high, y + 11, kind="ink", stroke_width=2.5))
    said = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
    if ratio is not None and (slower or ratio > 1.005):
        said += f" · {ratio:.2f} of full depth" + (", slower" if slower else "")
    kind = "alert" if slower else "ink"
    return [*parts, words(end + 8, y + 15, said, kind=kind)]
