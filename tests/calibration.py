"""Made-up traces for the calibration tests: scores that know something, texts of all lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from offramp.trace import Trace

VOCABULARY = 7


def made_up(
    texts: int, *, exits: Sequence[int] = (2, 4), most: int = 9, seed: int = 0, skill: float = 0.5
) -> Trace:
    """Return a trace of a model of 6 layers; every text is as hard as a die of its own says."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, most + 1, (texts,), generator=g).tolist()
    given = torch.randint(1, 5, (texts,), generator=g).tolist()
    lengths = [a + b for a, b in zip(rows, given, strict=True)]
    total, count = sum(rows), len(exits)
    hard = torch.rand(texts, generator=g).repeat_interleave(torch.tensor(rows))[:, None]
    last = torch.randint(VOCABULARY, (total, 1), generator=g)
    luck = torch.rand(total, count, generator=g)
    wrong = luck < hard * torch.linspace(0.9, 0.4, count)
    chosen = torch.cat([(last + wrong) % VOCABULARY, last], 1).int()
    noise = torch.rand(total, count, generator=g)
    score = skill * (1 - hard) + (1 - skill) * noise
    loss = torch.rand(total, count + 1, generator=g).sort(1, descending=True).values * 2
    ids = torch.randint(VOCABULARY, (sum(lengths),), generator=g).int()
    return Trace(
        exits=tuple(exits),
        num_layers=6,
        fingerprint="made-up",
        ids=ids,
        lengths=tuple(lengths),
        rows=tuple(rows),
        chosen=chosen,
        loss=loss,
        scores={"max_prob": score, "fixed": torch.ones_like(score)},
    )


def altered(trace: Trace, **changes: Any) -> Trace:
    """Return the trace with other fields."""
    fields = {name: value for name, value in trace.__dict__.items() if name != "agrees"}
    return Trace(**{**fields, **changes})
