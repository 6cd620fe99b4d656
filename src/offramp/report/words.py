"""What a report says of runs: headlines, figures, captions, slow-downs and what is missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.report.parts import Figure
from offramp.report.runs import Generated
from offramp.report.svg import step_of
from offramp.shown import visible

DEPTHS = "How many tokens were chosen after so many layers; hollow bars ran all of them."
GRID = (
    "Each column is a token, each row an exit, the last layer on top. Colour is confidence, dark "
    "to bright; a dot marks a choice that is not the last layer's. The line is the exit taken, "
    "and what is veiled above it did not run to choose the token."
)
RELIABILITY = (
    "On the dotted line, a confidence of 0.8 is right 8 times in 10. Below it an exit is surer "
    "than it should be. Larger dots are more tokens; right is what the last layer says."
)
SPEEDS = (
    "New tokens per second, medians with quartiles. Hollow bars are slower than the same model at "
    "full depth."
)

SLOWER = 1.005
"""A ratio to full depth above which a run is called slower: below it, it reads as the same."""


@dataclass(frozen=True)
class Cost:
    """Time of a token against full depth, and where it is known from."""

    ratio: float | None
    source: str
    flops: float | None = None
    weights: float | None = None


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
        f"{mean_depth(counts):.1f} of {run.num_layers} layers on average."
    )


def mean_depth(counts: Counter[int]) -> float:
    """Return the mean of depths, 0 of none."""
    return sum(depth * count for depth, count in counts.items()) / (counts.total() or 1)


def alerts(known: Cost) -> list[str]:
    """Return slow-downs in words."""
    if known.ratio is not None:
        if known.ratio <= SLOWER:
            return []
        return [
            f"Slower than full depth: a token took {known.ratio:.2f} times as long "
            f"({known.source})."
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
    found += depth_figures(run.num_layers, counts)
    if known.ratio is None:
        found += _counted(known)
    else:
        found.append(_time(known))
    if same:
        share = sum(same) / len(same)
        about = f"of {len(same):,} traced tokens, each after the same text"
        found.append(Figure("same as full model", f"{share:.1%}", about))
    if run.drafted:
        about = f"{run.accepted:,} of {run.drafted:,} drafted tokens"
        found.append(Figure("drafts confirmed", f"{run.accepted / run.drafted:.0%}", about))
    return found


def depth_figures(num_layers: int, counts: Counter[int]) -> list[Figure]:
    """Return the share that left early, and the mean depth."""
    total = counts.total() or 1
    early = sum(count for depth, count in counts.items() if depth < num_layers)
    mean = mean_depth(counts)
    return [
        Figure("left early", f"{early / total:.0%}", f"{early:,} of {counts.total():,} tokens"),
        Figure("mean depth", f"{mean:.1f}", f"of {num_layers} layers ({mean / num_layers:.0%})"),
    ]


def _time(known: Cost) -> Figure:
    ratio = known.ratio or 0.0
    slow = ratio > SLOWER
    word = "slower" if slow else "faster" if ratio < 0.995 else "the same"
    return Figure("time / full depth", f"{ratio:.2f}x", f"{word}; {known.source}", bad=slow)


def _counted(known: Cost) -> list[Figure]:
    pairs = (("weights read / full depth", known.weights), ("operations / full depth", known.flops))
    about = "counted; time was not measured"
    return [
        Figure(name, f"{value:.2f}x", about, bad=value > SLOWER)
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
            exits = ", ".join(f"{depth}:{value:.3g}" for depth, value in values.items())
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
