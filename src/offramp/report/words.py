"""What a report says of runs: headlines, figures, captions, slow-downs and what is missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.report.parts import Figure
from offramp.report.runs import BenchRun, Curve, Generated, Timed, TraceRun, TuneRun
from offramp.report.svg import step_of
from offramp.shown import visible

DEPTHS = "How many tokens were chosen after so many layers; white bars ran all of them."
GRID = (
    "Each column is a token, each row an exit, the last layer on top. Colour is confidence, dark to "
    "bright; a white dot says something else than the last layer. The line is the exit taken, and "
    "what is veiled above it did not run to choose the token."
)
RELIABILITY = (
    "On the dotted line, a confidence of 0.8 is right 8 times in 10. Below it an exit is surer than "
    "it should be. Larger dots are more tokens; right is what the last layer says."
)
SPEEDS = (
    "New tokens per second, medians with quartiles. White bars are slower than the same model at "
    "full depth."
)


@dataclass(frozen=True)
class Cost:
    """Time of a token against full depth, and where it is known from."""

    ratio: float | None
    source: str
    flops: float | None = None
    weights: float | None = None


def shown(text: str) -> str:
    """Return text that may come from anywhere, its control characters visible."""
    return visible(text)


def prompt(found: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as text; of chat messages, each with its role."""
    if isinstance(found, str):
        return visible(found)
    lines = (f"{message.get('role', '')}: {message.get('content', '')}" for message in found)
    return visible("\n".join(lines))


def kind(plan: Mapping[str, Any]) -> str:
    """Return which kind of plan it is."""
    run = plan.get("run")
    return str(run.get("kind", "")) if isinstance(run, dict) else ""


def cost(run: Generated, full: tuple[str, Generated] | None) -> Cost:
    """Return what is known best of a run's time: measured, else predicted."""
    counted = (run.flops_ratio, run.bytes_ratio)
    if full and run.tokens and full[1].tokens and full[1].seconds:
        ratio = run.seconds / run.tokens / (full[1].seconds / full[1].tokens)
        return Cost(ratio, f"measured, against {full[0]}", *counted)
    return Cost(run.predicted_ratio, "predicted for that machine", *counted)


def headline(run: Generated, counts: Counter[int]) -> str:
    """Return the run in one sentence."""
    total = counts.total()
    if not total:
        return "No token was generated."
    early = sum(count for depth, count in counts.items() if depth < run.num_layers)
    if kind(run.plan) == "speculate":
        return (
            f"{run.accepted:,} of {run.drafted:,} drafted tokens were confirmed by all "
            f"{run.num_layers} layers: the text is the full model's."
        )
    if not early:
        return f"All {total:,} tokens ran all {run.num_layers} layers."
    return (
        f"{early / total:.0%} of {total:,} tokens left early; a token ran "
        f"{_mean(counts):.1f} of {run.num_layers} layers on average."
    )


def _mean(counts: Counter[int]) -> float:
    return sum(depth * count for depth, count in counts.items()) / (counts.total() or 1)


def alerts(known: Cost) -> list[str]:
    """Return slow-downs in words."""
    if known.ratio is not None:
        if known.ratio <= 1.005:
            return []
        return [
            f"Slower than full depth: a token took {known.ratio:.2f} times as long ({known.source})."
        ]
    counted = (known.flops, known.weights)
    if all(value is not None and value > 1 for value in counted):
        return [
            f"Dearer than full depth by both counts: {known.flops:.2f} times the operations, "
            f"{known.weights:.2f} times the weights read."
        ]
    return []


def figures(
    run: Generated, counts: Counter[int], known: Cost, same: Sequence[bool]
) -> list[Figure]:
    """Return the headline figures of a run."""
    found = [Figure("tokens", f"{run.tokens:,}", f"in {len(run.outputs)} answers")]
    found += _depth_figures(run.num_layers, counts)
    if known.ratio is None:
        found += _counted(known)
    else:
        found.append(_time(known))
    if same:
        share = sum(same) / len(same)
        about = f"of {len(same):,} traced tokens are what the full model says there"
        found.append(Figure("as the full model", f"{share:.1%}", about))
    if run.drafted:
        about = f"{run.accepted:,} of {run.drafted:,} drafted tokens"
        found.append(Figure("drafts confirmed", f"{run.accepted / run.drafted:.0%}", about))
    return found


def _depth_figures(num_layers: int, counts: Counter[int]) -> list[Figure]:
    total = counts.total() or 1
    early = sum(count for depth, count in counts.items() if depth < num_layers)
    mean = _mean(counts)
    return [
        Figure("left early", f"{early / total:.0%}", f"{early:,} of {counts.total():,} tokens"),
        Figure("mean depth", f"{mean:.1f}", f"of {num_layers} layers ({mean / num_layers:.0%})"),
    ]


