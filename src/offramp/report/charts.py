"""The charts of a report, each one SVG: quality against cost, depths, reliability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from offramp.report.runs import Curve, ExitRow, Point
from offramp.report.svg import (
    INK,
    LINE,
    PAPER,
    SOFT,
    STEPS,
    Scale,
    document,
    rule,
    scale,
    step_of,
    tag,
    ticks,
    words,
)
from offramp.shown import visible

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_WIDE = 560
_PANELS = 6
"""Most exits whose reliability is drawn."""


def draw_curve(curve: Curve) -> Markup:
    """Draw quality against cost, with intervals, and full depth as the reference."""
    left, top, right, bottom = 46, 26, _WIDE - 14, 300
    everything = [*curve.points, curve.full]
    heights = [h for p in everything for h in (p.quality, p.low, p.high) if h is not None]
    pad = (max(heights) - min(heights) or 1) * 0.06
    low, high = min(heights) - pad, max(heights) + pad
    most = max(1.08, *(p.cost * 1.05 for p in everything))
    x, y = scale(0, most, left, right), scale(low, high, bottom, top)
    dearer = tag(
        "rect",
        x=x(1),
        y=top,
        width=right - x(1),
        height=bottom - top,
        class_="dearer",
        fill=LINE,
        fill_opacity=0.35,
    )
    parts = [dearer, *_axes(x, y, (0, most), (low, high), (left, top, right, bottom))]
    full_y = y(curve.full.quality)
    parts += [
        rule(x(1), top, x(1), bottom, kind="ink", stroke_dasharray="5 4"),
        rule(left, full_y, right, full_y, kind="ink", stroke_dasharray="5 4"),
    ]
    if most > 1.2:
        parts.append(words(right - 5, bottom - 8, "dearer", kind="soft", text_anchor="end"))
    parts += [_mark(point, x, y, curve.full.cost) for point in curve.points]
    parts.append(_mark(curve.full, x, y, curve.full.cost, full=True))
    names, taken = _labels([*curve.points, curve.full], x, y, (left, right))
    parts += names
    if not any(_meet((x(1) - 125, bottom - 20, x(1) - 5, bottom - 6), box) for box in taken):
        said = "cost of full depth"
        parts.append(words(x(1) - 5, bottom - 8, said, kind="soft", text_anchor="end"))
    parts += [
        words((left + right) / 2, bottom + 40, visible(curve.cost), text_anchor="middle"),
        words(left, 14, visible(curve.quality)),
    ]
    said = f"{len(curve.points)} points; full depth at {curve.full.quality:.3g}"
    return document(
        _WIDE, bottom + 52, parts, visible(f"{curve.quality} against {curve.cost}: {said}")
    )


def _axes(
    x: Scale,
    y: Scale,
    across: tuple[float, float],
    up: tuple[float, float],
    box: tuple[float, float, float, float],
) -> list[Markup]:
    left, _, right, bottom = box
    parts = []
    for value in ticks(*up):
        parts.append(rule(left, y(value), right, y(value)))
        parts.append(words(left - 8, y(value) + 4, f"{value:g}", kind="soft", text_anchor="end"))
    for value in ticks(*across):
        parts.append(rule(x(value), bottom, x(value), bottom + 5))
        parts.append(words(x(value), bottom + 19, f"{value:g}", kind="soft", text_anchor="middle"))
    return [*parts, rule(left, bottom, right, bottom, kind="soft")]


def _mark(point: Point, x: Scale, y: Scale, reference: float, *, full: bool = False) -> Markup:
    """Draw a point with its interval; hollow where it costs more than full depth."""
    px, py = x(point.cost), y(point.quality)
    parts = []
    if point.low is not None and point.high is not None:
        parts = [
            rule(px, y(point.low), px, y(point.high), kind="ink", stroke_width=1.5),
            *(rule(px - 4, y(v), px + 4, y(v), kind="ink") for v in (point.low, point.high)),
        ]
    if full:
        parts.append(tag("rect", x=px - 6, y=py - 6, width=12, height=12, class_="f-ink", fill=INK))
    else:
        filled = PAPER if point.cost > reference else STEPS[0]
        parts.append(tag("circle", cx=px, cy=py, r=5, class_="point", fill=filled, stroke=INK))
    interval = (
        "" if point.low is None or point.high is None
        else f" (95% interval {point.low:.3g} to {point.high:.3g})"
    )  # fmt: skip
    slower = ", dearer than full depth" if point.cost > reference else ""
    said = f"{point.name}: cost {point.cost:.3g}{slower}, quality {point.quality:.3g}{interval}"
    return tag("g", tag("title", visible(f"{said} {point.note}".strip())), *parts)


def _labels(
    points: Sequence[Point], x: Scale, y: Scale, across: tuple[float, float]
) -> tuple[list[Markup], list[Box]]:
    """Name the points, the last first, where no other name, mark or interval is; or not at all.

    Return the names, and where anything is then.
    """
    taken = [_reach(point, x, y) for point in points]
    parts = []
    for point in reversed(points):
        said = visible(point.name if not point.note else f"{point.name}: {point.note}")[:60]
        place = next(
            (
                box
                for box in _places(x(point.cost), y(point.quality), 6.6 * len(said), across)
                if not any(_meet(box, other) for other in taken)
            ),
            None,
        )
        if place is not None:
            taken.append(place)
            parts.append(words(place[0], place[3] - 1, said, text_anchor="start"))
    return parts, taken


def _reach(point: Point, x: Scale, y: Scale) -> Box:
    """Return where a point's mark and its interval are."""
    at, ends = x(point.cost), [y(point.quality)]
    ends += [y(end) for end in (point.low, point.high) if end is not None]
    return at - 6, min(ends) - 5, at + 6, max(ends) + 5


