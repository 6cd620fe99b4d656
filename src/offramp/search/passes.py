"""Texts that any path of layers is run on again and again: its states, its loss, its agreement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Flow, Span, Text
from offramp.errors import OfframpError, UsageError
from offramp.exits import Exits
from offramp.paths import named

_BUDGET = 2**24
"""Logits held at once, in elements (64 MiB in fp32)."""

Texts = Sequence[tuple[Sequence[int], int]]
"""(token ids, how many leading ones are given and not counted) of each text."""


@dataclass(frozen=True)
class Judgement:
    """What a path makes of some texts, teacher-forced."""

    loss: float
    """Mean cross-entropy of the texts' own next tokens, in nats."""
    agreement: float
    """Share of counted tokens on which its choice is the full model's."""


class Passes:
    """Some texts, held open; made by :func:`opened`.

    All texts run as one batch, each layer for all rows at once, and no path leaves anything behind.
    """

    def __init__(self, backbone: Backbone, texts: Texts) -> None:
        self.backbone = backbone
        self.depth = backbone.shape.num_layers
        firsts = [max(given, 1) for _, given in texts]
        self._counts = [len(ids) - first for (ids, _), first in zip(texts, firsts, strict=True)]
        if not texts or min(self._counts) < 1:
            raise UsageError("every text needs a token to predict behind what is given of it")
        if max(len(ids) for ids, _ in texts) > backbone.shape.context:
            raise UsageError(
                f"a text is longer than the {backbone.shape.context} tokens of context"
            )
        # The last token is only predicted.
        self._texts = [Text(list(ids[:-1]), backbone.open()) for ids, _ in texts]
        self._spans = tuple(Span(text, 0, len(text.ids)) for text in self._texts)
        targets = [list(ids[first:]) for (ids, _), first in zip(texts, firsts, strict=True)]
        self._targets = torch.tensor([token for part in targets for token in part])
        self.inputs = backbone.embed(self._spans)
        """``[N, D]``: the inputs of the first layer, for all rows of all texts."""

    def close(self) -> None:
        """Give the slots back."""
        for text in self._texts:
            self.backbone.close(text.slot)

    @property
    def tokens(self) -> int:
        """Return how many tokens are counted."""
        return len(self._targets)

    @property
    def context(self) -> int:
        """Return the mean length of the texts."""
        return sum(map(len, self._spans)) // len(self._spans)

    def run(self, layers: Sequence[int], hidden: Tensor) -> Tensor:
        """Return ``[N, D]``: the states that come out of these layers for states that go in."""
        if layers:
            with self._trimmed():
                return self.backbone.run(layers, hidden, self._spans)
        return hidden

    def states(self, layers: Sequence[int], hidden: Tensor) -> Iterator[Tensor]:
        """Yield the state behind each of these layers in turn."""
        for layer in layers:
            hidden = self.run([layer], hidden)
            yield hidden

    def counted(self, hidden: Tensor) -> Tensor:
        """Return ``[T, D]``: the rows of states that predict a counted token."""
        return self._flow(hidden).tails(self._counts)

    def judge(self, path: Sequence[int], hidden: Tensor) -> Judgement:
        """Judge the states ``[N, D]`` at the end of a path.

        Raises:
            OfframpError: the loss is no number.
        """
        chosen, loss = self._read(path, hidden)
        if not loss.isfinite().all():
            raise OfframpError(
                f"the layers {[*map(named, path)]} give no finite loss on these texts; "
                "try --weights fp32"
            )
        agrees = (chosen == self.full).float().mean().item()
        return Judgement(loss.mean().item(), agrees)

    @cached_property
    def full(self) -> Tensor:
        """Return ``[T]``: what the full model chooses at each counted position."""
        path = range(self.depth)
        return self._read(path, self.run(path, self.inputs))[0]

    def _read(self, path: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return choices and losses ``[T]`` of states at the end of a path."""
        exits = Exits(self.backbone, path, ())
        with self._trimmed():
            rows = exits.states(self._flow(hidden), len(path), self._counts)
        reads = exits.reader(self.backbone.readout, len(path))
        size = max(_BUDGET // self.backbone.shape.vocab_size, 1)
        chosen, loss = [], []
        for part, targets in zip(rows.split(size), self._targets.split(size), strict=True):
            logits = reads(part, len(path)).float().cpu()
            chosen.append(logits.argmax(-1))
            loss.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(chosen), torch.cat(loss)

    def _flow(self, hidden: Tensor) -> Flow:
        return Flow(hidden, self._spans, tuple(range(len(self._spans))))

    @contextmanager
    def _trimmed(self) -> Iterator[None]:
        """Forget all keys and values afterwards: the next path begins where this one did."""
        try:
            yield
        finally:
            for text in self._texts:
                self.backbone.trim(text.slot, 0)


@contextmanager
def opened(backbone: Backbone, texts: Texts) -> Iterator[Passes]:
    """Hold texts open while paths are run on them.

    Raises:
        UsageError: a text is too long, or has nothing to predict.
    """
    passes = Passes(backbone, texts)
    try:
        yield passes
    finally:
        passes.close()
