"""The whole procedure on one trace: settings, replays, certificate, held-out look, plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.backbone import Shape
from offramp.calibrate.certify import (
    CONFORMAL,
    Found,
    Goal,
    Parts,
    certify,
    must_be_enough,
    refusal,
    split,
)
from offramp.calibrate.replays import Replays, replay_all
from offramp.calibrate.settings import MOST_EXITS, Price, grid, seen
from offramp.calibrate.verify import Verification, verify
from offramp.certificate import Certificate, Drift, HeldOut
from offramp.checks import FULL_HEAD, Check, GateFile
from offramp.cost import check_in_heads, exit_ratio
from offramp.decode import MAX_WAITING
from offramp.errors import UsageError
from offramp.plan import Exit, ModelId, Plan, sealed
from offramp.signals import find
from offramp.timing import Constants
from offramp.trace import Trace


@dataclass(frozen=True)
class Way:
    """How tokens may leave; thresholds are what calibration finds."""

    exits: tuple[int, ...]
    signal: str = "max_prob"
    check: Check = FULL_HEAD
    max_waiting: int = MAX_WAITING
    exit_prompt: bool = False

    @property
    def keeps_exits(self) -> bool:
        """Return whether no exit may be dropped, as the signal compares it with the next."""
        return not isinstance(self.check, GateFile) and find(self.signal).looks_back


def exits_of(trace: Trace, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Return the exits asked for, or all of the trace's where those are few.

    Raises:
        UsageError: too many to set jointly, or none.
    """
    exits = trace.exits if asked is None else tuple(asked)
    if not 1 <= len(exits) <= MOST_EXITS:
        raise UsageError(
            f"name 1 to {MOST_EXITS} exits with --exits: thresholds are set jointly, and "
            f"{len(exits)} would be too {'many' if exits else 'few'}"
        )
    return exits


def counted(trace: Trace) -> Trace:
    """Return the trace without the texts that have no counted token."""
    if all(trace.rows):
        return trace
    kept = [i for i, rows in enumerate(trace.rows) if rows]
    parts = trace.ids.split(list(trace.lengths))
    fields = {name: value for name, value in trace.__dict__.items() if name != "agrees"}
    fields |= {
        "ids": torch.cat([parts[i] for i in kept]),
        "lengths": tuple(trace.lengths[i] for i in kept),
        "rows": tuple(trace.rows[i] for i in kept),
    }
    return Trace(**fields)