def _time(known: Cost) -> Figure:
    ratio = known.ratio or 0.0
    slow = ratio > 1.005
    word = "slower" if slow else "faster" if ratio < 0.995 else "the same"
    return Figure("time / full depth", f"{ratio:.2f}×", f"{word}; {known.source}", bad=slow)


def _counted(known: Cost) -> list[Figure]:
    pairs = (("weights read / full depth", known.weights), ("operations / full depth", known.flops))
    about = "counted; time was not measured"
    return [
        Figure(name, f"{value:.2f}×", about, bad=value > 1.005)
        for name, value in pairs
        if value is not None
    ]


def about(run: Generated) -> str:
    """Return what was run, and where."""
    plan = describe(run.plan)
    where = run.machine.get("processor", "unknown machine")
    seconds = f"{run.tokens:,} tokens in {run.seconds:.1f} s"
    return visible(f"{run.model} · {plan} · {run.backbone} {run.weights} · {seconds} · {where}")


def describe(plan: Mapping[str, Any]) -> str:
    """Return a plan in a few words."""
    run = plan.get("run") or {}
    match run:
        case {"kind": "exit", "signal": signal, "thresholds": dict(values)}:
            exits = ", ".join(f"{depth}:{value}" for depth, value in values.items())
            return f"leaves where {signal} reaches {exits}"
        case {"kind": "speculate", "draft": list(draft), "tokens": tokens}:
            return f"drafts {tokens} tokens with {len(draft)} layers"
        case {"kind": "path", "layers": list(layers)}:
            return f"{len(layers)} layers for every token"
    return "full depth" if kind(plan) == "full" else "an unknown plan"


def missing(name: str, full: bool, traced: bool, plan: str) -> list[tuple[str, str]]:
    """Return (what is not shown, the command that adds it)."""
    found = []
    quoted = shlex.quote(name)
    if not traced:
        found.append(
            (
                "confidence, and what the full model would have said of each token",
                f"offramp trace --run {quoted} --json > trace.json && "
                f"offramp report {quoted} trace.json",
            )
        )
    if not full and plan != "full":
        found.append(
            (
                "the full model's answers beside these, and measured time",
                f"offramp generate --prompts ... --plan full --json --out full.json && "
                f"offramp report {quoted} full.json",
            )
        )
    return [(what, visible(command)) for what, command in found]


def compared(answer: Any, full: Any) -> str:
    """Return whether two answers are the same, and else from where on they differ."""
    if answer.token_ids == full.token_ids:
        return "Identical to the full model's answer."
    pairs = enumerate(zip(answer.token_ids, full.token_ids, strict=False), 1)
    shorter = min(len(answer.token_ids), len(full.token_ids)) + 1
    place = next((t for t, (a, b) in pairs if a != b), shorter)
    return f"Differs from the full model's answer at token {place}."


def legend(num_layers: int) -> list[tuple[str, str]]:
    """Return (class, depths) of each colour, shallow to deep."""
    ranges: dict[int, list[int]] = {}
    for depth in range(1, num_layers):
        ranges.setdefault(step_of(depth, num_layers) or 0, []).append(depth)
    spans = [(f"d{step}", depths) for step, depths in sorted(ranges.items())]
    named = [(style, f"{d[0]}–{d[-1]}" if len(d) > 1 else f"{d[0]}") for style, d in spans]  # noqa: RUF001
    return [*named, ("full", f"all {num_layers}")]


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
    if replayed:
        return (
            f"The plan would let {early:.0%} of tokens leave early, after {_mean(counts):.1f} of "
            f"{run.num_layers} layers on average."
        )
    return (
        f"No plan was replayed. Colours show the first depth from which on every exit says what the "
        f"last layer says: {_mean(counts):.1f} of {run.num_layers} layers on average, the most that "
        "leaving early could save here."
    )


def trace_figures(run: TraceRun, counts: Counter[int], *, replayed: bool) -> list[Figure]:
    """Return the headline figures of a trace."""
    found = [Figure("tokens", f"{run.tokens:,}", f"{len(run.texts)} texts shown")]
    depths = _depth_figures(run.num_layers, counts)
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


def slower(row: Timed) -> str:
    """Return a contestant's slow-down in words."""
    return (
        f"{visible(row.name)} (batch {row.batch}, context {row.context}) is slower than full depth: "
        f"{row.ratio_to_full:.2f} of its speed."
    )


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
