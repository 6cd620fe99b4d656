"""The whole procedure on one trace: settings, replays, certificate, held-out look, plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from offramp.calibrate.certify import (
    CONFORMAL,
    Found,
    Goal,
    Indices,
    Parts,
    certify,
    must_be_enough,
    refusal,
    split,
)
from offramp.calibrate.replays import Replays, replay_all
from offramp.calibrate.settings import (
    MOST_EXITS,
    Price,
    costs,
    grid,
    refined,
    safe_to_cheap,
    seen,
)
from offramp.calibrate.texts import counted
from offramp.calibrate.verify import Verification, verify
from offramp.certificate import Certificate, Drift, HeldOut
from offramp.checks import FULL_HEAD, Check, GateFile, Head
from offramp.decode import MAX_WAITING
from offramp.errors import UsageError
from offramp.gate import load_gate
from offramp.plan import ModelId, Plan, sealed
from offramp.runs import Exit
from offramp.signals import find
from offramp.trace import Trace


@dataclass(frozen=True)
class Way:
    """How tokens may leave; thresholds are what calibration finds."""

    exits: tuple[int, ...]
    signal: str = "max_prob"
    check: Check = FULL_HEAD
    head: Head = FULL_HEAD
    """What chooses the token of a row that leaves."""
    max_waiting: int = MAX_WAITING
    exit_prompt: bool = False

    @property
    def keeps_exits(self) -> bool:
        """Return whether no exit may be dropped, as the signal compares it with the next."""
        return not isinstance(self.check, GateFile) and find(self.signal).looks_back

    def scores(self, trace: Trace) -> Tensor:
        """Return what thresholds are on, ``[T, E]`` fp32, as the loop would see it.

        Raises:
            UsageError: the trace lacks what this way asks for, or another head chose in it.
        """
        trace.must_choose_by(self.head)
        return seen(trace, self.signal, self.exits, self.check)


def _named(check: Check) -> Check:
    """Return the check as a certificate can stand for it: gates by their digest, not by a path."""
    if not isinstance(check, GateFile):
        return check
    return check.model_copy(update={"digest": load_gate(Path(check.file), check.digest).digest})


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


@dataclass(frozen=True)
class Calibration:
    """What calibration found on one trace."""

    way: Way
    goal: Goal
    parts: Parts
    tried: int
    """Joint settings that were replayed."""
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
            risk=goal.risk,  # type: ignore[arg-type]  # Goal has checked both
            alpha=goal.alpha,
            delta=None if goal.method == CONFORMAL else goal.delta,
            method=goal.method,  # type: ignore[arg-type]
            n=len(self.parts.test),
            value=self.found.value,
            settings=self.tried,
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
        price: predicts costs, see :func:`offramp.calibrate.settings.pricing`.
        seed: of the split.
        progress: told (settings replayed, settings in all).

    Raises:
        CannotCertifyError: nothing passes; the message says how many more sequences would do.
        UsageError: the trace lacks what is asked for, or the signal says nothing.
    """
    trace = counted(trace)
    count = len(trace.rows)
    must_be_enough(count, goal)
    way = replace(way, check=_named(way.check))
    parts = split(count, seed)
    tried, settings = candidates(trace, way, goal.risk, price, order=parts.order)
    replays = replay_settings(trace, way, settings, progress)
    cost = costs(replays, parts.order, price)
    found = certify(replays, cost, parts.order, parts.test, goal)
    if found is None:
        raise refusal(replays, cost, parts.order, parts.test, goal)
    held_out = HeldOut(
        n=len(parts.held_out),
        risk=float(replays.losses[goal.risk][found.setting][parts.held_out].mean()),
    )
    return Calibration(
        way=way,
        goal=goal,
        parts=parts,
        tried=tried,
        replays=replays,
        found=found,
        held_out=held_out,
        run=run_of(way, replays.thresholds[found.setting]),
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
    _, settings = candidates(trace, way, goal.risk, price)
    replays = replay_settings(trace, way, settings)
    [done] = verify(replays, [(goal, None)], price, repeats=repeats, seed=seed, progress=progress)
    return done


def candidates(
    trace: Trace, way: Way, risk: str, price: Price, *, order: Indices | None = None
) -> tuple[int, Tensor]:
    """Return (how many settings were tried, the thresholds ``[M, E]`` that are worth a test).

    A grid is replayed on the sequences of ``order`` (all by default), and its path from safe to
    cheap is refined: nothing that is tested later has been looked at.
    """
    whole = len(trace.rows) if order is None else len(order)
    way.scores(trace)  # refuses what the whole trace lacks
    part = trace if order is None else trace.part(order.tolist())
    scores = way.scores(part)
    coarse = replay_settings(part, way, grid(scores, keep_exits=way.keeps_exits))
    every = np.arange(whole)
    path = safe_to_cheap(coarse.losses[risk].mean(-1), costs(coarse, every, price))
    settings = refined(coarse.thresholds[path], scores)
    return coarse.count + len(settings), settings


def replay_settings(
    trace: Trace,
    way: Way,
    settings: Tensor,
    progress: Callable[[int, int], object] = lambda done, all_of: None,
) -> Replays:
    """Replay settings ``[M, E]`` on all of a trace; progress is told (done, of all)."""
    done = [0]

    def more(count: int) -> None:
        done[0] += count
        progress(done[0], len(settings))

    return replay_all(
        trace,
        way.scores(trace),
        way.exits,
        settings,
        max_waiting=way.max_waiting,
        exit_prompt=way.exit_prompt,
        progress=more,
    )


def run_of(way: Way, thresholds: Tensor) -> Exit:
    """Return how to run the model at these thresholds ``[E]``; exits of inf are left out."""
    pairs = zip(way.exits, thresholds.tolist(), strict=True)
    return Exit(
        signal=way.signal,
        thresholds={depth: value for depth, value in pairs if not math.isinf(value)},
        max_waiting=way.max_waiting,
        exit_prompt=way.exit_prompt,
        check=way.check,
        head=way.head,
    )
