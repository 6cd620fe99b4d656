"""Lossless self-speculation: draft by leaving early, verify by draining.

A drafted token waits at the exit like any token that left. One full-depth step then drains all
waiting tokens and gives the full model's logits for each: nothing is computed twice, and there is
no second cache. The tokens are those of plain decoding at full depth, whatever the draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import UsageError
from offramp.paths import check_parts, layer_of, named
from offramp.policy import FULL, Policy, fixed
from offramp.probe import Readout
from offramp.request import Pool, Request, Token, Writer
from offramp.step import step


@dataclass(frozen=True)
class Draft:
    """How to propose tokens: the layers to run, and how many tokens at most.

    The first layers that the draft shares with the full model are reused in verification; those
    after the first skipped layer run on a state of the draft's own and are forgotten.
    """

    layers: tuple[int, ...]
    tokens: int = 4
    min_confidence: float = 0.0
    """Stop drafting after a token to which the draft gives less than this probability."""

    @cached_property
    def shared(self) -> int:
        """Return how many leading layers the draft runs exactly as the full model does."""
        return next((i for i, layer in enumerate(self.layers) if layer != i), len(self.layers))

    @cached_property
    def policy(self) -> Policy:
        """Return where a drafted token leaves."""
        return fixed(self.shared)

    @property
    def kept(self) -> Policy:
        """Return whose exits a confirming step passes: a block there needs every token's keys."""
        return self.policy if self.shared == len(self.layers) else FULL

    def check(self, num_layers: int) -> None:
        """Refuse a draft that the model cannot make.

        Raises:
            UsageError: layers out of order or out of range, all of them, or no first layer.
        """
        layers = self.layers
        if not layers or layers[0] != 0 or any(b <= a for a, b in pairwise(map(layer_of, layers))):
            raise UsageError(
                f"a draft runs ascending layers from layer 0, not {[*map(named, layers)]}"
            )
        if layers[-1] < 0 or layer_of(layers[-1]) >= num_layers or layers == (*range(num_layers),):
            raise UsageError(
                f"a draft runs some but not all of the {num_layers} layers, not {len(layers)} of "
                f"them up to layer {named(layers[-1])}"
            )
        check_parts(layers, num_layers)
        if self.tokens < 1:
            raise UsageError(f"a draft proposes 1 token or more, not {self.tokens}")
        if not 0 <= self.min_confidence <= 1:
            raise UsageError(f"a confidence lies between 0 and 1, not at {self.min_confidence}")


@dataclass(frozen=True)
class Round:
    """What one round of drafts and their confirmation did."""

    draft: Draft | None
    """How it drafted; None for a plain step."""
    texts: int
    reading: int
    """Texts that read their prompt in it."""
    confirmed: Sequence[tuple[int, int]]
    """(tokens drafted, tokens confirmed) of each text."""
    seconds: float


class Chooser(Protocol):
    """Chooses how each round drafts; see :mod:`offramp.control`."""

    @property
    def drafts(self) -> tuple[Draft, ...]:
        """Return what it chooses from, beside plain decoding."""

    @property
    def clock(self) -> Callable[[], float]:
        """Return what tells seconds, from any moment."""

    def choose(self, texts: int, reading: int) -> Draft | None:
        """Return the draft for the next round of so many texts, of which some read their prompt."""

    def learn(self, done: Round) -> None:
        """Hear what the round did."""


