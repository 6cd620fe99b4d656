"""Plain decoding: one token per text and step, each as deep as the policy wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from offramp.backbone import Backbone
from offramp.policy import FULL, Policy, check_exits
from offramp.probe import Readout
from offramp.request import Pool, Request, Token, Writer
from offramp.step import KV, Outcome, step

MAX_WAITING = 16
"""Tokens of one text that may wait before it runs at full depth: a late drain is a slow one."""


@dataclass(frozen=True)
class Way:
    """How to run a text's tokens: the options of :func:`decode`, under the same names."""

    policy: Policy = FULL
    layers: Sequence[int] | None = None
    kv: KV = "exact"
    look: Readout | None = None
    head: Readout | None = None
    exit_head: Readout | None = None
    max_waiting: int = MAX_WAITING
    exit_prompt: bool = False

    def check(self, num_layers: int) -> None:
        """Refuse exits that the path does not have (UsageError)."""
        depth = num_layers if self.layers is None else len(self.layers)
        short = self.exit_head is not None and self.layers is None  # a path has a head of its own
        check_exits(self.policy.exits, depth, short_head=short)


def decode(
    backbone: Backbone,
    requests: Iterable[Request],
    policy: Policy = FULL,
    *,
    layers: Sequence[int] | None = None,
    kv: KV = "exact",
    look: Readout | None = None,
    head: Readout | None = None,
    exit_head: Readout | None = None,
    max_waiting: int = MAX_WAITING,
    exit_prompt: bool = False,
    batch_size: int = 8,
) -> Iterator[Token]:
    """Yield the new tokens of all requests as they are chosen.

    Args:
        backbone: what runs the layers.
        requests: what to continue; read only when there is room for it.
        policy: where to ask, and whether to leave.
        layers: the path every token runs, all layers by default.
        kv: what becomes of the layers that a leaving token skips.
        look: what a check sees in place of the full head's logits (see :mod:`offramp.checks`).
        head: what chooses the tokens at the end of the path, the backbone's own head by default.
        exit_head: what chooses the token of a row that leaves, likewise.
        max_waiting: a text with so many waiting tokens takes one full-depth step.
        exit_prompt: whether the prompt, too, may leave early (its tokens then wait).
        batch_size: texts at once.
    """
    way = Way(policy, layers, kv, look, head, exit_head, max_waiting, exit_prompt)
    way.check(backbone.shape.num_layers)
    for writers in Pool(backbone, requests, batch_size).rounds():
        yield from advance(backbone, writers, way)


def advance(backbone: Backbone, writers: Sequence[Writer], way: Way) -> Iterator[Token]:
    """Yield one new token of each text, all run the same way."""
    outcome = step(
        backbone,
        [writer.text for writer in writers],
        way.policy,
        layers=way.layers,
        kv=way.kv,
        look=way.look,
        head=way.head,
        exit_head=way.exit_head,
        stay=[
            not way.exit_prompt if writer.reading else writer.text.num_waiting >= way.max_waiting
            for writer in writers
        ],
    )
    yield from written(writers, outcome)


def written(writers: Iterable[Writer], outcome: Outcome) -> Iterator[Token]:
    """Let each text choose its next token by what a step found, and yield it."""
    for writer, logits, depth in zip(writers, outcome.rows, outcome.depths, strict=True):
        [token] = writer.request.choose(logits, writer.text.ids, len(writer.text.ids))
        writer.text.ids.append(token)
        yield writer.emit(token, depth)
