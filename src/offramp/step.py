"""The loop over segments: one step of many texts, each only as deep as its policy wants.

Knows no tokens, sampling or text; whatever decodes calls this and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from offramp.backbone import Backbone
from offramp.batch import Flow, Span, Text
from offramp.exits import Exits, shared
from offramp.policy import FULL, Policy
from offramp.probe import Probe, Readout
from offramp.watch import Watch

KV = Literal["exact", "copy"]


@dataclass(frozen=True)
class Outcome:
    """What one step found, text by text."""

    rows: list[Tensor]
    """``[n, V]`` of each text: the rows asked for (its last, unless ``tails`` says more). After a
    short head V is less: what it does not read is impossible."""
    depths: list[int]
    """Layers that chose each text's last row."""

    @property
    def logits(self) -> Tensor:
        """Return all rows, text after text, ``[R, V]``: a copy, of megabytes for many texts."""
        if len(self.rows) == 1:
            return self.rows[0]
        widest = max(row.shape[1] for row in self.rows)
        return torch.cat([pad(r, (0, widest - r.shape[1]), value=-math.inf) for r in self.rows])


@torch.no_grad()
def step(
    backbone: Backbone,
    texts: Sequence[Text],
    policy: Policy = FULL,
    *,
    layers: Sequence[int] | None = None,
    kv: KV = "exact",
    look: Readout | None = None,
    head: Readout | None = None,
    exit_head: Readout | None = None,
    stay: Sequence[bool] | None = None,
    tails: Sequence[int] | None = None,
    detour: Sequence[int] = (),
) -> Outcome:
    """Run each text's new tokens (``ids[done:]``) as deep as ``policy`` wants.

    A token may leave after the last layer, too, where ``exit_head`` spares it the full head. One
    that leaves earlier *waits* in front of the first layer it did not run (``kv="exact"``) and goes
    on with the next token of its text that gets there, or has its state copied into every deeper
    layer's keys and values (``kv="copy"``).

    Every token that passes an exit of the policy that owns a block, or ends there, fills the block;
    a text must have been so from its first step on, else it cannot be asked there (UsageError).

    Args:
        backbone: what runs the layers.
        texts: the texts, each with at least one new token.
        policy: where to ask, and whether to leave.
        layers: the path to run, ascending layer indices; all by default. Depths count along it.
        kv: what becomes of the layers that a leaving token skips.
        look: what a check sees in place of the full head's logits.
        head: what reads out the end of the path, the backbone's own head by default.
        exit_head: what chooses the tokens of rows that leave, the backbone's own head by default;
            without ``look``, checks see it, too.
        stay: the texts that run to the end of the path whatever the policy says.
        tails: how many of the last rows of each text to read out at full depth; 1 by default.
        detour: layers a leaving token runs on for its choice alone (a draft that skips layers);
            the caller trims the keys and values it leaves there.

    Whatever is raised on the way, Ctrl-C included, leaves every text as it was before the step:
    the caller may drop one and go on with the others.
    """
    with all_or_nothing(backbone, texts):
        path = range(backbone.shape.num_layers) if layers is None else layers
        exits = Exits(backbone, path, () if detour else policy.exits)
        exits.keep(texts)
        spans = tuple(Span(text, text.done, len(text.ids)) for text in texts)
        flow = Flow(backbone.embed(spans), spans, tuple(range(len(texts))))
        for text in texts:
            text.done = len(text.ids)
        backbone.meter.tally.steps += 1
        counts = [1] * len(texts) if tails is None else list(tails)
        chosen: list[tuple[tuple[int, ...], Probe]] = []  # who left, and what they looked like
        probe: Probe | None = None
        stop = 0
        while flow.spans and stop < len(path):
            flow = flow.drain(path[stop])
            asks = [stay is None or not stay[m] for m in flow.members]
            asking = [i for i, one in enumerate(asks) if one]
            asked_at = policy.exits if asking else ()
            cuts = _cuts(path, stop, asked_at, exits.own(asked_at), flow)
            sees = exit_head if look is None else look
            blocks = [exits.blocks.get(depth) for depth in cuts[1:-1]]
            watch = Watch(policy.bars, sees, flow.last(asking), cuts[1:-1], blocks)
            ran = backbone.run_until(
                [path[a:b] for a, b in pairwise(cuts)], flow.hidden, flow.spans, watch
            )
            stop, at_exit = cuts[ran.segments], cuts[ran.segments] in policy.exits
            if asking:  # whatever lies between two segments is an exit
                backbone.meter.tally.asks += ran.segments - 1 + at_exit
            flow = Flow(ran.hidden, flow.spans, flow.members)
            if not at_exit:
                continue
            rows = ran.made
            if rows is None:
                rows = exits.states(flow, stop, [int(one) for one in asks])
            if not asking:
                continue
            asked = flow.select(asking)
            chooses = exit_head or backbone.readout
            reads = exits.reader(chooses, stop)
            looks = None if sees in (None, chooses) else exits.reader(sees, stop)
            probe = Probe(stop, len(path), rows, reads, previous=probe, look=looks)
            if ran.seen is not None:
                probe.show(ran.seen)
            leaving, staying = _split(policy.leave(probe))
            if leaving:
                gone = asked.select(leaving)
                taken = probe.take(leaving) if staying else probe
                chosen.append((gone.members, _choice(backbone, taken, gone, detour, exit_head)))
                if stop < len(path):
                    _leave(backbone, gone, [*path[stop:], *exits.deeper(stop)], kv)
                left = set(gone.members)
                flow = flow.select(i for i, member in enumerate(flow.members) if member not in left)
                probe = probe.take(staying) if staying else None
        if flow.spans:
            rows = exits.states(flow, len(path), [counts[member] for member in flow.members])
            reads = exits.reader(head or backbone.readout, len(path))
            last = Probe(len(path), len(path), rows, reads)
            chosen.append((flow.members, last))
        return _collect(chosen, counts)