def text_hash(trace: Trace) -> str:
    """Return the SHA-256 of a trace's texts, and of which of their tokens are counted."""
    digest = hashlib.sha256(repr((trace.lengths, trace.rows)).encode())
    digest.update(trace.ids.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def pricing(shape: Shape, way: Way, trace: Trace, constants: Constants | None) -> Price:
    """Return what predicts the cost of leaving: time where it was measured, else weights read."""
    check = None if way.check == FULL_HEAD else check_in_heads(shape, way.check.weights(shape))
    context = sum(trace.lengths) // len(trace.lengths)

    def price(exits: Sequence[int], shares: Sequence[float]) -> float:
        return exit_ratio(shape, exits, shares, constants, context, check=check)

    return price


@dataclass(frozen=True)
class Calibration:
    """What calibration found on one trace."""

    way: Way
    goal: Goal
    parts: Parts
    replays: Replays
    found: Found
    held_out: HeldOut
    run: Exit
    """How to run the model: the thresholds that were certified."""

    def plan(
        self,
        model: ModelId,
        *,
        weights: str,
        data: dict[str, str],
        seed: int,
        measured: bool,
        drift: Drift | None = None,
    ) -> Plan:
        """Return the plan with its certificate, sealed."""
        goal = self.goal
        certificate = Certificate(
            risk=goal.risk,
            alpha=goal.alpha,
            delta=None if goal.method == CONFORMAL else goal.delta,
            method=goal.method,  # type: ignore[arg-type]  # Goal has checked it
            n=len(self.parts.test),
            value=self.found.value,
            settings=self.replays.count,
            cost=self.found.cost,
            measured=measured,
            weights=weights,
            data=data,
            seed=seed,
            held_out=self.held_out,
            drift=drift,
        )
        return sealed(Plan(model=model, run=self.run), certificate)


def calibrate(
    trace: Trace,
    way: Way,
    goal: Goal,
    price: Price,
    *,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, all_of: None,
) -> Calibration:
    """Choose thresholds for all exits jointly, and certify the risk of what they do.

    A quarter of the sequences chooses the thresholds to try and orders a path through their
    combinations by risk and predicted cost; half is tested along it; a quarter is looked at once,
    at the end.

    Args:
        trace: one full pass over sequences that are like those to come.
        way: how tokens may leave.
        goal: what is to be certified.
        price: predicts costs, see :func:`pricing`.
        seed: of the split.
        progress: told (settings replayed, settings in all).

    Raises:
        CannotCertifyError: nothing passes; the message says how many more sequences would do.
        UsageError: the trace lacks what is asked for, or the signal says nothing.
    """
    trace = counted(trace)
    count = len(trace.rows)
    must_be_enough(count, goal)
    parts = split(count, seed)
    replays = _replayed(trace, way, parts.order, progress)
    found = certify(replays, parts.order, parts.test, goal, price)
    if found is None:
        raise refusal(replays, parts.order, parts.test, goal, price)
    held_out = HeldOut(
        n=len(parts.held_out),
        risk=float(replays.losses[goal.risk][found.setting][parts.held_out].mean()),
    )
    return Calibration(
        way, goal, parts, replays, found, held_out, run_of(way, replays.thresholds[found.setting])
    )


def verification(
    trace: Trace,
    way: Way,
    goal: Goal,
    price: Price,
    *,
    repeats: int,
    seed: int = 0,
    progress: Iterable[int] | None = None,
) -> Verification:
    """Repeat the procedure on draws of the trace's sequences; settings are the same in all."""
    trace = counted(trace)
    must_be_enough(len(trace.rows), goal)
    replays = _replayed(trace, way, None, lambda done, all_of: None)
    return verify(replays, goal, price, repeats=repeats, seed=seed, progress=progress)


def _replayed(
    trace: Trace,
    way: Way,
    order: np.ndarray | None,
    progress: Callable[[int, int], object],
) -> Replays:
    """Replay the settings whose thresholds come from the sequences of ``order``, or from all."""
    scores = seen(trace, way.signal, way.exits, way.check)
    settings = grid(_of(trace, scores, order), keep_exits=way.keeps_exits)
    done = [0]

    def more(count: int) -> None:
        done[0] += count
        progress(done[0], len(settings))

    return replay_all(
        trace,
        scores,
        way.exits,
        settings,
        max_waiting=way.max_waiting,
        exit_prompt=way.exit_prompt,
        progress=more,
    )


def _of(trace: Trace, scores: Tensor, sequences: np.ndarray | None) -> Tensor:
    if sequences is None:
        return scores
    parts = scores.split(list(trace.rows))
    return torch.cat([parts[i] for i in sequences.tolist()])


def run_of(way: Way, thresholds: Tensor) -> Exit:
    """Return how to run the model at these thresholds ``[E]``; exits of inf are left out."""
    pairs = zip(way.exits, thresholds.tolist(), strict=True)
    return Exit(
        signal=way.signal,
        thresholds={depth: value for depth, value in pairs if not math.isinf(value)},
        max_waiting=way.max_waiting,
        exit_prompt=way.exit_prompt,
        check=way.check,
    )


def overlaps(data: dict[str, str], trained_on: dict[str, str]) -> list[str]:
    """Return the names in ``data`` whose contents the model was tuned on, by SHA-256."""
    known = set(trained_on.values())
    return [name for name, digest in data.items() if digest in known]
