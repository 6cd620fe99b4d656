"""The scores: of an answer against right ones, and of the plan's against the full model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.bench.figures import mismatches
from offramp.evaluate.arms import Asked
from offramp.evaluate.intervals import Difference, Interval, Shown, interval, paired
from offramp.evaluate.kept import Answer
from offramp.evaluate.overlap import chrf, exact, f1, plain_squad, plain_trivia, rouge_l
from offramp.evaluate.tasks import Task

Better = Literal["higher", "lower", "neither"]
Likeness = Callable[[Sequence[str], Sequence[str]], list[float]]
"""How alike pairs of texts are in meaning."""
Judge = Callable[[Sequence[tuple[str, str, str]]], list[float | None]]
"""``(prompt, the plan's answer, the full model's)`` to 1 where the plan's is better, 0.5 where
neither is, 0 where the other is; None where there is no verdict."""

LEAST = 10
"""Items below which an interval by bootstrap says too little for a verdict."""

SCORES: dict[str, Callable[[Answer, Asked], float]] = {
    "accuracy": lambda answer, asked: float(answer.ids[0] in asked.firsts),
    "exact_match": lambda answer, asked: exact(*_plain(plain_squad, answer, asked)),
    "f1": lambda answer, asked: f1(*_plain(plain_squad, answer, asked)),
    "trivia_exact_match": lambda answer, asked: exact(*_plain(plain_trivia, answer, asked)),
    "trivia_f1": lambda answer, asked: f1(*_plain(plain_trivia, answer, asked)),
    "rouge_l": lambda answer, asked: rouge_l(answer.text, asked.references),
    "chrf": lambda answer, asked: chrf(answer.text, asked.references),
}
"""Against right answers, by name; 0 to 1, higher is better."""


def _plain(
    plain: Callable[[str], str], answer: Answer, asked: Asked
) -> tuple[str, tuple[str, ...]]:
    return plain(answer.text), tuple(plain(right) for right in asked.references)


@dataclass(frozen=True)
class Row:
    """One score of both arms on the same items, each with its 95% bootstrap interval."""

    score: str
    against: Literal["references", "full model", "text"]
    better: Better
    plan: Interval
    full: Interval
    difference: Difference
    """Plan minus full."""
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def rows_of(
    task: Task,
    asked: Sequence[Asked],
    plan: Sequence[Answer],
    full: Sequence[Answer],
    seed: int,
    likeness: Likeness | None = None,
    judge: Judge | None = None,
) -> list[Row]:
    """Return the scores of a task; the first is the one that counts.

    Args:
        task: what was asked.
        asked: its items.
        plan: the plan's answers, one per item.
        full: the full model's.
        seed: of the resamples.
        likeness: what judges likeness in meaning; none is judged without.
        judge: what says which answer is better; likewise.
    """
    if task.kind == "reading":
        return _read(plan, full, seed)
    rows = []
    for name in task.scores:
        own, other = (
            [SCORES[name](one, item) for one, item in zip(arm, asked, strict=True)]
            for arm in (plan, full)
        )
        rows.append(_row(name, "references", "higher", own, other, seed))
    if task.kind == "choice":
        same = [_agreement(own, other) for own, other in zip(plan, full, strict=True)]
        return [*rows, _to_full("token_agreement", same, seed)]
    rows += [_to_full(name, found, seed) for name, found in _likeness(plan, full, likeness)]
    ratios = [len(own.ids) / len(other.ids) for own, other in zip(plan, full, strict=True)]
    rows.append(_row("length_ratio", "full model", "neither", ratios, [1.0] * len(ratios), seed))
    losses, least = ([_known(answer.loss) for answer in arm] for arm in (plan, full))
    if judge is not None:
        rows += _preferred(asked, plan, full, judge, seed)
    return [*rows, _row("loss_of_answer", "full model", "lower", losses, least, seed)]


def _read(plan: Sequence[Answer], full: Sequence[Answer], seed: int) -> list[Row]:
    """Return loss and perplexity per token: a text counts by its tokens."""
    weights = [float(len(answer.ids)) for answer in plan]
    own, other = ([_known(answer.loss) for answer in arm] for arm in (plan, full))
    return [
        _row(name, "text", "lower", own, other, seed, weights, shown)
        for name, shown in (("loss", None), ("perplexity", torch.exp))
    ]


def _likeness(
    plan: Sequence[Answer], full: Sequence[Answer], likeness: Likeness | None
) -> list[tuple[str, list[float]]]:
    """Return how like the full model's own answers the plan's are; the same answer is 1."""
    pairs = list(zip(plan, full, strict=True))
    found = [
        ("rouge_l_to_full", [_alike(rouge_l, *pair) for pair in pairs]),
        ("chrf_to_full", [_alike(chrf, *pair) for pair in pairs]),
        ("token_agreement", [_agreement(*pair) for pair in pairs]),
    ]
    if likeness is not None:
        judged = likeness([own.text for own in plan], [other.text for other in full])
        same = [1.0 if a.ids == b.ids else one for (a, b), one in zip(pairs, judged, strict=True)]
        found.insert(0, ("similarity_to_full", same))
    return found


def _preferred(
    asked: Sequence[Asked],
    plan: Sequence[Answer],
    full: Sequence[Answer],
    judge: Judge,
    seed: int,
) -> list[Row]:
    """Return how often the plan's answer is the better one, a tie counting half; 0.5 is as good."""
    texts = [(a.prompt, b.text, c.text) for a, b, c in zip(asked, plan, full, strict=True)]
    found = [one for one in judge(texts) if one is not None]
    level = [0.5] * len(found)
    return [_row("preferred", "full model", "higher", found, level, seed)] if found else []


def _alike(score: Callable[[str, Sequence[str]], float], own: Answer, other: Answer) -> float:
    return 1.0 if own.ids == other.ids else score(own.text, [other.text])


def _agreement(own: Answer, other: Answer) -> float:
    """Return the share of positions with the same token; where one has ended, they differ."""
    wrong = mismatches([list(own.ids)], [list(other.ids)])
    return 1 - wrong / max(len(own.ids), len(other.ids))


def _known(loss: float | None) -> float:
    assert loss is not None, "an answer whose loss was not looked up"
    return loss


def _to_full(name: str, scores: list[float], seed: int) -> Row:
    return _row(name, "full model", "higher", scores, [1.0] * len(scores), seed)


def _row(
    name: str,
    against: Literal["references", "full model", "text"],
    better: Better,
    plan: list[float],
    full: list[float],
    seed: int,
    weights: list[float] | None = None,
    shown: Shown | None = None,
) -> Row:
    figure: Shown = shown or _itself
    difference = paired(plan, full, seed, weights=weights, shown=shown)
    return Row(
        name,
        against,
        better,
        interval(plan, seed, weights=weights, shown=figure),
        interval(full, seed, weights=weights, shown=figure),
        difference,
        verdict(difference, better, len(plan)),
    )


def _itself(means: Tensor) -> Tensor:
    return means


def verdict(difference: Difference, better: Better, items: int) -> str:
    """Return what the interval of a difference shows, in a word or two."""
    if difference.low == difference.mean == difference.high == 0:
        return "equal"
    if items < LEAST:
        return "too few items"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    higher = difference.low > 0
    if better == "neither":
        return "higher" if higher else "lower"
    return "better" if higher == (better == "higher") else "worse"