@contextmanager
def all_or_nothing(backbone: Backbone, texts: Sequence[Text]) -> Iterator[None]:
    """Put every text back, whatever is raised: its tokens, its queues, its keys and values."""
    kept = [(text.done, dict(text.waiting), text.blocks) for text in texts]
    try:
        yield
    except BaseException:
        for text, (done, waiting, blocks) in zip(texts, kept, strict=True):
            text.done, text.waiting, text.blocks = done, waiting, blocks
            _rewind(backbone, text)
        raise


def _rewind(backbone: Backbone, text: Text) -> None:
    """Trim keys and values to what the text's queues say each layer holds."""
    length = text.done
    backbone.trim(text.slot, length)
    for layer in sorted(text.waiting):
        length -= len(text.waiting[layer])
        backbone.trim(text.slot, length, first_layer=layer)


def _cuts(
    path: Sequence[int], start: int, exits: Sequence[int], own: Iterable[int], flow: Flow
) -> list[int]:
    """Cut the path from ``start`` at every exit, up to where the run must end.

    That is where a token waits to go on, at an exit with a readout of its own, or the path's end.
    """
    ends = [path.index(layer) for span in flow.spans for layer in span.text.waiting]
    ends += [stop for stop in own if stop > start]
    end = min(ends, default=len(path))
    return [start, *(stop for stop in exits if start < stop < end), end]


def _split(leave: Tensor) -> tuple[list[int], list[int]]:
    """Return the indices that leave and those that stay: the one host read of an exit."""
    mask = leave.tolist()
    return [i for i, out in enumerate(mask) if out], [i for i, out in enumerate(mask) if not out]


def _choice(
    backbone: Backbone, probe: Probe, gone: Flow, detour: Sequence[int], head: Readout | None
) -> Probe:
    """Return what chooses the tokens of the rows that leave."""
    if not detour:
        return probe
    hidden = backbone.run(detour, gone.hidden, gone.spans)
    reads = shared(backbone, head or backbone.readout)
    return Probe(probe.depth + len(detour), probe.num_layers, hidden, reads)


def _leave(backbone: Backbone, gone: Flow, skipped: Sequence[int], kv: KV) -> None:
    if kv == "copy":
        backbone.fill(skipped, gone.hidden, gone.spans)
        return
    for span, rows in zip(gone.spans, gone.rows(), strict=True):
        span.text.wait(skipped[0], rows)


def _collect(chosen: list[tuple[tuple[int, ...], Probe]], counts: list[int]) -> Outcome:
    """Give each text its rows, and read out those that have no logits yet.

    If none has, and one head reads all, rows of every depth share one pass over it.
    """
    probes = [probe for _, probe in chosen]
    last = probes[-1]
    if len(probes) == 1 or any(p.is_read or p.readout != last.readout for p in probes):
        parts = [probe.logits for probe in probes]
    else:
        together = replace(last, hidden=torch.cat([probe.rows for probe in probes]))
        parts = list(together.logits.split([len(probe.rows) for probe in probes]))
    found: dict[int, tuple[Tensor, int]] = {}
    for (members, probe), part in zip(chosen, parts, strict=True):
        # A text that left has one row; one that ran to the end has as many as were asked for.
        ended = probe.depth == probe.num_layers
        sizes = [counts[member] if ended else 1 for member in members]
        split = part.split(sizes) if len(members) > 1 else (part,)
        for member, rows in zip(members, split, strict=True):
            found[member] = rows, probe.depth
    ordered = [found[member] for member in sorted(found)]
    return Outcome([rows for rows, _ in ordered], [depth for _, depth in ordered])
