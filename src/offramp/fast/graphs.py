"""The fast backbone for other devices than a CPU: fixed shapes, so that CUDA can replay a segment.

Rows are padded to a bucket and copied into tensors that never move; on CUDA the segment's kernels
are captured once per (layers, bucket of rows, bucket of keys) and replayed with one launch. On any
other device the very same functions are called, so tests on a CPU cover padding, grouping and
masks. **Capture and replay themselves have not been run on a GPU yet.**
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Shape, must_halve
from offramp.batch import Span
from offramp.fast.capture import Graphs
from offramp.fast.fused import Fused
from offramp.fast.layer import Layers, Rows
from offramp.fast.rotary import Rotary
from offramp.fast.static import StaticSlot, Store, at_least
from offramp.heads import low_rank
from offramp.hf.heads import linear
from offramp.meter import Meter
from offramp.probe import Readout
from offramp.watch import Ran, Watch

_CHUNK = 1024
"""Most rows of one call: what comes on top is cut, which bounds memory and the number of shapes."""
_CELLS = (1, 8, 64)
"""Rows of one text that share a look at its keys: decoding, drains and drafts, prompts."""

_Piece = tuple[int, int, int]  # slot, first position, position after the last


class GraphBackbone:
    """A :class:`~offramp.backbone.Backbone`; made by :func:`offramp.fast.open.open_graphs`.

    The meter counts the rows asked for; a bucket's padding goes through the products beside them.
    """

    def __init__(
        self,
        model: Any,
        fused: Fused,
        rotary: Rotary,
        windows: Sequence[int],
        shape: Shape,
        *,
        fingerprint: str,
        embedding_scale: float,
        weights: str,
    ) -> None:
        self.model = model
        self.shape = shape
        self.meter = Meter()
        self.fingerprint = fingerprint
        self.batched = self.ragged = True
        self.halves = False
        self.name, self.weights = "fast", weights
        self.blocks: Mapping[int, int] = {}
        self.apart = frozenset[int]()  # models whose exits own readouts are refused
        self.build = f"torch {torch.__version__}, fixed shapes on {model.device.type}"
        self.cheap: dict[Hashable, nn.Module] = {}
        """Heads of cheap checks, each made once."""
        self._looks: dict[Hashable, Readout] = {}
        """How they read, each made once: two that are one read a row once."""
        self._fused, self._rotary = fused, rotary
        self._embedding, self._embedding_scale = model.get_input_embeddings(), embedding_scale
        self._head = model.get_output_embeddings()
        f, self._device = fused.facts, model.device
        self.store = Store(shape.num_layers, f.kv_heads, f.head_size, model.dtype, self._device)
        self.layers = Layers(fused, windows, rotary, self.store)
        self.graphs = Graphs(self._device)
        self._rows: dict[tuple[int, int, int], tuple[Rows, Tensor]] = {}
        self._version = self.store.version

    def open(self) -> StaticSlot:
        """Return an empty slot."""
        return self.store.open()

    def close(self, slot: StaticSlot) -> None:
        """Let another text have the slot."""
        slot.close()

    def trim(self, slot: StaticSlot, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        slot.trim(length, first_layer)

    @torch.no_grad()
    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""
        ids = torch.tensor([token for span in spans for token in span.ids], device=self._device)
        rows: Tensor = self._embedding(ids)
        return rows if self._embedding_scale == 1 else rows * self._embedding_scale

    @torch.no_grad()
    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values.

        Raises:
            UsageError: halves of layers: here they run as wholes only.
        """
        must_halve(self, layers)
        self._reserve(layers, spans)
        path, length = tuple(layers), at_least(max(span.stop for span in spans))
        segment = partial(self.layers.run, path, length)
        made = self._replayed(("run", path, length), segment, hidden, spans)
        self._appended(layers, spans)
        self.meter.ran(len(layers), spans)
        return made

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run the first segment: an exit has its one read."""
        return Ran(self.run(segments[0], hidden, spans))

    @torch.no_grad()
    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        Only the norm and the key and value projections run, of neighbouring layers in one product.
        """
        self._reserve(layers, spans)
        path = tuple(layers)
        self._replayed(("fill", path), partial(self.layers.fill, path), hidden, spans)
        self._appended(layers, spans)
        self.meter.filled(len(layers), len(hidden))

    @torch.no_grad()
    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``; every depth shares norm and head."""
        self.meter.read(len(hidden))
        return self._read(self._head, hidden)

    @torch.no_grad()
    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``."""
        key = tuple(tokens.tolist())
        if key not in self.cheap:
            head, chosen = self._head, tokens.to(self._device)
            bias = None if head.bias is None else head.bias[chosen]
            self.cheap[key] = linear(head.weight[chosen], bias)
        return self._reading(key)

    @torch.no_grad()
    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``."""
        if rank not in self.cheap:
            weight = self._head.weight
            up, down = low_rank(weight, self._fused.top.gains, rank)
            self.cheap[rank] = nn.Sequential(
                linear(down.to(weight.dtype), None), linear(up.to(weight.dtype), self._head.bias)
            )
        return self._reading(rank)

    def refined(self) -> Readout:
        """Return the full head's: nothing rougher is cheaper here."""
        return self.readout

    def _reading(self, key: Hashable) -> Readout:
        @torch.no_grad()
        def readout(hidden: Tensor, _depth: int) -> Tensor:
            self.meter.checked(len(hidden))
            return self._read(self.cheap[key], hidden)

        return self._looks.setdefault(key, readout)

    def _read(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Return logits ``[N, outputs]`` of one head after the last norm."""
        top = self._fused.top
        logits: Tensor = head(self.layers.read(hidden.to(self._device)))
        if top.logit_scale != 1:
            logits = logits * top.logit_scale
        if top.logit_softcap:
            logits = torch.tanh(logits / top.logit_softcap) * top.logit_softcap
        return logits

    def _replayed(
        self,
        name: Hashable,
        segment: Callable[[Rows], Tensor],
        hidden: Tensor,
        spans: Sequence[Span],
    ) -> Tensor:
        """Return what ``segment`` makes of these rows, ``[N, D]``, chunk by chunk.

        A later chunk sees what an earlier one stored, in every layer.
        """
        made, start = [], 0
        for pieces in _chunks(spans):
            count = sum(stop - first for _, first, stop in pieces)
            shape, rows = self._placed(pieces, hidden[start : start + count])
            out = self.graphs((name, shape), partial(segment, rows))
            made.append(out[:count].clone())  # the next replay writes there
            start += count
        return made[0] if len(made) == 1 else torch.cat(made)

    def _placed(
        self, pieces: Sequence[_Piece], hidden: Tensor
    ) -> tuple[tuple[int, int, int], Rows]:
        """Copy rows and their places into the tensors of their shape, without waiting for them."""
        longest = max(stop - start for _, start, stop in pieces)
        wide = next((size for size in _CELLS if size >= longest), _CELLS[-1])
        slots, positions, places, cells = _layout(pieces, wide)
        shape = (bucket(len(slots)), bucket(len(cells)), wide)
        rows, numbers = self._rows.get(shape) or self._inputs(shape)
        count, groups, _ = shape
        flat = [row for group in cells for row in group]
        written = [
            *(column + [0] * (count - len(column)) for column in (slots, positions, places)),
            flat + [0] * (groups * wide - len(flat)),
        ]
        host = torch.tensor([number for column in written for number in column])
        if self._device.type == "cuda":
            host = host.pin_memory()
        numbers.copy_(host, non_blocking=True)
        rows.hidden[: len(hidden)] = hidden
        return shape, rows

    def _inputs(self, shape: tuple[int, int, int]) -> tuple[Rows, Tensor]:
        """Make the tensors of one shape, all whole numbers in one, and keep them."""
        count, groups, wide = shape
        numbers = torch.zeros(3 * count + groups * wide, dtype=torch.long, device=self._device)
        slot, position, place, cells = numbers.split([count, count, count, groups * wide])
        hidden = torch.zeros(
            count, self.shape.hidden_size, dtype=self.model.dtype, device=self._device
        )
        made = Rows(hidden, slot, position, place, cells.view(groups, wide)), numbers
        self._rows[shape] = made
        return made

    def _reserve(self, layers: Sequence[int], spans: Sequence[Span]) -> None:
        for span in spans:
            for layer in layers:
                assert span.text.slot.lengths[layer] == span.start, "a layer was run out of turn"
        self.store.reserve(max(span.stop for span in spans))
        if self._rotary.grow(self.store.capacity) or self.store.version != self._version:
            self.graphs.clear()  # they hold addresses of what has moved
            self._version = self.store.version

    def _appended(self, layers: Sequence[int], spans: Sequence[Span]) -> None:
        for span in spans:
            for layer in layers:
                span.text.slot.lengths[layer] = span.stop


def bucket(count: int) -> int:
    """Return the number of rows that ``count`` rows are padded to."""
    for size in (1, 2, 4, 8):
        if count <= size:
            return size
    step = 8 if count <= 32 else 32
    return -(-count // step) * step


def _chunks(spans: Sequence[Span]) -> Iterator[list[_Piece]]:
    """Cut the spans into calls of at most ``_CHUNK`` rows, in order."""
    pieces: list[_Piece] = []
    room = _CHUNK
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + room)
            pieces.append((span.text.slot.index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], _CHUNK
    if pieces:
        yield pieces


def _layout(
    pieces: Sequence[_Piece], wide: int
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Return slot, position and cell of each row, and the rows in each group of ``wide`` cells."""
    slots: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    cells: list[list[int]] = []
    for slot, start, stop in pieces:
        for first in range(start, stop, wide):
            row, count = len(slots), min(wide, stop - first)
            slots += [slot] * count
            positions += range(first, first + count)
            places += range(len(cells) * wide, len(cells) * wide + count)
            cells.append([*range(row, row + count), *[row] * (wide - count)])
    return slots, positions, places, cells
