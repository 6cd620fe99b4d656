"""Arms of a comparison: a model and a plan each. Lets them answer, counts the work, takes turns."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import cast

from torch import Tensor
from tqdm import tqdm

import offramp
from offramp.bench.figures import spread
from offramp.cli.options import parse_plan
from offramp.cost import flops, full_depth
from offramp.fast.pack import Format
from offramp.plan import check_of, execute
from offramp.request import GREEDY, Request
from offramp.runs import Full
from offramp.sample import Choose


@dataclass(frozen=True)
class Arm:
    """One way of answering."""

    name: str
    model: offramp.Model
    plan: offramp.Plan

    @property
    def full(self) -> bool:
        """Whether it runs every layer and reads the whole head: what others are compared with."""
        return isinstance(self.plan.run, Full)

    def answer(self, ids: list[int], count: int) -> list[int]:
        """Return the tokens that it writes, alone."""
        request = Request(ids, count, eos=self.model.eos)
        return [t.id for t in execute(self.model.backbone, [request], self.plan.run, batch_size=1)]


@dataclass
class Answers:
    """What an arm wrote to all texts, and the work it took."""

    written: list[list[int]]
    depths: list[list[int]]
    labels: list[int] = field(default_factory=list)
    """For classifiers: the best label, whatever else was more probable; -1 where none was seen."""
    layers_saved: float = 0.0
    """Share of the layers times rows of full depth, prompts included, that were not run."""
    operations: float = 0.0
    """Operations, of those of full depth with the whole head, over the same tokens."""


class Labels:
    """A chooser of the most probable token that remembers which label is the most probable."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.best = -1

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        """Return the most probable token."""
        seen = [token for token in self.tokens if token < logits.shape[1]]  # a short head has fewer
        if seen:
            self.best = seen[int(logits[0, seen].argmax())]
        return logits.argmax(-1).tolist()


def open_arms(wanted: Sequence[Sequence[str]], weights: Format) -> list[Arm]:
    """Return the arms of (name, model, plan); arms of one model share it.

    A plan is "full", a number of layers with perhaps a head behind a colon, or a file. A model may
    end with its own weights, as in ``runs/e2e@int4``.

    Raises:
        OfframpError: a model or a plan cannot be read, or they do not fit.
    """
    models: dict[str, offramp.Model] = {}
    arms = []
    for name, source, text in wanted:
        depth, _, head = text.partition(":")
        plan = (
            parse_plan(None, exit_depth=int(depth), head=head or None)
            if depth.isdecimal()
            else parse_plan(text)
        )
        if source not in models:
            model, _, form = source.partition("@")
            models[source] = offramp.load(
                None if model == "default" else model, weights=cast("Format", form or weights)
            )
        plan.check(models[source].backbone)
        arms.append(Arm(name, models[source], plan))
    return arms


def answer_all(
    arm: Arm, prompts: Sequence[list[int]], count: int, labels: Sequence[int], batch_size: int
) -> Answers:
    """Return the arm's greedy answers of at most ``count`` tokens, in batches.

    ``labels`` are the tokens that a classifier may answer, none for a task that writes text.
    """
    backbone, run = arm.model.backbone, arm.plan.run
    choosers: list[Choose] = [Labels(labels) if labels else GREEDY for _ in prompts]
    requests = [
        Request(ids, count, choose, arm.model.eos)
        for ids, choose in zip(prompts, choosers, strict=True)
    ]
    found = Answers([[] for _ in prompts], [[] for _ in prompts])
    before = backbone.meter.copy()
    with tqdm(total=len(prompts), desc=arm.name, unit="text", leave=False) as bar:
        for token in execute(backbone, requests, run, batch_size=batch_size):
            found.written[token.index].append(token.id)
            found.depths[token.index].append(token.depth)
            bar.update(token.finish is not None)
    work, shape = backbone.meter - before, backbone.shape
    sizes = [(len(ids), len(new)) for ids, new in zip(prompts, found.written, strict=True)]
    whole = full_depth(sizes, shape, batch_size, batched=backbone.batched, ragged=backbone.ragged)
    found.labels = [choose.best for choose in choosers if isinstance(choose, Labels)]
    found.layers_saved = 1 - work.layer_tokens / whole.layer_tokens
    checks = check_of(arm.plan).weights(shape)
    found.operations = flops(work, shape, checks) / flops(whole, shape)
    return found


@dataclass
class Clock:
    """Seconds and tokens of whole answers, ``[arm][prompt][round]``."""

    seconds: list[list[list[float]]]
    tokens: list[list[int]]
    """New tokens, ``[arm][prompt]``."""

    def against(self, arm: int, base: int) -> dict[str, object]:
        """Return the arm's time, of the base's: below 1 is faster; ratios within a round.

        ``answers``: whole answers, a median over rounds for each prompt, and of these the median
        and quartiles. ``tokens``: the same per token written, so that short answers save nothing.
        ``total``: of the sums over all prompts of a round, the median over rounds.
        """
        pairs = list(zip(self.seconds[arm], self.seconds[base], strict=True))
        each = [median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs]
        counts = zip(self.tokens[arm], self.tokens[base], strict=True)
        per_token = [one * b / a for one, (a, b) in zip(each, counts, strict=True)]
        sums = ([sum(turn) for turn in zip(*self.seconds[i], strict=True)] for i in (arm, base))
        return {
            "answers": _told(each),
            "tokens": _told(per_token),
            "total": median(a / b for a, b in zip(*sums, strict=True)),
        }

    def milliseconds(self, arm: int) -> dict[str, float]:
        """Return the time of an answer: the median over prompts, and the quartiles."""
        return _told([1e3 * median(turns) for turns in self.seconds[arm]])


def _told(values: Sequence[float]) -> dict[str, float]:
    middle, (low, high) = spread(values)
    return {"median": middle, "low": low, "high": high}


def race(
    arms: Sequence[Arm], prompts: Sequence[Sequence[list[int]]], count: int, rounds: int
) -> Clock:
    """Time every arm on every prompt alone, arms in turn; one round before warms up.

    ``prompts[arm]`` are the same texts by the arm's own tokenizer.
    """
    many = range(len(prompts[0]))
    clock = Clock([[[] for _ in many] for _ in arms], [[0 for _ in many] for _ in arms])
    for turn in tqdm(range(rounds + 1), unit="round", leave=False):
        for i in many:
            for j, arm in enumerate(arms):
                start = time.perf_counter()
                new = arm.answer(prompts[j][i], count)
                taken = time.perf_counter() - start
                clock.tokens[j][i] = len(new)
                if turn:
                    clock.seconds[j][i].append(taken)
    return clock


def shown(text: str) -> str:
    """Return words without the folders of this machine: ``12:tokens:/a/b`` as ``12:tokens:b``."""
    return re.sub(r"(^|:)[/~]\S*/", r"\1", text)
