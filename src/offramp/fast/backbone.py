"""The fast backbone: Llama-like models on a CPU, a whole segment of layers per call.

Rows of many texts lie flat; each attends to its own text's keys only, so texts of any length and
depth share a call and nothing is padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from offramp.backbone import Shape, from_layer
from offramp.batch import Span, divided
from offramp.fast.build import kernels, version
from offramp.fast.exits import Screen, known
from offramp.fast.heads import CheapHead, Heads
from offramp.fast.layout import CHUNK, FP32, INT8, MatrixStruct, RowsStruct, WatchStruct
from offramp.fast.pack import Format
from offramp.fast.rotary import Rotary
from offramp.fast.slots import Sizes, Slot
from offramp.fast.weights import Taken
from offramp.hf.own import Own
from offramp.meter import Meter
from offramp.paths import ATTENTION, attends, layer_of
from offramp.probe import Readout
from offramp.watch import Bars, Ran, Watch

_WORTH_SHARING = 200_000
_SCREENS = 16


class FastBackbone:
    """A :class:`~offramp.backbone.Backbone`; made by :func:`offramp.fast.open.open_fast`."""

    def __init__(
        self,
        model: Any,
        taken: Taken,
        rotary: Rotary,
        shape: Shape,
        *,
        fingerprint: str,
        embedding_scale: float,
        weights: Format,
    ) -> None:
        self.model = model
        self.shape = shape
        self.meter = Meter()
        self.fingerprint = fingerprint
        self.batched = self.ragged = self.halves = True
        self.name, self.build = "fast", version()
        self.weights: str = weights
        self._taken, self._rotary = taken, rotary
        self._table = model.get_input_embeddings().weight.detach().float().numpy()
        self._embedding_scale = embedding_scale
        self._library = kernels()
        self._screen = lru_cache(_SCREENS)(self._screened)
        struct = taken.struct
        shared = CheapHead(None, struct.head, shape.head_weights, [])
        plain = model.get_output_embeddings()
        self._heads = Heads(shared, plain, taken.gains, weights, self._checked)
        int8 = weights in ("int8", "int4")  # keys and values are held as roughly as the weights
        struct.kv_format = INT8 if int8 else FP32
        self._sizes = Sizes(len(taken.layers), struct.kv_heads, struct.head_size, int8)
        self.give(Own())

    def give(self, own: Own) -> None:
        """Let exits own these readouts; the layers of their blocks are among those taken.

        An affine map runs in fp32, one product of torch's.
        """
        self.own = own
        self.blocks: Mapping[int, int] = own.blocks
        self.apart = own.apart
        self.shape = replace(self.shape, blocks=tuple(own.blocks), maps=tuple(own.maps))
        self._heads.give(own.heads)

    def open(self) -> Slot:
        """Return an empty slot."""
        return Slot(self._sizes)

    def close(self, slot: Slot) -> None:
        """Free the buffers."""
        slot.clear()

    def trim(self, slot: Slot, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        slot.trim(length, from_layer(first_layer, self.shape.num_layers, self.blocks))

    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""
        rows = torch.from_numpy(self._table[[token for span in spans for token in span.ids]])
        return rows if self._embedding_scale == 1 else rows * self._embedding_scale

    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values."""
        return self._run((layers,), hidden, spans, None).hidden

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run segments up to an exit at which some row may leave."""
        several = len(segments) > 1 and hidden.shape[0] <= CHUNK
        screen = self._screen(watch.bars, watch.look) if several else None
        if screen is None:
            return self._run(segments[:1], hidden, spans, None)
        struct = screen.point(watch, hidden.shape)
        blocks = [layer for layer in watch.blocks if layer is not None]
        if blocks:
            self._reserve(blocks, spans)
            asks, rest = divided(spans, watch.rows)
            struct.asks, struct.rest = (ctypes.pointer(_rows(part)) for part in (asks, rest))
        ran = self._run(segments, hidden, spans, struct)
        stopped = ran.segments < len(segments)
        looked = watch.blocks[: ran.segments - (not stopped)]
        for layer in looked:
            if layer is not None:
                self._passed(layer, spans, asks, rest)
            if screen.head is not None:
                shared = screen.head is self._heads.shared
                (self.meter.read if shared else self.meter.checked)(len(watch.rows))
        if not stopped:
            return ran
        seen = None if screen.head is None else screen.seen.clone()
        made = None if looked[-1] is None else screen.made[: len(watch.rows)].clone()
        return Ran(ran.hidden, ran.segments, seen, made)

    def _passed(
        self, block: int, spans: Sequence[Span], asks: Sequence[Span], rest: Sequence[Span]
    ) -> None:
        """Note that an exit's block holds these rows, of which some ran through it."""
        _appended((block,), spans)
        self.meter.ran(1, asks)
        if rest:
            self.meter.filled(1, sum(map(len, rest)))

    def _screened(self, bars: Bars | None, look: Readout | None) -> Screen | None:
        """Return what tells the kernels of this policy and check, if they know both."""
        if bars is None or not known(bars):
            return None
        if bars.gates is not None:
            return Screen(bars, None)
        head = self._heads.behind(look)
        return None if head is None else Screen(bars, head)

    def _run(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: WatchStruct | None,
    ) -> Ran:
        layers = [layer for segment in segments for layer in segment]
        stops = list(accumulate(map(len, segments)))
        rows = hidden.clone(memory_format=torch.contiguous_format)  # changed in place
        self._reserve(layers, spans)
        done = self._library.offramp_run(
            self._taken.struct,
            (ctypes.c_int32 * len(layers))(*layers),
            (ctypes.c_int32 * len(stops))(*stops),
            len(stops),
            rows.data_ptr(),
            _rows(spans),
            watch,
            _threads(hidden.shape[0] * self.shape.layer_weights),
        )
        _check(done == 0)
        _appended(layers[: stops[done - 1]], spans)
        self.meter.ran_path(layers[: stops[done - 1]], spans)
        return Ran(rows, done)

    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        Only the norm and the key and value projections run.
        """
        self._reserve(layers, spans)
        rows = hidden.contiguous()
        status = self._library.offramp_fill(
            self._taken.struct,
            (ctypes.c_int32 * len(layers))(*layers),
            len(layers),
            rows.data_ptr(),
            _rows(spans),
            _threads(len(hidden) * self.shape.layer_weights),
        )
        _check(status)
        _appended(layers, spans)
        self.meter.filled(len(layers), len(hidden))

    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``, by what the exit owns or all share."""
        self.meter.read(hidden.shape[0])
        return self._read(self._heads.at(depth), self._mapped(hidden, depth))

    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``."""
        return self._heads.shortlist(tokens)

    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``."""
        return self._heads.low_rank(rank)

    def refined(self) -> Readout:
        """Return a readout whose largest logits are exact, the others near: logits ``[N, V]``."""
        return self._heads.refined()

    def _checked(self, head: CheapHead, hidden: Tensor, depth: int) -> Tensor:
        self.meter.checked(len(hidden))
        return self._read(head, self._mapped(hidden, depth))

    def _mapped(self, hidden: Tensor, depth: int) -> Tensor:
        if depth not in self.own.maps:
            return hidden
        self.meter.mapped(len(hidden))
        with torch.no_grad():
            return self.own.mapped(hidden, depth)

    def _read(self, head: CheapHead, hidden: Tensor) -> Tensor:
        hidden, rows = hidden.contiguous(), hidden.shape[0]
        logits = torch.empty(rows, head.head.outputs)
        status = self._library.offramp_readout(
            self._taken.struct,
            head.down,
            head.head,
            head.exact,
            hidden.data_ptr(),
            rows,
            logits.data_ptr(),
            _threads(rows * head.weights),
        )
        _check(status)
        return logits

    def multiplied(self) -> list[dict[str, tuple[int, int]]]:
        """Return, per layer, the (rows, calls) that each kind of matrix has multiplied so far.

        Counted by the kernels themselves; the last entry is of the vocabulary head and its cheap
        stand-ins.
        """
        kinds = {"key": "qkv", "output": "output", "mlp": "down"}
        counts = [
            {kind: _multiplied(getattr(layer, name)) for kind, name in kinds.items()}
            for layer in self._taken.layers
        ]
        return [*counts, self._heads.multiplied()]

    def _reserve(self, layers: Sequence[int], spans: Sequence[Span]) -> None:
        stored = _stored(layers)
        for span in spans:
            slot = span.text.slot
            assert slot.hold(stored, span.start), "a layer was run out of turn"
            slot.reserve(span.stop)
        self._rotary.reserve(max(span.stop for span in spans), self._taken.layers)


