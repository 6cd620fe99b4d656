"""Operating points for ``policies.py``: the cheapest of each policy that keeps a risk.

Costs are predicted seconds of this machine per token, full depth = 1, and count every check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import offramp
from offramp.adainfer.fit import fit_classifier
from offramp.allocate.fit import fit_router, price_of
from offramp.allocate.oracle import permuted, solve
from offramp.allocate.score import from_trace
from offramp.allocate.table import ScoreTable
from offramp.calibrate.run import Way, replay_settings, run_of
from offramp.calibrate.settings import costs, grid, pricing, seen
from offramp.checks import Check, GateFile, Head
from offramp.classifier import Classified, Kind
from offramp.cost import path_ratio
from offramp.gate import Gate, fit_gate
from offramp.paths import prefix, unified_skip
from offramp.plan import in_heads
from offramp.policy import Policy
from offramp.runs import Exit, Route, Run
from offramp.runs import Path as SubModel
from offramp.search.passes import opened
from offramp.search.subsets import search
from offramp.timing import Constants
from offramp.trace import Trace, replay

SIGNALS = ("max_prob", "margin", "entropy", "saturation", "patience")
CLASSIFIERS: tuple[Kind, ...] = ("svm", "logistic", "crf", "rule")
LEVELS = 60
"""Thresholds tried for a score that has one for all exits."""
RESAMPLES = 1000
LEFT_OUT = (1, 2, 3)
"""How many layers a sub-model lacks."""
SEARCHED, JUDGED = 12, 40
"""Texts that a search of layers is made on, and those that choose among its paths."""


@dataclass(frozen=True)
class Found:
    """One policy at its operating point, judged on the held-out texts."""

    name: str
    run: Run | None
    """How to run it; None where nothing kept the risk, or it cannot be run."""
    risks: Tensor | None
    """``[S]``: share of wrong tokens of each held-out text."""
    depth: float = math.nan
    predicted: float = math.nan
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the figures by name; the risk with its 95% bootstrap interval over texts."""
        if self.risks is None:
            return {"name": self.name, "note": self.note}
        draw = torch.Generator().manual_seed(0)
        index = torch.randint(len(self.risks), (RESAMPLES, len(self.risks)), generator=draw)
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = self.risks.double()[index].mean(1).quantile(ends).tolist()
        return {
            "name": self.name,
            "run": None if self.run is None else _brief(self.run.model_dump(mode="json")),
            "risk": self.risks.double().mean().item(),
            "risk_interval": [low, high],
            "mean_depth": self.depth,
            "predicted_ratio": self.predicted,
            "note": self.note,
        }


def _brief(facts: Any) -> Any:
    """Return a run's facts without folders, and of a list of tokens how many are in it."""
    if isinstance(facts, list):
        return [_brief(one) for one in facts]
    if not isinstance(facts, dict):
        return facts
    brief = {key: _brief(value) for key, value in facts.items()}
    for key in brief.keys() & {"classifier", "router", "file"}:
        brief[key] = brief[key] and Path(brief[key]).name
    if brief.get("kind") == "tokens":
        brief["tokens"] = len(brief["tokens"])
    return brief


@dataclass(frozen=True)
class Judge:
    """What all policies are chosen and judged on: texts at even places choose, the others judge."""

    model: offramp.Model
    check: Check
    head: Head
    """What chooses the tokens that leave, and all of a sub-model's."""
    trace: Trace
    texts: list[tuple[list[int], int]]
    features: Tensor
    look: int
    constants: Constants
    alpha: float
    folder: Path
    """For files that plans name."""

    @cached_property
    def chosen_on(self) -> Trace:
        """Return the texts that choose."""
        return self.trace.part(range(0, len(self.texts), 2))

    @cached_property
    def judged_on(self) -> Trace:
        """Return the texts that judge."""
        return self.trace.part(range(1, len(self.texts), 2))

    def held_out_prompts(self, count: int) -> list[list[int]]:
        """Return the first prompts of the texts that judge, as token ids."""
        return [ids[:first] for ids, first in self.texts[1::2][:count]]

    def price(self, exits: tuple[int, ...], depths: Tensor, check: Check) -> float:
        """Return the predicted cost of tokens that leave at these depths ``[T]``."""
        shares = [(depths == depth).double().mean().item() for depth in exits]
        shape = self.model.backbone.shape
        return pricing(shape, check, self.trace, self.constants, self.head)(exits, shares)

    def by_text(self, depth: float) -> float:
        """Return the predicted cost of texts of this mean depth: some end at exits, by their head,
        some run whole."""
        shape, last = self.model.backbone.shape, self.trace.num_layers
        head = in_heads(self.head, shape)
        prices = [path_ratio(shape, stop, self.constants, head=head) for stop in self.trace.exits]
        return float(np.interp(depth, [*self.trace.exits, last], [*prices, 1.0]))

    def judged(self, name: str, run: Exit, policy: Policy, check: Check) -> Found:
        """Return what a run does to the texts that judge."""
        trace = self.judged_on
        done = replay(trace, policy, check=check, head=self.head)
        wrong = (done.chosen != trace.chosen[:, -1]).double()
        risks = torch.stack([one.mean() for one in wrong.split(list(trace.rows))])
        depth = done.depths.double().mean().item()
        return Found(name, run, risks, depth, self.price(policy.exits, done.depths, check))


