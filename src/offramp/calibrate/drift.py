"""The gap between the text that is certified and the text that is written; and an alarm in use.

A certificate is about text that the full model wrote. A policy writes its own, and its later tokens
stand on its earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch

from offramp.backbone import Backbone
from offramp.calibrate.bounds import Floats
from offramp.calibrate.replays import replay_all
from offramp.calibrate.settings import scores_at
from offramp.certificate import Drift
from offramp.checks import GateFile
from offramp.errors import UsageError
from offramp.plan import execute
from offramp.request import Request
from offramp.runs import Exit
from offramp.trace import Trace, record

_BETS = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
"""Shares of the largest safe bet; wealth is their mean, so none has to be chosen."""


def replayed_losses(
    backbone: Backbone,
    texts: Iterable[tuple[Sequence[int], int]],
    run: Exit,
    risk: str,
    eos: Collection[int] = (),
) -> Floats:
    """Return what a policy loses on each text ``[S]`` that it wrote: one full pass, and a replay.

    For greedy text and ``kv="exact"`` the replay is what the policy did.

    Args:
        backbone: the model.
        texts: (token ids, number of leading ones that are given); each has a counted token.
        run: the policy.
        risk: one of :data:`offramp.calibrate.risks.RISKS` that says something of such text.
        eos: tokens that end a text, which a short head can choose as well.
    """
    exits, gated = run.policy.exits, isinstance(run.check, GateFile)
    trace = record(
        backbone, texts, exits, keep_hidden=gated, check=run.check, head=run.head, ends=eos
    )
    losses: Floats = replay_all(
        trace,
        scores_at(trace, run.signal, exits, run.sees),
        exits,
        torch.tensor([[run.thresholds[depth] for depth in exits]]),
        max_waiting=run.max_waiting,
        exit_prompt=run.exit_prompt,
        own_text=True,
    ).losses[risk][0]
    return losses


def prompts_of(trace: Trace, sequences: Sequence[int]) -> list[tuple[list[int], int]]:
    """Return (the given tokens, the number of tokens after them) of some texts of a trace."""
    parts = trace.ids.split(list(trace.lengths))
    return [(parts[i][: -trace.rows[i]].tolist(), trace.rows[i]) for i in sequences]


def measure(
    backbone: Backbone,
    prompts: Sequence[tuple[list[int], int]],
    full_text: Floats,
    run: Exit,
    risk: str,
    *,
    eos: frozenset[int] = frozenset(),
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda texts: None,
) -> Drift:
    """Let the policy answer the prompts, and compare what it loses there and on the full text.

    Args:
        backbone: the model.
        prompts: (token ids, most new tokens).
        full_text: the policy's loss on the full model's text for the same prompts, ``[S]``.
        run: the policy.
        risk: what is compared; see :func:`replayed_losses`.
        eos: tokens that end a text.
        batch_size: prompts at once.
        progress: told the number of texts that ended.
    """
    texts = write(backbone, prompts, run, eos=eos, batch_size=batch_size, progress=progress)
    own = replayed_losses(backbone, texts, run, risk, eos)
    return Drift(n=len(texts), full_text=float(full_text.mean()), own_text=float(own.mean()))


def write(
    backbone: Backbone,
    prompts: Sequence[tuple[list[int], int]],
    run: Exit,
    *,
    eos: frozenset[int] = frozenset(),
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda texts: None,
) -> list[tuple[list[int], int]]:
    """Return the policy's own greedy text to each prompt: (ids with the prompt, prompt tokens)."""
    requests = [Request(ids, count, eos=eos) for ids, count in prompts]
    texts = [list(ids) for ids, _ in prompts]
    for token in execute(backbone, requests, run, batch_size=batch_size):
        texts[token.index].append(token.id)
        progress(token.finish is not None)
    return [(text, len(ids)) for text, (ids, _) in zip(texts, prompts, strict=True)]


class Monitor:
    """Tells in use when the risk is above alpha: an alarm by betting, valid at any time.

    Feed it the loss of each re-checked text. While every next loss has a mean of at most alpha,
    given those before, the probability that it *ever* alarms is at most delta (Ville's inequality;
    Waudby-Smith and Ramdas 2024; Podkopaev and Ramdas 2022 for models in use).
    """

    def __init__(self, alpha: float, delta: float) -> None:
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not 0 < value < 1:
                raise UsageError(f"{name} must lie between 0 and 1, both excluded, not {value}")
        self.alpha, self.delta = alpha, delta
        self.seen = 0
        self.total = 0.0
        self.most = 1.0
        """The most wealth so far: evidence against "the risk is at most alpha"."""
        self._wealth = np.ones(len(_BETS))

    def update(self, loss: float) -> bool:
        """Take in the loss of one more text, in [0, 1]; return whether there is an alarm.

        Raises:
            UsageError: not a loss.
        """
        if not 0 <= loss <= 1:
            raise UsageError(f"a loss lies in 0 to 1, not {loss}")
        self._wealth *= 1 + _BETS / self.alpha * (loss - self.alpha)
        self.seen += 1
        self.total += loss
        self.most = max(self.most, float(self._wealth.mean()))
        return self.alarm

    @property
    def alarm(self) -> bool:
        """Return whether the evidence has ever reached 1 / delta."""
        return self.most >= 1 / self.delta

    @property
    def rate(self) -> float:
        """Return the mean loss so far; 0 before the first."""
        return self.total / max(self.seen, 1)
