"""Which joint threshold settings are tried, and the path through them from safe to cheap.

Neither looks at the sequences that the test will look at: a path chosen after seeing them would
make every p-value on it too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.backbone import Shape
from offramp.calibrate.bounds import Floats
from offramp.calibrate.replays import Replays
from offramp.checks import FULL_HEAD, Check, GateFile, Head
from offramp.cost import exit_ratio
from offramp.errors import UsageError
from offramp.gate import load_gate
from offramp.plan import reading
from offramp.policy import check_exits
from offramp.signals import find
from offramp.timing import Constants
from offramp.trace import Trace

_SETTINGS = 1024
"""At least so many joint settings, the one that never leaves among them."""
_BETWEEN = 4
MOST_EXITS = 6
"""With more, few thresholds per exit would be left."""

Price = Callable[[Sequence[int], Sequence[float]], float]
"""``(exits, shares that leave there) -> predicted cost per token``, full depth = 1."""


def pricing(
    shape: Shape,
    check: Check,
    trace: Trace,
    constants: Constants | None,
    head: Head = FULL_HEAD,
) -> Price:
    """Return what predicts the cost of leaving: time by constants, without them weights read."""
    asking, choosing = reading(check, head, shape)
    context = sum(trace.lengths) // len(trace.lengths)

    def price(exits: Sequence[int], shares: Sequence[float]) -> float:
        return exit_ratio(shape, exits, shares, constants, context, check=asking, choose=choosing)

    return price


def seen(trace: Trace, signal: str, exits: Sequence[int], check: Check) -> Tensor:
    """Return the signal at these exits, ``[T, E]`` fp32, as the loop would see it.

    Raises:
        UsageError: exits, a check or a signal that the trace lacks, or a signal that tells nothing:
            NaN, or the same for every token.
    """
    check_exits(exits, trace.num_layers, short_head=trace.head != str(FULL_HEAD))
    missing = [depth for depth in exits if depth not in trace.exits]
    if missing or not exits:
        raise UsageError(
            f"the trace has exits {list(trace.exits)}, and lacks {missing}: name some of them with "
            "--exits, or record it at those"
        )
    if len(exits) > MOST_EXITS:
        raise UsageError(
            f"{len(exits)} exits are too many to set jointly; name up to {MOST_EXITS} with --exits"
        )
    scores = scores_at(trace, signal, exits, check)
    if scores.isnan().any():
        raise UsageError(
            f"the signal {signal} is NaN on {int(scores.isnan().any(1).sum())} tokens of the "
            "trace, so nothing can be said of them; look at the model's precision"
        )
    if bool((scores == scores[:1]).all()):
        raise UsageError(
            f"the signal {signal} is the same for every token, so no threshold tells them apart; "
            "choose another signal, or run a sub-model (generate --exit)"
        )
    return scores


def scores_at(trace: Trace, signal: str, exits: Sequence[int], check: Check) -> Tensor:
    """Return the signal at some of the trace's exits, ``[T, E]`` fp32, whatever it says.

    Raises:
        UsageError: a check, a signal or gates that the trace has no scores for.
    """
    columns = [trace.exits.index(depth) for depth in exits]
    if isinstance(check, GateFile):
        return _gated(trace, columns, check)
    if str(check) != trace.check:
        raise UsageError(
            f"the trace's scores were seen by the check {trace.check}, not {check}; record it with "
            "this check"
        )
    looks_back = find(signal).looks_back
    if signal not in trace.scores:
        raise UsageError(f"the trace has no signal {signal!r}; record it again")
    if looks_back and columns != list(range(len(columns))):
        raise UsageError(
            f"{signal} compares neighbouring exits: take the trace's first ones, or record it at "
            "these alone"
        )
    return trace.scores[signal][:, columns].float()


def _gated(trace: Trace, columns: list[int], check: GateFile) -> Tensor:
    gates = load_gate(Path(check.file), check.digest)
    depths = [trace.exits[column] for column in columns]
    unknown = [depth for depth in depths if depth not in gates.exits]
    if unknown or trace.hidden is None or gates.fingerprint != trace.fingerprint:
        raise UsageError(
            f"the gates in {check.file} do not fit: they need a trace of their model with "
            f"keep_hidden=True at exits of {list(gates.exits)}"
        )
    pairs = zip(columns, depths, strict=True)
    return torch.stack([gates.score(trace.hidden[:, c], depth) for c, depth in pairs], 1)


def grid(scores: Tensor, *, keep_exits: bool = False) -> Tensor:
    """Return joint settings, ``[M, E]`` fp32: all combinations of some thresholds per exit.

    An exit's thresholds are such that 1/G^2, 4/G^2, ... 1 of the rows ``[T, E]`` reach them (finer
    where few leave), and inf, never; the setting that never leaves is left out. More than 1,000 in
    all, unless the signal takes few values.

    Args:
        scores: the signal on sequences that order the path.
        keep_exits: no exit may be dropped (the signal compares it with the next): "never" is then
            the highest score seen.
    """
    exits = scores.shape[1]
    levels = math.ceil(_SETTINGS ** (1 / exits)) - 1
    finer = 1 if exits == 1 else 2  # one exit has thresholds enough
    shares = 1 - (torch.arange(1, levels + 1) / levels) ** finer
    columns = []
    for k in range(exits):
        ranks = (shares * (len(scores) - 1)).round().long()
        values = scores[:, k].sort().values[ranks].unique()
        never = torch.tensor([torch.inf])
        columns.append(values if keep_exits else torch.cat([values, never]))
    settings = torch.cartesian_prod(*columns).reshape(-1, exits)
    kept: Tensor = settings[~settings.isinf().all(1)]
    return kept


def refined(path: Tensor, scores: Tensor) -> Tensor:
    """Return the settings of a path ``[K, E]`` and more between neighbours, ``[M, E]``.

    Three more between two, evenly by how many of the rows ``[T, E]`` reach an exit's threshold:
    a coarse grid's path would jump over the risk that is asked for.
    """
    ordered = torch.cat([scores.sort(0).values, torch.full((1, scores.shape[1]), torch.inf)])
    ranks = torch.stack(
        [
            torch.searchsorted(column.contiguous(), values.contiguous())
            for column, values in zip(ordered.T, path.T, strict=True)
        ],
        1,
    ).double()
    steps = torch.arange(_BETWEEN)[:, None, None] / _BETWEEN
    between = (ranks[:-1] * (1 - steps) + ranks[1:] * steps).reshape(-1, scores.shape[1])
    settings = ordered.gather(0, torch.cat([between, ranks[-1:]]).round().long()).unique(dim=0)
    kept: Tensor = settings[~settings.isinf().all(1)]
    return kept


def costs(replays: Replays, sequences: NDArray[np.int64], price: Price) -> Floats:
    """Return the predicted cost of every setting on these sequences, ``[M]``; full depth = 1."""
    shares = replays.shares(sequences)
    used = ~replays.thresholds.isinf().numpy()
    exits = np.array(replays.exits)
    return np.array(
        [
            price(exits[mask].tolist(), share[mask].tolist())
            for mask, share in zip(used, shares, strict=True)
        ]
    )


def safe_to_cheap(risk: Floats, cost: Floats) -> NDArray[np.int64]:
    """Return the path: indices of settings by rising risk, each cheaper than all before it.

    Settings of equal risk come dearest first, so the path starts as safely as it can.
    """
    order = np.lexsort((-cost, risk))
    before = np.concatenate([[np.inf], np.minimum.accumulate(cost[order])[:-1]])
    path: NDArray[np.int64] = order[cost[order] < before]
    return path