def _multiplied(matrix: MatrixStruct) -> tuple[int, int]:
    return matrix.rows, matrix.calls


def _stored(parts: Sequence[int]) -> Sequence[int]:
    """Return the layers whose keys and values these parts make."""
    if max(parts, default=0) < ATTENTION:  # as nearly always
        return parts
    return [layer_of(part) for part in parts if attends(part)]


def _appended(parts: Sequence[int], spans: Sequence[Span]) -> None:
    layers = _stored(parts)
    for span in spans:
        span.text.slot.extend(layers, span.stop)


def _rows(spans: Sequence[Span]) -> RowsStruct:
    """Tell the kernels whose row is whose."""
    addresses = [span.text.slot.address for span in spans]
    text = [i for i, span in enumerate(spans) for _ in range(len(span))]
    position = [p for span in spans for p in range(span.start, span.stop)]
    count = len(position)
    return RowsStruct(
        (ctypes.c_void_p * len(spans))(*addresses),
        (ctypes.c_int32 * count)(*text),
        (ctypes.c_int32 * count)(*position),
        count,
    )


def _threads(products: int) -> int:
    """Return how many threads such a matrix is worth: waiting for each other costs, too."""
    return torch.get_num_threads() if products >= _WORTH_SHARING else 1


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the rows of this step")
