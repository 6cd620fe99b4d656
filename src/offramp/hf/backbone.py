"""The reference backbone: any Hugging Face causal LM, run by its own modules.

Texts that bring the same number of new rows run together as one left-padded batch; no padding row
is ever computed. A family that cannot take padded keys runs text by text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.backbone import Shape, from_layer, must_halve
from offramp.batch import Span, Text
from offramp.hf.adapter import Adapter, Prepared
from offramp.hf.cache import (
    FilledError,
    GroupLayer,
    LayerStore,
    Slot,
    group_cache,
    padding_mask,
)
from offramp.hf.halves import Halves
from offramp.hf.heads import HeadPlace
from offramp.hf.own import Own, standing_in
from offramp.meter import Meter
from offramp.paths import ATTENTION, MLP, is_whole, layer_of
from offramp.probe import Readout
from offramp.readouts import ExitReadout
from offramp.watch import Ran, Watch

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Of two halves to the whole layer, as a share of the largest state; half precisions get 5e-2."""
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class _Group:
    """Texts that run together: which spans of the step, and what the model prepared for them."""

    members: list[int]
    prepared: Prepared
    blocks: list[Prepared]
    """The same for each block that an exit owns: its call is the last layer's."""


class HFBackbone:
    """A :class:`~offramp.backbone.Backbone`; made by :func:`offramp.hf.open.open_model`."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, shape: Shape) -> None:
        self.model = model
        self.adapter = adapter
        self.shape = shape
        self.meter = Meter()
        self.name, self.weights = "hf", _FORMATS.get(model.dtype, str(model.dtype)[6:])
        self.build = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.fingerprint = fingerprint(model)
        self.batched = True  # the self-check turns it off where texts cannot share a call
        self.ragged = False
        self.cheap: dict[Hashable, nn.Module] = {}
        """Heads of cheap checks, each made once."""
        self._looks: dict[Hashable, Readout] = {}
        """How they read, each made once: two that are one read a row once."""
        self.give(Own())
        self._key: tuple[Any, ...] = ()
        self._groups: list[_Group] = []

    def give(self, own: Own) -> None:
        """Let exits own these readouts, from the next text that is opened on."""
        self.own = own
        self.blocks: Mapping[int, int] = own.blocks
        self.apart = own.apart
        self.shape = replace(self.shape, blocks=tuple(own.blocks), maps=tuple(own.maps))

    def open(self) -> Slot:
        """Return empty stores, one per layer, blocks last."""
        return [LayerStore() for _ in range(self.shape.num_layers + len(self.blocks))]

    def close(self, slot: Slot) -> None:
        """Free the buffers."""
        slot.clear()

    def trim(self, slot: Slot, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        for layer in from_layer(first_layer, self.shape.num_layers, self.blocks):
            if layer < len(slot):  # closed slots are empty
                slot[layer].length = min(slot[layer].length, length)

    @torch.no_grad()
    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""
        self._key = ()  # the same positions may hold other tokens than last time
        groups = self._prepare(spans)
        return _join([(group.members, group.prepared.hidden) for group in groups])

    @torch.no_grad()
    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values.

        Raises:
            UsageError: halves of layers, and this model's have none.
        """
        must_halve(self, layers)
        return self._through(layers, hidden, spans)

    def _through(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        done = []
        parts = hidden.split([len(span) for span in spans])
        for group in self._prepare(spans):
            rows = torch.stack([parts[i] for i in group.members])  # [B, m, D]
            for layer in layers:
                rows = self._call(layer, rows, group)
            done.append((group.members, rows))
            self.meter.ran_path(layers, [spans[i] for i in group.members])
        return _join(done)

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run the first segment: whether a row leaves is always asked."""
        return Ran(self.run(segments[0], hidden, spans))

    @torch.no_grad()
    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        Each layer is entered and left as soon as it has stored them: its norm and its query, key
        and value projections run, its attention and MLP do not.
        """
        parts = hidden.split([len(span) for span in spans])
        for group in self._prepare(spans):
            rows = torch.stack([parts[i] for i in group.members])
            for layer in layers:
                store = self._store(layer, group)
                store.only_fill = True
                with suppress(FilledError):
                    self._call(layer, rows, group)
                store.only_fill = False
            self.meter.filled(len(layers), rows.shape[0] * rows.shape[1])

    def _call(self, layer: int, rows: Tensor, group: _Group) -> Tensor:
        if not is_whole(layer):
            with self._halves.only(layer_of(layer), layer):
                return self.adapter.call(layer_of(layer), rows, group.prepared)
        last = self.shape.num_layers - 1
        if layer <= last:
            return self.adapter.call(layer, rows, group.prepared)
        index = layer - last - 1
        return self.adapter.call(last, rows, group.blocks[index], self.own.layers[index])

    def _store(self, layer: int, group: _Group) -> GroupLayer:
        index = layer - self.shape.num_layers
        cache = group.prepared.cache if index < 0 else group.blocks[index].cache
        found: GroupLayer = cache.layers[layer if index < 0 else -1]
        return found

    @torch.no_grad()
    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``, by what the exit owns or all share."""
        self.meter.read(len(hidden))
        rows = self._mapped(hidden, depth)
        if depth in self.own.heads:
            return self._place.readout(self.own.heads[depth], rows)
        return self.adapter.readout(rows)

    def _mapped(self, hidden: Tensor, depth: int) -> Tensor:
        hidden = hidden.to(self.model.device)  # a trace's states lie elsewhere
        if depth in self.own.maps:
            self.meter.mapped(len(hidden))
        return self.own.mapped(hidden, depth)

    @torch.no_grad()
    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``.

        Raises:
            UnsupportedModelError: the model's head cannot be stood in for.
        """
        key = tuple(tokens.tolist())
        return self._reading(key, partial(self._place.shortlist, tokens))

    @torch.no_grad()
    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``.

        Raises:
            UnsupportedModelError: the model's head cannot be stood in for.
        """
        return self._reading(rank, partial(self._place.low_rank, rank))

    def refined(self) -> Readout:
        """Return the full head's: nothing rougher is cheaper here."""
        return self.readout

    @cached_property
    @torch.no_grad()
    def halves(self) -> bool:
        """Return whether each layer is its attention and then its MLP: tried once, on a text."""
        if not self._halves.named:
            return False
        meter, self.meter = self.meter, Meter()
        text = Text([i % self.shape.vocab_size for i in range(1, 9)], self.open())
        span = (Span(text, 0, len(text.ids)),)
        path = range(self.shape.num_layers)
        try:
            with self._halves.learning():
                whole = self._through(path, self.embed(span), span)
            self.trim(text.slot, 0)
            parts = [layer | half for layer in path for half in (ATTENTION, MLP)]
            found = self._through(parts, self.embed(span), span)
        except (KeyError, TypeError, ValueError, RuntimeError):  # halves of some other kind
            return False
        finally:
            self.meter = meter
            self.close(text.slot)
        bound = _TOLERANCE.get(whole.dtype, 5e-2) * max(whole.abs().max().item(), 1.0)
        return (found - whole).abs().max().item() <= bound

    @cached_property
    def _halves(self) -> Halves:
        return Halves(list(self.adapter.layers))

    @cached_property
    def _place(self) -> HeadPlace:
        return HeadPlace(self.model, self.adapter)

    def _reading(self, key: Hashable, made: Callable[[nn.Linear], nn.Module]) -> Readout:
        """Return a readout by what ``made`` makes of the shared head and of each exit's own."""
        heads = {0: self._place.head, **self.own.heads}
        for depth, head in heads.items():
            if (key, depth) not in self.cheap:
                self.cheap[key, depth] = made(head)

        @torch.no_grad()
        def readout(hidden: Tensor, depth: int) -> Tensor:
            self.meter.checked(len(hidden))
            head = self.cheap[key, depth if depth in self.own.heads else 0]
            return self._place.readout(head, self._mapped(hidden, depth))

        return self._looks.setdefault(key, readout)

    def _prepare(self, spans: Sequence[Span]) -> list[_Group]:
        """Ask the model what its layers need for these rows; the last answer is kept."""
        key = tuple((id(span.text), span.start, span.stop) for span in spans)
        if key != self._key:
            self._groups = [self._group(m, [spans[i] for i in m]) for m in self._split(spans)]
            self._key = key
        return self._groups

    def _split(self, spans: Sequence[Span]) -> list[list[int]]:
        """Return indices of the spans that run together: those with as many rows."""
        if not self.batched:
            return [[i] for i in range(len(spans))]
        by_rows: dict[int, list[int]] = defaultdict(list)
        for i, span in enumerate(spans):
            by_rows[len(span)].append(i)
        return list(by_rows.values())

    def _group(self, members: list[int], spans: list[Span]) -> _Group:
        device = self.model.device
        starts, rows = [span.start for span in spans], len(spans[0])
        ids = torch.tensor([span.ids for span in spans], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(rows, device=device)
        depth, slots = self.shape.num_layers, [span.text.slot for span in spans]
        cache = group_cache([slot[:depth] for slot in slots], starts, rows)
        mask = padding_mask(starts, rows, device)
        prepared = self.adapter.prepare(ids, positions, mask, cache)
        blocks = [
            standing_in(prepared, GroupLayer(stores, starts, rows))
            for stores in zip(*(slot[depth:] for slot in slots), strict=True)
        ]
        return _Group(members, prepared, blocks)


def _join(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Put groups ``[B, m, D]`` back into the order of their spans, flat."""
    rows = {i: row for members, hidden in parts for i, row in zip(members, hidden, strict=True)}
    return torch.cat([rows[i] for i in range(len(rows))])


def fingerprint(model: PreTrainedModel, readouts: Mapping[int, ExitReadout] | None = None) -> str:
    """Return a hash of the architecture and of a few weights of every parameter (16 hex digits).

    It tells models apart, it does not certify them: 32 values of each parameter, rounded to bf16,
    so that the same checkpoint has one fingerprint in fp32 and in bf16. Readouts that exits own
    count as parameters; without any, it is the model's alone.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    owned = [
        (f"{depth}.{readout.kind}.{name}", readout.tensors[name])
        for depth, readout in sorted((readouts or {}).items())
        for name in sorted(readout.tensors)
    ]
    for name, parameter in [*model.named_parameters(), *owned]:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:32].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
