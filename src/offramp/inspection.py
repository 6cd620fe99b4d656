"""Is depth-adaptive inference worth it on this model and this text? Says so before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp.backbone import Shape
from offramp.checks import FULL_HEAD, Check, LowRank, Shortlist
from offramp.cost import (
    break_even_depth,
    cheap_check_in_layers,
    check_in_layers,
    exit_ratio,
    fill_in_layers,
    path_ratio,
    speculation_ratio,
    worth,
)
from offramp.plan import in_heads, reading
from offramp.policy import Threshold
from offramp.runs import Adapt, Exit, Full, Path, Route, Run, Skip, Speculate
from offramp.speculate import Draft
from offramp.timing import Constants
from offramp.trace import Trace, replay

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Give me three tips for sleeping better.",
    "Translate into French: The weather is nice today.",
    "What is the capital of Australia?",
    "Write a Python function that reverses a string.",
)
"""A handful of everyday requests, used when no others are given."""

_AGREE = 0.95
"""Agreement asked of a lossy exit before it is recommended: what LITE aims at."""
_WORTH = 0.9
"""A plan must be predicted to cost at most this share of plain decoding to be worth it."""
_DRAFT_TOKENS = (1, 2, 3, 4, 6, 8)


_CHECKS: tuple[Check, ...] = (
    FULL_HEAD,
    Shortlist(size=2048),
    Shortlist(size=4096),
    LowRank(rank=32),
)


@dataclass(frozen=True)
class CheckRow:
    """What one way of checking an exit costs, and for which exits it could pay."""

    check: str
    layers: float
    """Weights read by one check, one layer = 1."""
    break_even_depth: float
    """With a check after every layer, the deepest exit that still pays."""


@dataclass(frozen=True)
class DepthRow:
    """One depth of the model, judged on its own greedy answers."""

    depth: int
    agreement: float
    """Share of tokens on which the readout here chooses what the last layer does."""
    loss: float
    """Cross-entropy of the full model's own text, nats per token."""
    confidence: float
    """Mean largest probability: far above ``agreement`` means over-confident."""
    draft_tokens: int
    """Best draft length for self-speculation from here."""
    speculation_ratio: float
    """Predicted time of that speculation against plain decoding (weights read, where no time was
    measured); under 1 is faster."""


@dataclass(frozen=True)
class Inspection:
    """What ``offramp inspect`` reports."""

    shape: Shape
    batched: bool
    tokens: int
    check_in_layers: float
    fill_in_layers: float
    break_even_depth: float
    checks: tuple[CheckRow, ...]
    """The full head and what would be cheaper on this model."""
    rows: tuple[DepthRow, ...]
    exits: tuple[int, ...]
    """Recommended exits: where a check could pay for itself, few of them."""
    exit_depth: float
    """Mean depth of leaving there by max_prob, at thresholds with 95% agreement."""
    exit_ratio: float
    """Predicted time of that against full depth (or weights read), every check counted."""
    timing: dict[str, object] | None
    """What was measured on this machine; None: predictions are of weights read."""
    verdict: str
    recipe: str


def judge(
    trace: Trace, shape: Shape, *, batched: bool, constants: Constants | None = None
) -> Inspection:
    """Judge every depth on a trace of the model's own greedy answers, recorded at all depths.

    With constants of this machine what pays is judged by predicted time, for one text at a time and
    contexts as long as these; else by weights read.
    """
    context = sum(trace.lengths) // len(trace.lengths)
    rows = tuple(
        _row(trace, column, shape, constants, context) for column in range(len(trace.exits))
    )
    exits, depth, ratio = _exits(trace, rows, shape, constants, context)
    verdict, recipe = _verdict(rows, exits, ratio, measured=constants is not None)
    return Inspection(
        shape=shape,
        batched=batched,
        tokens=len(trace.chosen),
        check_in_layers=check_in_layers(shape),
        fill_in_layers=fill_in_layers(shape),
        break_even_depth=break_even_depth(shape),
        checks=tuple(_check_row(check, shape) for check in _CHECKS if _cheaper(check, shape)),
        rows=rows,
        exits=exits,
        exit_depth=depth,
        exit_ratio=ratio,
        timing=None if constants is None else constants.summary(),
        verdict=verdict,
        recipe=recipe,
    )


def _cheaper(check: Check, shape: Shape) -> bool:
    return check.weights(shape) < shape.head_weights


def _check_row(check: Check, shape: Shape) -> CheckRow:
    weights = check.weights(shape)
    price = cheap_check_in_layers(shape, weights) if weights else check_in_layers(shape)
    return CheckRow(str(check), price, break_even_depth(shape, weights))


