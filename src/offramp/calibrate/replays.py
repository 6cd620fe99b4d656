"""Replays thousands of joint threshold settings on one trace at once, as exactly as ``replay``.

The unit is the sequence: what comes out is one loss per setting and sequence, and how many of its
tokens leave at each exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.calibrate.bounds import Floats
from offramp.calibrate.risks import RISKS
from offramp.decode import MAX_WAITING
from offramp.trace import Trace

_BUDGET = 2**24
"""Tokens times settings at once."""


@dataclass(frozen=True)
class Replays:
    """What M settings would have done to S sequences."""

    exits: tuple[int, ...]
    thresholds: Tensor
    """``[M, E]``: lowest score that leaves; inf for never."""
    losses: dict[str, Floats]
    """By risk, ``[M, S]`` in [0, 1]."""
    left: NDArray[np.float32]
    """``[M, E, S]``: tokens that leave at each exit."""
    rows: NDArray[np.int64]
    """``[S]``: tokens of each sequence."""

    def shares(self, sequences: NDArray[np.int64]) -> Floats:
        """Return ``[M, E]``: the share of these sequences' tokens that leaves at each exit."""
        counted = np.bincount(sequences, minlength=len(self.rows)).astype(np.float32)
        left = (self.left @ counted).astype(np.float64)
        share: Floats = left / float(counted @ self.rows)
        return share

    @property
    def count(self) -> int:
        """Return how many settings there are."""
        return len(self.thresholds)


def replay_all(
    trace: Trace,
    scores: Tensor,
    exits: tuple[int, ...],
    thresholds: Tensor,
    *,
    max_waiting: int = MAX_WAITING,
    exit_prompt: bool = False,
    own_text: bool = False,
    progress: Callable[[int], object] = lambda settings: None,
) -> Replays:
    """Replay every setting on every sequence of a trace, ``kv="exact"``.

    Args:
        trace: the full pass; every text of it has a counted row.
        scores: ``[T, E]``, the signal at these exits.
        exits: depths among the trace's.
        thresholds: ``[M, E]`` fp32, lowest scores that leave.
        max_waiting: as in :func:`offramp.decode.decode`.
        exit_prompt: likewise.
        own_text: whether the policy wrote the texts, and not the full model; risks that say nothing
            of such text are then left out.
        progress: told the number of settings done after every chunk.
    """
    picked = [*(trace.exits.index(depth) for depth in exits), len(trace.exits)]
    judged = {name: risk.own if own_text else risk.table for name, risk in RISKS.items()}
    tables = {name: table(trace)[:, picked] for name, table in judged.items() if table is not None}
    sequence = torch.repeat_interleave(torch.tensor(trace.rows))
    rows = torch.tensor(trace.rows)
    size = max(_BUDGET // len(scores), 1)
    losses: dict[str, list[Tensor]] = {name: [] for name in tables}
    left = []
    for some in thresholds.split(size):
        columns = _bounded(_wanted(scores, some), exits, trace, max_waiting, exit_prompt)

        def per_sequence(values: Tensor) -> Tensor:
            total = torch.zeros(len(rows), values.shape[1])
            return total.index_add_(0, sequence, values)

        went = [(columns == k).float() for k in range(len(picked))]
        left.append(torch.stack([per_sequence(w).T for w in went[:-1]], 1))
        for name, table in tables.items():
            total = sum(per_sequence(w * table[:, k, None]) for k, w in enumerate(went))
            lost = RISKS[name].per_sequence(torch.as_tensor(total), rows[:, None])
            losses[name].append(lost.T)
        progress(len(some))
    return Replays(
        exits,
        thresholds,
        {name: torch.cat(parts).double().numpy() for name, parts in losses.items()},
        torch.cat(left).numpy(),
        rows.numpy(),
    )


def _wanted(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Return ``[T, M]`` uint8: the first exit whose threshold is reached, else the last column."""
    exits = scores.shape[1]
    wanted = torch.full((len(scores), len(thresholds)), exits, dtype=torch.uint8)
    for k in reversed(range(exits)):
        wanted.masked_fill_(scores[:, k, None] >= thresholds[None, :, k], k)
    return wanted


def _bounded(
    wanted: Tensor, exits: tuple[int, ...], trace: Trace, max_waiting: int, exit_prompt: bool
) -> Tensor:
    """Return the columns ``[T, M]`` after the loop's own two rules, in place.

    Prompts stay, and queues are bounded: ``trace._bounded`` for many settings at once.
    """
    full = len(exits)
    ran_all = full - (exits[-1] == trace.num_layers)  # from this column on, all layers were run
    first = torch.tensor(trace.lengths) - torch.tensor(trace.rows)  # with row 0 the prompt waits
    waiting = torch.zeros(len(trace.rows), wanted.shape[1], dtype=torch.int32)
    for t, (active, index) in enumerate(_positions(trace.rows)):
        column, queue = wanted[index], waiting[active]
        stays = queue >= max_waiting
        if t == 0 and not exit_prompt:
            stays.fill_(value=True)
        column.masked_fill_(stays, full)
        queue += first[active, None] if t == 0 else 1
        waiting[active] = queue.masked_fill_(column >= ran_all, 0)
        wanted[index] = column
    return wanted


def _positions(rows: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for the t-th counted row of every text that has one, (its texts, its row numbers)."""
    counts = torch.tensor(rows)
    starts = counts.cumsum(0) - counts
    for t in range(max(rows)):
        active = (counts > t).nonzero()[:, 0]
        yield active, starts[active] + t
