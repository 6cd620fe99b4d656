"""What a report says of traces, benches, tunings and curves: headlines, figures, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from offramp.report.parts import Figure
from offramp.report.runs import BenchRun, Curve, EvaluateRun, Timed, TraceRun, TuneRun
from offramp.report.words import depth_figures, describe, mean_depth
from offramp.shown import visible


def curve_caption(curve: Curve) -> str:
    """Return how to read a curve; whether anything is dearer than full depth."""
    dearer = sum(point.cost > curve.full.cost for point in curve.points)
    bars = any(point.low is not None for point in curve.points)
    said = "Up is better, left is cheaper. The square is full depth."
    said += " Bars are 95% intervals." if bars else " Intervals are not known here."
    if dearer:
        said += f" {dearer} of {len(curve.points)} are dearer than full depth (white)."
    return said


def curve_headline(curve: Curve) -> str:
    """Return a curve in one sentence."""
    return f"{visible(curve.quality).capitalize()}, against {visible(curve.cost)}."


def about_trace(run: TraceRun) -> str:
    """Return what was traced."""
    where = run.machine.get("processor", "unknown machine")
    return visible(f"trace of {run.model} · {run.tokens:,} tokens · {describe(run.plan)} · {where}")


def trace_headline(run: TraceRun, counts: Counter[int], *, replayed: bool) -> str:
    """Return a trace in one sentence."""
    total = counts.total() or 1
    early = sum(count for depth, count in counts.items() if depth < run.num_layers) / total
    deep = f"{mean_depth(counts):.1f} of {run.num_layers}"
    if replayed:
        return (
            f"The plan would let {early:.0%} of tokens leave early; a token would run {deep} "
            "layers on average."
        )
    return (
        "No plan was replayed. Colours show the first depth from which on every exit says what "
        f"the last layer says: {deep} layers on average, the most that leaving early could save."
    )


def trace_figures(run: TraceRun, counts: Counter[int], *, replayed: bool) -> list[Figure]:
    """Return the headline figures of a trace."""
    found = [Figure("tokens", f"{run.tokens:,}", f"{len(run.texts)} texts shown")]
    depths = depth_figures(run.num_layers, counts)
    if not replayed:
        depths[0] = Figure("could leave early", depths[0].value, depths[0].about)
    return [*found, *depths]


def about_bench(run: BenchRun) -> str:
    """Return what was timed, and where."""
    where = run.machine.get("processor", "unknown machine")
    return visible(f"bench of {run.model} · {run.rounds} rounds in turns · {where}")


def bench_headline(run: BenchRun) -> str:
    """Return a bench in one sentence."""
    known = [row for row in run.rows if row.ratio_to_full is not None]
    slow = sum(row.ratio_to_full < 0.995 for row in known if row.ratio_to_full is not None)
    best = max(known, key=lambda row: row.ratio_to_full or 0, default=None)
    if best is None:
        return "Nothing was timed against full depth."
    return (
        f"Fastest: {visible(best.name)}, {best.ratio_to_full:.2f} times full depth. "
        f"{slow} of {len(known)} are slower than full depth."
    )


def slower(rows: Sequence[Timed]) -> list[str]:
    """Return the slow-downs of a bench in words."""
    named = [
        f"{visible(row.name)} ({row.ratio_to_full:.2f} of its speed at batch {row.batch}, "
        f"context {row.context})"
        for row in rows
    ]
    return [f"Slower than full depth: {'; '.join(named)}."] if named else []


def about_comparison(run: EvaluateRun) -> str:
    """Return what was compared, and where."""
    where = run.machine.get("processor", "unknown machine")
    return visible(f"evaluate · {run.model} · {describe(run.plan)} · {where}")


def comparison_headline(run: EvaluateRun) -> str:
    """Return a comparison with full depth in one sentence."""
    said = [
        f"{visible(one.task)} {point.quality:.3g} at {point.cost:.2f} of the operations, where "
        f"full depth has {one.curve.full.quality:.3g} ({one.items} items)"
        for one in run.tasks
        for point in one.curve.points
    ]
    return f"{'; '.join(said)}."


def tune_headline(run: TuneRun) -> str:
    """Return what tuning did to the exits, in one sentence."""
    for text, rows in run.after.items():
        before = {row.depth: row.agreement for row in run.before.get(text, ())}
        known = [row for row in rows[:-1] if row.agreement is not None]
        said = [
            f"{row.depth}: {before.get(row.depth) or 0:.0%} → {row.agreement or 0:.0%}"
            for row in known
        ]
        return f"Agreement with the last layer by depth, on {visible(text)}: {', '.join(said)}."
    return "Nothing was judged."
