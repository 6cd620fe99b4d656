"""Compares a plan with full depth on tasks: asks in turns, keeps the answers, scores and counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from offramp.bench.figures import spread
from offramp.errors import OfframpError, UsageError
from offramp.evaluate.arms import Asked, asked_of, take_turn, with_losses
from offramp.evaluate.intervals import Interval
from offramp.evaluate.items import Item
from offramp.evaluate.kept import Answer, Group, Ran, digest_of, facts_of
from offramp.evaluate.scores import Judge, Likeness, Row, rows_of
from offramp.evaluate.tasks import Task
from offramp.journal import append, open_journal
from offramp.model import Model
from offramp.plan import Plan
from offramp.runs import Adapt, Speculate


@dataclass(frozen=True)
class Settings:
    """How tasks are asked."""

    limit: int = 100
    """Most items of each task."""
    seed: int = 0
    max_new_tokens: int = 128
    batch_size: int = 1
    raw: bool = False
    """Never use the chat template."""


@dataclass(frozen=True)
class Judged:
    """What came of one task."""

    task: str
    items: int
    left_out: int
    """Items without room for an answer in the model's context."""
    rows: list[Row]
    costs: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, with the point and the reference that a report draws."""
        return {
            "task": self.task,
            "items": self.items,
            "left_out": self.left_out,
            **self.costs,
            "scores": [row.as_dict() for row in self.rows],
            "curve": self._curve(),
        }

    def _curve(self) -> dict[str, Any]:
        first = self.rows[0]
        sign = -1 if first.better == "lower" else 1
        name = first.score if sign == 1 else f"minus {first.score}"
        return {
            "quality": f"{self.task}: {name.replace('_', ' ')}",
            "cost": "operations, checks and fills included / full depth",
            "points": [_point("this plan", first.plan, sign, self.costs["flops_ratio"])],
            "full": _point("full depth", first.full, sign, 1.0),
        }


def _point(name: str, quality: Interval, sign: int, cost: float) -> dict[str, Any]:
    low, high = sorted((sign * quality.low, sign * quality.high))
    return {"name": name, "cost": cost, "quality": sign * quality.mean, "low": low, "high": high}


def compare(
    model: Model,
    plan: Plan,
    tasks: Sequence[tuple[Task, list[Item]]],
    settings: Settings,
    *,
    kept: Path | None = None,
    likeness: Likeness | None = None,
    judge: Judge | None = None,
    show: bool = True,
) -> list[Judged]:
    """Let the plan and full depth answer the items of some tasks, group by group in turns.

    Args:
        model: what answers.
        plan: how the first arm runs; the second is full depth.
        tasks: what is asked, with all items in the order of asking.
        settings: how.
        kept: a file for the answers; a run that was killed goes on behind those it holds.
        likeness: what judges likeness in meaning.
        judge: what says which of two answers is better.
        show: progress bars.

    Raises:
        UsageError: the plan is not for this model, or its draft would know the text to be read.
        OfframpError: answers are kept of other facts, or a task has no item that fits.
    """
    plan.check(model.backbone)
    if isinstance(plan.run, Speculate | Adapt):
        for task in (task for task, _ in tasks if task.kind == "reading"):
            raise UsageError(
                f"this plan is lossless, so its perplexity is the full model's: leave {task.name} "
                "out"
            )
    prepared = [_Comparison(model, plan, task, items, settings) for task, items in tasks]
    found: dict[tuple[str, int], Group] = {}
    if kept is not None:
        facts = facts_of(model, plan, **vars(settings))
        found = _known(kept, open_journal(kept, facts, "answers"), prepared)
    _warm_up(prepared[0])
    judged = []
    for one in prepared:
        groups = list(one.groups(found, kept, show=show))
        judged.append(one.judged(groups, likeness, judge))
    return judged


def _known(
    path: Path, rows: Sequence[Any], prepared: Sequence[_Comparison]
) -> dict[tuple[str, int], Group]:
    """Return the groups that are there already, by task and number.

    Raises:
        OfframpError: a row is none, or of other items than are asked now.
    """
    digests = {one.task.name: one.digest for one in prepared}
    found = {}
    for row in rows:
        try:
            group = Group.model_validate_json(json.dumps(row))
        except ValidationError as error:
            raise OfframpError(f"{path} holds no answers: {error.errors()[0]['msg']}") from error
        if digests.get(group.task, group.digest) != group.digest:
            raise OfframpError(
                f"{path} holds answers to other items of {group.task}; name another --out, or "
                "remove it"
            )
        found[group.task, group.number] = group
    return found


def _warm_up(one: _Comparison) -> None:
    """Let both arms answer once before anything is timed."""
    for plan in (one.plan, Plan()):
        take_turn(one.model, plan, one.task, one.asked[:1], count=1, batch_size=1)


class _Comparison:
    """One task, both arms."""

    def __init__(
        self, model: Model, plan: Plan, task: Task, items: Sequence[Item], settings: Settings
    ) -> None:
        self.model, self.plan, self.task, self.settings = model, plan, task, settings
        self.count = min(settings.max_new_tokens, task.most or settings.max_new_tokens)
        some = items[: settings.limit]
        found = asked_of(model, task, some, raw=settings.raw, count=self.count)
        self.asked: list[Asked] = [one for one in found if one is not None]
        self.left_out = len(found) - len(self.asked)
        if not self.asked:
            raise OfframpError(
                f"none of {len(found)} items of {task.name} fits into the "
                f"{model.backbone.shape.context} tokens that the model reads, with an answer of "
                f"{self.count}"
            )
        self.digest = digest_of([[one.ids, one.references] for one in self.asked])

    def groups(
        self, found: dict[tuple[str, int], Group], kept: Path | None, *, show: bool
    ) -> Iterator[Group]:
        """Yield every group: those kept, and the others as they are answered."""
        size = self.settings.batch_size
        with tqdm(total=len(self.asked), desc=self.task.name, unit="item", disable=not show) as bar:
            for number, start in enumerate(range(0, len(self.asked), size)):
                some = self.asked[start : start + size]
                group = found.get((self.task.name, number))
                if group is None:
                    group = self._answered(number, some)
                    if kept is not None:
                        append(kept, group.model_dump(mode="json"))
                bar.update(len(some))
                yield group

    def _answered(self, number: int, some: Sequence[Asked]) -> Group:
        plan, full = (self._turn(plan, some) for plan in (self.plan, Plan()))
        if self.task.kind == "answer":
            plan, full = (with_losses(self.model, some, ran) for ran in (plan, full))
        return Group(task=self.task.name, digest=self.digest, number=number, plan=plan, full=full)

    def _turn(self, plan: Plan, some: Sequence[Asked]) -> Ran:
        size = self.settings.batch_size
        return take_turn(self.model, plan, self.task, some, count=self.count, batch_size=size)

    def judged(
        self, groups: Sequence[Group], likeness: Likeness | None, judge: Judge | None
    ) -> Judged:
        """Return scores and costs."""
        plan = [answer for group in groups for answer in group.plan.answers]
        full = [answer for group in groups for answer in group.full.answers]
        rows = rows_of(self.task, self.asked, plan, full, self.settings.seed, likeness, judge)
        return Judged(self.task.name, len(plan), self.left_out, rows, _costs(groups, plan, full))


def _costs(
    groups: Sequence[Group], plan: Sequence[Answer], full: Sequence[Answer]
) -> dict[str, Any]:
    """Return work saved over the same tokens, tokens written, and time in turns."""
    depths = [depth for answer in plan for depth in answer.depths]
    tokens = {name: sum(len(one.ids) for one in arm) for name, arm in _arms(plan, full)}
    own = [group.plan for group in groups]
    ratio = sum(ran.flops for ran in own) / sum(ran.full_flops for ran in own)
    rows = sum(ran.layer_rows for ran in own) / sum(ran.full_layer_rows for ran in own)
    each = [group.plan.seconds / group.full.seconds for group in groups]
    counts = [(_tokens(group.plan), _tokens(group.full)) for group in groups]
    per_token = [one * b / a for one, (a, b) in zip(each, counts, strict=True)]
    return {
        "mean_depth": sum(depths) / len(depths),
        "layers_saved": 1 - rows,
        "flops_ratio": ratio,
        "flops_saved": 1 - ratio,
        "tokens": tokens,
        "seconds": {
            "plan": sum(group.plan.seconds for group in groups),
            "full": sum(group.full.seconds for group in groups),
        },
        "time_ratio": _told(each),
        "time_per_token_ratio": _told(per_token),
    }


def _arms(
    plan: Sequence[Answer], full: Sequence[Answer]
) -> tuple[tuple[str, Sequence[Answer]], ...]:
    return ("plan", plan), ("full", full)


def _tokens(ran: Ran) -> int:
    return sum(len(answer.ids) for answer in ran.answers)


def _told(values: Sequence[float]) -> dict[str, float]:
    median, (low, high) = spread(values)
    return {"median": median, "low": low, "high": high}
