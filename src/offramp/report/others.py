"""What a report says of traces, benches, tunings and curves: headlines, figures, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from offramp.report.parts import Figure, Table
from offramp.report.runs import (
    BenchRun,
    Curve,
    Estimate,
    EvaluateRun,
    JudgedTask,
    Timed,
    TraceRun,
    TuneRun,
)
from offramp.report.words import SLOWER, depth_figures, describe, mean_depth
from offramp.shown import visible


def curve_caption(curve: Curve) -> str:
    """Return how to read a curve; whether anything is dearer than full depth."""
    dearer = sum(point.cost > curve.full.cost for point in curve.points)
    bars = any(point.low is not None for point in curve.points)
    said = "Up is better, left is cheaper. The square is full depth."
    said += " Bars are 95% intervals." if bars else " Intervals are not known here."
    if dearer:
        said += f" {dearer} of {len(curve.points)} are dearer than full depth (hollow)."
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
    times = _range(one.time_per_token_ratio.mean for one in run.tasks)
    work = _range(one.flops_ratio for one in run.tasks)
    return f"A token takes {times} of full depth's time, at {work} of its operations."


def _range(values: Iterable[float]) -> str:
    """Return the least and the largest, once where they look alike."""
    found = [f"{value:.2f}" for value in sorted(values)]
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def comparison_figures(run: EvaluateRun) -> list[Figure]:
    """Return the time of a token of each task."""
    return [
        Figure(
            f"time / full depth, {visible(one.task)}",
            f"{one.time_per_token_ratio.mean:.2f}x",
            f"per token; {one.items} items, batch by batch in turns",
            bad=one.time_per_token_ratio.mean > SLOWER,
        )
        for one in run.tasks
    ]


def slower_tasks(run: EvaluateRun) -> list[str]:
    """Return where a comparison's plan is slower than full depth, in words."""
    named = []
    for one in run.tasks:
        if one.time_per_token_ratio.mean > SLOWER:
            ratio = one.time_per_token_ratio.mean
            named.append(f"{visible(one.task)} (a token took {ratio:.2f} times as long)")
        elif one.time_ratio.mean > SLOWER:
            ratio = one.time_ratio.mean
            named.append(f"{visible(one.task)} (longer answers took {ratio:.2f} times as long)")
    return [f"Slower than full depth: {'; '.join(named)}."] if named else []


def costs_table(run: EvaluateRun) -> Table:
    """Return what the plan cost on each task."""
    ratios = [(one.flops_ratio, one.time_per_token_ratio, one.time_ratio) for one in run.tasks]
    rows = [
        (
            visible(one.task),
            f"{one.items}" + (f", {one.left_out} too long" if one.left_out else ""),
            f"{one.mean_depth:.1f} of {run.num_layers}",
            f"{one.flops_ratio:.2f}",
            f"{one.tokens.get('plan', 0):,} / {one.tokens.get('full', 0):,}",
            _told(one.time_per_token_ratio),
            _told(one.time_ratio),
        )
        for one in run.tasks
    ]
    dear = {
        (row, column)
        for row, (work, token, whole) in enumerate(ratios)
        for column, ratio in ((3, work), (5, token.mean), (6, whole.mean))
        if ratio > SLOWER
    }
    return Table(
        "What it cost, full depth = 1; times are medians with quartiles over batches",
        ("task", "items", "mean depth", "operations", "tokens, plan / full", "time of a token",
         "time of an answer"),
        rows,
        dear,
    )  # fmt: skip


def scores_table(one: JudgedTask) -> Table:
    """Return the scores of a task with their intervals, beside full depth's."""
    rows = [
        (
            f"{visible(row.score.replace('_', ' '))}\nagainst {visible(row.against)}",
            _told(row.plan, between="\n"),
            _told(row.full, between="\n"),
            _told(row.difference, "+", between="\n"),
            visible(row.verdict),
        )
        for row in one.scores
    ]
    harm = {(i, 4) for i, row in enumerate(one.scores) if row.verdict == "worse"}
    head = ("score", "this plan", "full depth", "difference", "verdict")
    return Table("Scores with 95% intervals over items", head, rows, harm)


def _told(value: Estimate, sign: str = "", *, between: str = " ") -> str:
    """Return a value with its interval, unless that has no width."""
    mean = f"{value.mean:{sign}.2f}"
    if value.low == value.high:
        return mean
    return f"{mean}{between}({value.low:{sign}.2f} to {value.high:{sign}.2f})"


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
