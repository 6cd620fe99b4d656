"""What a trace adds to a page: the grid, the choices of every exit, reliability and the curve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from offramp.report import others, words
from offramp.report.charts import draw_curve, draw_depths, draw_reliability
from offramp.report.grid import draw_grid
from offramp.report.parts import Picture, Section, Text
from offramp.report.runs import Curve, ExitRow, TraceRun
from offramp.report.tokens import Seen, agreeing, quoted, traced


def grid(name: str, seen: Seen, depths: Sequence[int]) -> Picture | None:
    """Return the grid of one text, where exits were looked at."""
    text = seen.text
    if not text.token_ids or not seen.run.exits or "max_prob" not in text.scores:
        return None
    drawn = draw_grid(
        text.pieces,
        seen.run.exits,
        seen.run.num_layers,
        text.scores["max_prob"],
        text.chosen,
        depths,
    )
    return Picture(name, "Layer by token", words.GRID, drawn)


def columns(seen: Seen) -> dict[str, Any]:
    """Return what the page's script tells of each token: choices, and confidence in per cent."""
    sure = seen.text.scores.get("max_prob", ())
    return {"chosen": seen.text.chosen, "sure": [[round(100 * v) for v in row] for row in sure]}


def data_of(texts: Sequence[Text], trace: TraceRun | None) -> dict[str, Any]:
    """Return what the page's script knows of a section's texts."""
    if trace is None:
        return {}
    last = f"{trace.num_layers}, all" if trace.num_layers in trace.exits else trace.num_layers
    used = {token for text in texts for row in text.data.get("chosen", ()) for token in row}
    return {
        "depths": [*trace.exits, last],  # a short head may leave behind the last layer
        "vocabulary": {t: quoted(trace.vocabulary.get(t, f"token {t}")) for t in used},
        "texts": [text.data for text in texts],
    }


def trace_pictures(stem: str, trace: TraceRun) -> list[Picture]:
    """Return the curve and the reliability of a trace's exits, the plan's where it has some."""
    wanted = [int(depth) for depth in trace.plan.get("run", {}).get("thresholds", {})]
    return [curve_picture(f"{stem}-curve", trace.curve), *reliability(stem, trace.rows, wanted)]


def reliability(stem: str, rows: Sequence[ExitRow], wanted: Sequence[int] = ()) -> list[Picture]:
    """Return the picture of confidence against agreement, if anything is known of it."""
    if not any(b.tokens for row in rows for b in row.reliability):
        return []
    drawn = draw_reliability(rows, wanted)
    return [Picture(f"{stem}-reliability", "Is confidence honest?", words.RELIABILITY, drawn)]


def curve_picture(name: str, curve: Curve, title: str = "Quality against cost") -> Picture:
    """Return the picture of quality against cost."""
    return Picture(name, title, others.curve_caption(curve), draw_curve(curve))


def trace_section(number: int, name: str, run: TraceRun) -> Section:
    """Return the section of a trace that belongs to no run."""
    stem = f"trace{number}"
    seen = [Seen(run, text) for text in run.texts]
    depths = [list(one.text.depths or agreeing(one)) for one in seen]
    counts = Counter(depth for text in depths for depth in text)
    replayed = run.texts[0].depths is not None
    texts = [
        Text(
            prompt=words.prompt(one.text.prompt),
            tokens=traced(one),
            grid=grid(f"{stem}-grid{i}", one, at),
            data=columns(one),
        )
        for i, (one, at) in enumerate(zip(seen, depths, strict=True), 1)
    ]
    drawn = draw_depths(counts, run.num_layers)
    title = "Where tokens would leave" if replayed else "Where tokens could leave at the earliest"
    return Section(
        title=name,
        about=others.about_trace(run),
        headline=others.trace_headline(run, counts, replayed=replayed),
        figures=others.trace_figures(run, counts, replayed=replayed),
        pictures=[
            Picture(f"{stem}-depths", title, words.DEPTHS, drawn),
            *trace_pictures(stem, run),
        ],
        texts=texts,
        legend=words.legend(run.num_layers),
        data=data_of(texts, run),
    )