def found_by_token(judge: Judge) -> Iterator[Found]:
    """Yield the policies that decide for each token: signals, classifiers, gates."""
    for signal in SIGNALS:
        yield _signal(judge, signal)
    for kind in CLASSIFIERS:
        yield _classified(judge, kind)
    yield _gated(judge)


def _classified(judge: Judge, kind: Kind) -> Found:
    """Fit AdaInfer's classifier, and move its own word (0) to where the risk is kept."""
    name, exits = f"AdaInfer, {kind}", judge.trace.exits
    try:
        fitted = fit_classifier(judge.chosen_on, kind)
    except offramp.UsageError as error:
        return Found(name, None, None, note=str(error))
    file = judge.folder / f"{kind}.safetensors"
    fitted.save(file)

    def policy(level: float) -> Policy:
        return Classified(fitted, tuple((depth, level) for depth in exits))

    def run(level: float) -> Exit:
        thresholds = dict.fromkeys(exits, level)
        return Exit(
            signal="classifier",
            thresholds=thresholds,
            classifier=str(file),
            check=judge.check,
            head=judge.head,
        )

    return _one_threshold(judge, name, policy, run, judge.check, (-8.0, 8.0))


def _gated(judge: Judge) -> Found:
    """Fit a gate per exit on the hidden state."""
    gates, exits = fit_gate(judge.chosen_on), judge.trace.exits
    file = judge.folder / "gates.safetensors"
    gates.save(file)
    looks = GateFile(file=str(file))

    def policy(level: float) -> Policy:
        return Gate(gates, tuple((depth, level) for depth in exits))

    def run(level: float) -> Exit:
        thresholds = dict.fromkeys(exits, level)
        return Exit(signal="gate", thresholds=thresholds, check=looks, head=judge.head)

    return _one_threshold(judge, "gates on the state", policy, run, looks, (0.0, 1.0))


def _signal(judge: Judge, signal: str) -> Found:
    """Choose joint thresholds as ``offramp calibrate`` does, without its guarantee."""
    trace, way = judge.chosen_on, Way(judge.trace.exits, signal, judge.check, judge.head)
    try:
        scores = seen(trace, signal, way.exits, way.check)
    except offramp.UsageError as error:
        return Found(signal, None, None, note=str(error))
    done = replay_settings(trace, way, grid(scores, keep_exits=way.keeps_exits))
    price = pricing(judge.model.backbone.shape, judge.check, trace, judge.constants, judge.head)
    cost = costs(done, np.arange(len(trace.rows)), price)
    kept = done.losses["disagreement"].mean(-1) <= judge.alpha
    if not kept.any():
        return Found(signal, None, None, note="no setting keeps the risk")
    run = run_of(way, done.thresholds[int(np.where(kept, cost, np.inf).argmin())])
    return judge.judged(signal, run, run.policy, judge.check)


def _one_threshold(
    judge: Judge,
    name: str,
    policy: Callable[[float], Policy],
    run: Callable[[float], Exit],
    check: Check,
    span: tuple[float, float],
) -> Found:
    """Choose the one threshold, the same at every exit, that costs least and keeps the risk.

    First among some far apart, then among as many below the best of those.
    """
    trace, (low, high) = judge.chosen_on, span

    def cheapest(levels: Iterable[float]) -> float | None:
        """Return the level of the least cost among those that keep the risk, if any does."""
        costs = {}
        for level in levels:
            done = replay(trace, policy(level), check=check, head=judge.head)
            if (done.chosen != trace.chosen[:, -1]).double().mean().item() <= judge.alpha:
                costs[level] = judge.price(trace.exits, done.depths, check)
        return min(costs, key=costs.__getitem__, default=None)

    step = (high - low) / LEVELS
    best = cheapest(low + step * k for k in range(LEVELS + 1))
    if best is None:
        return Found(name, None, None, note="no threshold keeps the risk")
    best = cheapest(best - step * k / LEVELS for k in range(LEVELS))
    assert best is not None  # the first of these is the one found before
    return judge.judged(name, run(best), policy(best), check)