class Always:
    """The same draft in every round."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, draft: Draft) -> None:
        self.drafts = (draft,)

    def choose(self, texts: int, reading: int) -> Draft | None:
        """Return the draft."""
        return self.drafts[0]

    def learn(self, done: Round) -> None:
        """Learn nothing."""


def speculate(
    backbone: Backbone,
    requests: Iterable[Request],
    draft: Draft | Chooser,
    *,
    head: Readout | None = None,
    batch_size: int = 8,
) -> Iterator[Token]:
    """Yield the full model's tokens, several per full-depth step where the draft was right.

    Args:
        backbone: what runs the layers.
        requests: what to continue; read only when there is room for it.
        draft: how to propose tokens; or what chooses that anew in each round.
        head: what chooses the drafted tokens, the backbone's own head by default; one that is
            short makes a draft cheaper, and what confirms it is the full head in any case.
        batch_size: texts at once; each drafts and is confirmed at its own pace.
    """
    chooser = Always(draft) if isinstance(draft, Draft) else draft
    for candidate in chooser.drafts:
        candidate.check(backbone.shape.num_layers)
    kept = _kept(backbone, chooser.drafts)
    for writers in Pool(backbone, requests, batch_size).rounds():
        begin, reading = chooser.clock(), sum(writer.reading for writer in writers)
        now = chooser.choose(len(writers), reading)
        found = _round(backbone, writers, now, head, kept)
        seconds = chooser.clock() - begin
        confirmed = [(one.drafted, len(one.tokens) - 1) for one in found]
        chooser.learn(Round(now, len(writers), reading, confirmed, seconds))
        for writer, one in zip(writers, found, strict=True):
            for token, accepted in one.tokens:
                if writer.finished:
                    break
                yield writer.emit(token, backbone.shape.num_layers, accepted=accepted)


@dataclass(frozen=True)
class _Written:
    """What a round adds to one text."""

    drafted: int
    tokens: list[tuple[int, bool]]
    """Each new token, and whether the draft had proposed it: all but the last one."""


def _kept(backbone: Backbone, drafts: Sequence[Draft]) -> Policy:
    """Return whose exits every full-depth step passes: those of a draft whose exit owns a block."""
    owning = [one.kept for one in drafts if backbone.blocks.keys() & {*one.kept.exits}]
    return owning[0] if owning else FULL


def _round(
    backbone: Backbone,
    writers: list[Writer],
    draft: Draft | None,
    head: Readout | None,
    kept: Policy,
) -> list[_Written]:
    """Draft, if at all, and let the full model confirm; nothing is emitted yet."""
    known = [len(writer.text.ids) for writer in writers]
    if draft is not None:
        _propose(backbone, [writer for writer in writers if not writer.reading], draft, head)
    counts = [len(w.text.ids) - n for w, n in zip(writers, known, strict=True)]
    outcome = step(
        backbone,
        [writer.text for writer in writers],
        kept,
        stay=[True] * len(writers),
        tails=[count + 1 for count in counts],
    )
    backbone.meter.drafted += sum(counts)
    return [
        _Written(count, _confirm(backbone, writer, logits, start))
        for writer, logits, start, count in zip(writers, outcome.rows, known, counts, strict=True)
    ]


def _propose(backbone: Backbone, writers: list[Writer], draft: Draft, head: Readout | None) -> None:
    """Append up to ``draft.tokens`` tokens to each text; all of them wait for the full model."""
    known = {id(writer): len(writer.text.ids) for writer in writers}
    drafting = writers
    for count in range(1, draft.tokens + 1):
        # The full model always adds one token of its own: never draft the last one.
        drafting = [writer for writer in drafting if writer.room > count]
        if not drafting:
            break
        outcome = step(
            backbone,
            [writer.text for writer in drafting],
            draft.policy,
            exit_head=head,
            detour=draft.layers[draft.shared :],
        )
        going = []
        for writer, logits in zip(drafting, outcome.rows, strict=True):
            ids = writer.text.ids
            [token] = writer.request.choose(logits, ids, len(ids))
            ids.append(token)
            if token not in writer.request.eos and _confident(logits, token, draft.min_confidence):
                going.append(writer)
        drafting = going
    if draft.shared < len(draft.layers):
        for writer in writers:  # what the detour left behind is not the full model's
            backbone.trim(writer.text.slot, known[id(writer)] - 1, first_layer=draft.shared)


def _confident(logits: Tensor, token: int, threshold: float) -> bool:
    if threshold == 0:
        return True
    return torch.softmax(logits[0].float(), -1)[token].item() >= threshold


def _confirm(
    backbone: Backbone, writer: Writer, logits: Tensor, start: int
) -> list[tuple[int, bool]]:
    """Keep the proposals that the full model makes too, and add its own next token."""
    text = writer.text
    drafted = text.ids[start:]
    choices = writer.request.choose(logits, text.ids, start)
    right = 0
    while right < len(drafted) and drafted[right] == choices[right]:
        right += 1
    if right < len(drafted):
        text.trim(start + right)
        backbone.trim(text.slot, start + right)
    text.ids.append(choices[right])
    backbone.meter.accepted += right
    return [(token, True) for token in drafted[:right]] + [(choices[right], False)]