def _places(px: float, py: float, wide: float, across: tuple[float, float]) -> Iterator[Box]:
    """Yield where a name may stand: behind its point, before and below it, before and above it."""
    left, right = across
    if px + 10 + wide <= right:
        yield px + 10, py - 7, px + 10 + wide, py + 5
    for row in (py + 17, py - 7) if px - 10 - wide >= left else ():
        yield px - 10 - wide, row - 12, px - 10, row


def _meet(box: Box, other: Box) -> bool:
    across = box[0] < other[2] and other[0] < box[2]
    return across and box[1] < other[3] and other[1] < box[3]


def draw_depths(counts: Mapping[int, int], num_layers: int) -> Markup:
    """Draw how many tokens were chosen at each depth."""
    left, top, right, bottom = 46, 26, _WIDE - 14, 220
    total, most = sum(counts.values()) or 1, max(counts.values(), default=1)
    x = scale(0.5, num_layers + 0.5, left, right)
    y = scale(0, most, bottom, top)
    wide = min((x(2) - x(1)) * 0.8, 60)
    parts = [rule(left, bottom, right, bottom, kind="soft")]
    for depth, count in sorted(counts.items()):
        step = step_of(depth, num_layers)
        bar = tag(
            "rect",
            tag("title", f"depth {depth} of {num_layers}: {count} tokens, {count / total:.1%}"),
            x=x(depth) - wide / 2,
            y=y(count),
            width=wide,
            height=bottom - y(count),
            class_="full" if step is None else None,
            fill=PAPER if step is None else STEPS[step],
            stroke=SOFT,
        )
        parts.append(bar)
        if count / most > 0.02 or len(counts) < 12:
            share = f"{count / total:.0%}" if count / total >= 0.01 else "<1%"
            parts.append(words(x(depth), y(count) - 5, share, text_anchor="middle", font_size=11))
    every = max(1, round(num_layers / 15))
    parts += [
        words(x(depth), bottom + 17, depth, kind="soft", text_anchor="middle")
        for depth in range(1, num_layers + 1)
        if depth % every == 0 or depth == num_layers
    ]
    parts.append(words((left + right) / 2, bottom + 36, "layers run", text_anchor="middle"))
    parts.append(words(left, 14, "share of tokens"))
    early = sum(count for depth, count in counts.items() if depth < num_layers) / total
    return document(_WIDE, bottom + 46, parts, f"{early:.0%} of tokens left before the last layer")


def draw_reliability(rows: Sequence[ExitRow], wanted: Sequence[int] = ()) -> Markup:
    """Draw confidence against agreement, a panel per exit; the exits wanted, or a few of all."""
    known = [row for row in rows if any(b.tokens for b in row.reliability)]
    chosen = [row for row in known if row.depth in wanted] or known
    stride = -(-len(chosen) // _PANELS)
    shown = chosen[::-1][::stride][::-1]  # counted from the deepest
    side, gap, left, top = 130, 56, 34, 48
    per_row = 3
    parts: list[Markup] = []
    for place, row in enumerate(shown):
        at = (left + place % per_row * (side + gap), top + place // per_row * (side + 88))
        parts += _panel(row, at, side)
    lines = -(-len(shown) // per_row)
    label = "confidence against agreement with the last layer, per exit"
    return document(_WIDE, lines * (side + 88) + 14, parts, label)


def _panel(row: ExitRow, at: tuple[float, float], side: float) -> list[Markup]:
    """Draw one exit: the nearer to the diagonal, the more its confidence is worth."""
    left, top = at
    x, y = scale(0, 1, left, left + side), scale(0, 1, top + side, top)
    bins = [b for b in row.reliability if b.tokens]
    total = sum(b.tokens for b in bins)
    gap = sum(b.tokens * (b.confidence - b.agreement) for b in bins) / total
    lean = "over-confident" if gap > 0 else "under-confident"
    worth = "honest" if abs(gap) < 0.02 else f"{lean} by {abs(gap):.0%}"
    dots = [
        tag(
            "circle",
            tag("title", f"confidence {b.confidence:.2f}: right {b.agreement:.0%} of {b.tokens}"),
            cx=x(b.confidence),
            cy=y(b.agreement),
            r=2.5 + 7 * (b.tokens / total) ** 0.5,
            class_="point",
            fill=STEPS[0],
            stroke=INK,
        )
        for b in bins
    ]
    numbers = [
        words(x(v), top + side + 15, f"{v:g}", kind="soft", text_anchor="middle", font_size=10)
        for v in (0, 0.5, 1)
    ] + [
        words(left - 5, y(v) + 3, f"{v:g}", kind="soft", text_anchor="end", font_size=10)
        for v in (0, 0.5, 1)
    ]
    line = " ".join(f"{x(b.confidence):.1f},{y(b.agreement):.1f}" for b in bins)
    return [
        words(left, top - 23, f"exit {row.depth}", font_weight=600),
        words(left, top - 8, worth),
        tag(
            "rect", x=left, y=top, width=side, height=side, class_="frame", fill="none", stroke=LINE
        ),
        rule(x(0), y(0), x(1), y(1), kind="soft", stroke_dasharray="4 4"),
        tag("polyline", points=line, fill="none", class_="s-ink", stroke=INK, stroke_width=1.5),
        *dots,
        *numbers,
        words(left + side / 2, top + side + 32, "confidence", kind="soft", text_anchor="middle"),
        words(left + 6, top + 15, "right", kind="soft"),
    ]