def found_by_text(judge: Judge) -> Iterator[Found]:
    """Yield what treats a text alike: fixed depth, evenly skipped layers, routes, the oracles."""
    exits, last = judge.trace.exits, judge.trace.num_layers
    chosen, judged = judge.chosen_on, judge.judged_on
    right = chosen.agrees.double().mean(0).tolist()
    enough = [k for k, share in enumerate(right) if 1 - share <= judge.alpha]
    if enough:
        depth = exits[enough[0]]
        wrong = (~judged.agrees[:, enough[0]]).double().split(list(judged.rows))
        risks = torch.stack([one.mean() for one in wrong])
        run = SubModel(layers=prefix(depth, last), head=judge.head)
        yield Found("fixed depth", run, risks, depth, judge.by_text(depth))
    else:
        yield Found("fixed depth", None, None, note="none of the exits keeps the risk")
    yield _evenly_skipped(judge)
    yield _searched(judge)
    tables = [_table(judge, one) for one in (0, 1)]
    yield _routed(judge, *tables)
    target, draw = 1 - judge.alpha, torch.Generator().manual_seed(0)
    for name, scores in (
        ("oracle (peeks)", tables[1].scores),
        (
            "null oracle (scores shuffled)",
            permuted(tables[1].scores, draw),
        ),
    ):
        budget = solve(scores, tables[1].costs).smallest_budget(target)
        risks = torch.full((len(scores),), judge.alpha)
        yield Found(name, None, risks, budget, judge.by_text(budget), "cannot be run")


def _evenly_skipped(judge: Judge) -> Found:
    """Leave out evenly spread layers (unified layer skipping), as many as the risk allows."""
    last = judge.trace.num_layers
    return _of_layers(judge, "ULS", [unified_skip(last - out, last) for out in LEFT_OUT])


def _searched(judge: Judge) -> Found:
    """Leave out the layers that are least missed, as many as the risk allows."""
    backbone, last = judge.model.backbone, judge.trace.num_layers
    steps = search(backbone, judge.texts[0::2][:SEARCHED], last - LEFT_OUT[-1], "loss")
    return _of_layers(judge, "searched layers", [step.layers for step in steps[1:]])


def _of_layers(judge: Judge, name: str, paths: Sequence[tuple[int, ...]]) -> Found:
    """Take the shortest of these paths that keeps the risk; the longest comes first."""
    chosen, judged = judge.texts[0::2][:JUDGED], judge.texts[1::2]
    risks = [_wrong(judge, path, chosen).mean().item() for path in paths]
    kept = [path for path, risk in zip(paths, risks, strict=True) if risk <= judge.alpha]
    if not kept:
        return Found(name, None, None, note=f"{len(paths[0])} layers risk {risks[0]:.2f}")
    path = min(kept, key=len)
    cost = path_ratio(judge.model.backbone.shape, len(path), judge.constants)
    return Found(name, SubModel(layers=path), _wrong(judge, path, judged), len(path), cost)


def _wrong(judge: Judge, path: Sequence[int], texts: Sequence[tuple[list[int], int]]) -> Tensor:
    """Return ``[S]``: the share of each text's tokens on which a path is not the full model."""
    shares = []
    for text in texts:
        with opened(judge.model.backbone, [text]) as passes:
            agreed = passes.judge(path, passes.run(path, passes.inputs)).agreement
        shares.append(1 - agreed)
    return torch.tensor(shares)


def _table(judge: Judge, half: int) -> ScoreTable:
    trace = (judge.chosen_on, judge.judged_on)[half]
    table = from_trace(trace, judge.model.id, "agreement")
    runs = tuple(
        SubModel(layers=run.layers, head=judge.head) if isinstance(run, SubModel) else run
        for run in table.runs
    )
    table = replace(table, runs=runs)
    return table.with_features(judge.features[half::2], (judge.look,))


def _routed(judge: Judge, table: ScoreTable, held_out: ScoreTable) -> Found:
    """Fit a router; take the least budget at which texts left out of the fit keep the risk."""
    name = "route"
    try:
        router, crossed = fit_router(table)
    except offramp.UsageError as error:
        return Found(name, None, None, note=str(error))
    for budget in np.arange(float(table.costs[0]), float(table.costs[-1]) + 0.01, 0.25):
        price = price_of(crossed, table.costs, float(budget))
        ways = (crossed - price * table.costs).argmax(1)
        if 1 - table.scores.gather(1, ways[:, None]).mean().item() <= judge.alpha:
            break
    file = judge.folder / "router.safetensors"
    digest = router.save(file)
    assert held_out.features is not None
    taken = torch.tensor(router.choose(held_out.features, price))
    risks = 1 - held_out.scores.gather(1, taken[:, None])[:, 0]
    depth = held_out.costs[taken].mean().item()
    run = Route(router=str(file), digest=digest, price=price, runs=table.runs)
    return Found(name, run, risks, depth, judge.by_text(depth))