def at_best(run: Run, shape: Shape, constants: Constants) -> float:
    """Return the predicted time of a plan against full depth if every guess of it were right.

    At 1 or more it cannot pay for itself, whatever the text.
    """
    match run:
        case Full():
            return 1.0
        case Path():
            head, depth = in_heads(run.head, shape), len(run.layers)
            speaks = depth if run.layers == tuple(range(depth)) else None
            runs = worth(run.layers, shape)
            return path_ratio(shape, runs, constants, head=head, speaks_at=speaks)
        case Exit():
            exits = run.policy.exits
            shares = [1.0] + [0.0] * (len(exits) - 1)
            check, choose = reading(run.sees, run.head, shape)
            return exit_ratio(
                *(shape, exits, shares, constants),
                copy=run.kv == "copy",
                check=check,
                choose=choose,
            )
        case Skip():  # a token may skip all but the layers without a gate
            left = shape.num_layers - len(run.weights.weights)
            return path_ratio(shape, max(left, 1), constants)
        case Speculate():
            head = in_heads(run.head, shape)
            return min(
                _right(replace(run.drafter, tokens=tokens), head, shape, constants)
                for tokens in range(1, run.tokens + 1)
            )
        case Adapt():
            head = in_heads(run.head, shape)
            return min(1.0, *(_right(one, head, shape, constants) for one in run.drafters))
        case Route():
            return min(at_best(one, shape, constants) for one in run.runs)


def _right(draft: Draft, head: float, shape: Shape, constants: Constants) -> float:
    """Return the predicted time of speculation if every draft is right."""
    return speculation_ratio(
        *(shape, worth(draft.layers, shape), draft.tokens, 1.0, constants),
        head=head,
        shared=draft.shared,
    )


def _row(
    trace: Trace, column: int, shape: Shape, constants: Constants | None, context: int
) -> DepthRow:
    depth = trace.exits[column]
    agreement = trace.agrees[:, column].float().mean().item()
    ratios = {
        k: speculation_ratio(shape, depth, k, agreement, constants, context) for k in _DRAFT_TOKENS
    }
    best = min(ratios, key=lambda k: ratios[k])
    return DepthRow(
        depth=depth,
        agreement=agreement,
        loss=trace.loss[:, column].mean().item(),
        confidence=trace.scores["max_prob"][:, column].mean().item(),
        draft_tokens=best,
        speculation_ratio=ratios[best],
    )


def _exits(
    trace: Trace,
    rows: Sequence[DepthRow],
    shape: Shape,
    constants: Constants | None,
    context: int,
) -> tuple[tuple[int, ...], float, float]:
    """Return the exit or pair of exits that is predicted cheapest at 95% agreement per exit."""
    cuts = {row.depth: _cut(trace, column) for column, row in enumerate(rows)}
    usable = [depth for depth, cut in cuts.items() if cut is not None]
    best: tuple[tuple[int, ...], float, float] = ((), float(shape.num_layers), 1.0)
    for i, first in enumerate(usable):
        for exits in [(first,), *((first, second) for second in usable[i + 1 :])]:
            policy = Threshold("max_prob", tuple((e, cuts[e]) for e in exits))  # type: ignore[misc]
            depths = replay(trace, policy).depths
            shares = [(depths == e).float().mean().item() for e in exits]
            ratio = exit_ratio(shape, exits, shares, constants, context)
            if ratio < best[2]:
                best = exits, depths.float().mean().item(), ratio
    return best


def _cut(trace: Trace, column: int) -> float | None:
    """Return the lowest max_prob above which this exit agrees on 95% of tokens, if there is one."""
    order = trace.scores["max_prob"][:, column].argsort(descending=True)
    right = trace.agrees[order, column].float().cumsum(0)
    share: Tensor = right / torch.arange(1, len(order) + 1)
    good = (share >= _AGREE).nonzero()
    if not len(good):
        return None
    return trace.scores["max_prob"][order[int(good[-1])], column].item()


def _verdict(
    rows: Sequence[DepthRow], exits: Sequence[int], ratio: float, *, measured: bool
) -> tuple[str, str]:
    cost, plain = ("take", "the time") if measured else ("read", "the weights")
    draft = min(rows, key=lambda row: row.speculation_ratio)
    if draft.speculation_ratio <= _WORTH:
        return (
            f"worth it, without loss: self-speculation from depth {draft.depth} with "
            f"{draft.draft_tokens} draft tokens is predicted to {cost} "
            f"{draft.speculation_ratio:.0%} of {plain}",
            f"generate --draft {draft.depth} --draft-tokens {draft.draft_tokens}",
        )
    if exits and ratio <= _WORTH:
        return (
            f"worth it, with loss: leaving at {', '.join(map(str, exits))} is predicted to "
            f"{cost} {ratio:.0%} of {plain} at {_AGREE:.0%} agreement per exit, on this text",
            "certify the thresholds on your own text before relying on them",
        )
    best = min(draft.speculation_ratio, ratio)
    return (
        f"not worth it as it is: the best plan found is predicted to {cost} {best:.0%} of "
        f"{plain} that plain decoding {cost}s",
        "its intermediate layers cannot speak yet: tune them (LITE, SoFT, or exit blocks distilled "
        "from the last layer), then inspect again",
    )
