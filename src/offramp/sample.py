"""From logits to tokens: greedy or sampled, reproducibly per request.

Sampling draws by the Gumbel-max trick with noise that depends on the request's seed and the token's
position alone. So a text is a function of its seed, whatever else is in the batch, and a draft that
uses the same noise proposes the very token the full model would draw: sampled speculation gives the
same tokens as plain sampling, not only the same distribution (Daliri et al. 2024, *Coupling without
communication and drafter-invariant speculative decoding*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.errors import UsageError


class Choose(Protocol):
    """Chooses the tokens of consecutive positions of one text."""

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        """Return a token per row: row i of ``logits [n, V]`` continues ``ids[: first + i]``."""


Warp = Callable[[Tensor, Sequence[int], int], Tensor]
"""``(logits [n, V], ids, first) -> logits [n, V]``: everything done to logits before the choice."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are greedy.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Divide the positive (multiply the negative) logits of tokens seen so far (CTRL)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf):
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not (0 < self.repetition_penalty < math.inf):
            raise UsageError(
                f"the repetition penalty must be above 0, not {self.repetition_penalty}"
            )

    def warp(self, logits: Tensor, ids: Sequence[int], first: int) -> Tensor:
        """Return ``logits [n, V]`` after penalty, temperature, top-k and top-p, in that order."""
        logits = logits.float()  # in half precision a penalty would make ties
        if self.repetition_penalty != 1:
            logits = _penalised(logits, ids, first, self.repetition_penalty)
        if self.temperature > 0:
            logits = logits / self.temperature
            if 0 < self.top_k < logits.shape[-1]:
                lowest = logits.topk(self.top_k, -1).values[:, -1:]
                logits = logits.masked_fill(logits < lowest, -math.inf)
            if self.top_p < 1:
                logits = _nucleus(logits, self.top_p)
        return logits

    def chooser(self) -> Choose:
        """Return the function that chooses tokens this way: :func:`largest` where that will do."""
        if self.temperature > 0:
            return gumbel(self.warp, self.seed)
        return largest if self.repetition_penalty == 1 else greedy(self.warp)


def largest(logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
    """Choose the largest logit of each row, and look at no other."""
    return _largest(logits.float())


def greedy(warp: Warp) -> Choose:
    """Return a chooser of the largest logit."""

    def choose(logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        return _largest(warp(logits, ids, first))

    return choose


def gumbel(warp: Warp, seed: int) -> Choose:
    """Return a chooser that samples from the softmax of the warped logits."""

    def choose(logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        warped = warp(logits, ids, first).float()
        noise = torch.stack([_noise(seed, first + i, warped.shape[-1]) for i in range(len(warped))])
        return _largest(warped + noise.to(warped.device))

    return choose


def _largest(scores: Tensor) -> list[int]:
    """Return where each row of ``scores [n, V]`` in fp32 is largest."""
    if scores.device.type == "cpu":  # a tenth of torch's time, which is a layer's
        found: list[int] = scores.numpy().argmax(-1).tolist()
        return found
    return scores.argmax(-1).tolist()


def _noise(seed: int, position: int, size: int) -> Tensor:
    """Return standard Gumbel noise ``[size]`` of one position: -log of unit exponentials."""
    generator = torch.Generator().manual_seed(_mix(seed, position))
    return -torch.empty(size).exponential_(generator=generator).log()


def _mix(seed: int, position: int) -> int:
    """Return 63 well-mixed bits of both (splitmix64's finaliser): neighbours become unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = ((z ^ (z >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return z >> 1


def _penalised(logits: Tensor, ids: Sequence[int], first: int, penalty: float) -> Tensor:
    logits = logits.clone()
    for i, row in enumerate(logits):
        # A short head's logits may end before a token of the prompt: that one cannot be chosen.
        known = sorted(token for token in set(ids[: first + i]) if token < len(row))
        seen = torch.tensor(known, dtype=torch.long, device=row.device)
        values = row[seen]
        row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Remove the least probable tokens whose probabilities sum to at most 1 - top_p."""
    ascending, order = logits.sort(-1)
    remove = torch.softmax(ascending, -1).cumsum(-1) <= 1 - top_p
    remove[:, -1] = False  # the most probable token always stays
    return logits.masked_fill(remove.scatter(-1, order, remove), -math.inf)
