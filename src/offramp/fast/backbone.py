"""The fast backbone: Llama-like models on a CPU, a whole segment of layers per call.

Rows of many texts lie flat; each attends to its own text's keys only, so texts of any length and
depth share a call and nothing is padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.backbone import Shape, from_layer
from offramp.batch import Span
from offramp.fast.build import kernels, version
from offramp.fast.heads import CheapHead, low_rank_head, own_head, shortlist_head
from offramp.fast.layout import FP32, INT8, MatrixStruct, RowsStruct
from offramp.fast.pack import Format
from offramp.fast.rotary import Rotary
from offramp.fast.slots import Sizes, Slot
from offramp.fast.weights import Taken
from offramp.hf.own import Own
from offramp.meter import Meter
from offramp.probe import Readout

_Run = Callable[..., int]
_WORTH_SHARING = 200_000


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
        self.batched = self.ragged = True
        self.name, self.build = "fast", version()
        self.weights: str = weights
        self._format: Format = weights
        self._taken, self._rotary = taken, rotary
        self._table = model.get_input_embeddings().weight.detach().float().numpy()
        self._embedding_scale = embedding_scale
        self._library = kernels()
        self._cheap: dict[Hashable, CheapHead] = {}
        struct = taken.struct
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
        self._heads = {depth: own_head(head, self._format) for depth, head in own.heads.items()}

    def open(self) -> Slot:
        """Return an empty slot."""
        return Slot(self._sizes)

    def close(self, slot: Slot) -> None:
        """Free the buffers."""
        slot.clear()

    def trim(self, slot: Slot, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        slot.trim(length, from_layer(first_layer, self.shape.num_layers, self.blocks))

    @torch.no_grad()
    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""
        rows = torch.from_numpy(self._table[[token for span in spans for token in span.ids]])
        return rows if self._embedding_scale == 1 else rows * self._embedding_scale

    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values."""
        rows = hidden.clone(memory_format=torch.contiguous_format)  # changed in place
        self._call(self._library.offramp_run, layers, rows, spans)
        self.meter.ran(len(layers), spans)
        return rows

    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        Only the norm and the key and value projections run.
        """
        self._call(self._library.offramp_fill, layers, hidden.contiguous(), spans)
        self.meter.filled(len(layers), len(hidden))

    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``, by what the exit owns or all share."""
        self.meter.read(len(hidden))
        own = self._heads.get(depth)
        head = self._taken.struct.head if own is None else own.head
        return self._read(None, head, self.shape.head_weights, self._mapped(hidden, depth))

    @torch.no_grad()
    def _mapped(self, hidden: Tensor, depth: int) -> Tensor:
        if depth in self.own.maps:
            self.meter.mapped(len(hidden))
        return self.own.mapped(hidden, depth)

    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``."""
        key = tuple(tokens.tolist())
        return self._reading(key, lambda head: shortlist_head(head, tokens, self._format))

    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``."""
        gains = self._taken.gains
        return self._reading(rank, lambda head: low_rank_head(head, gains, rank, self._format))

    def _reading(self, key: Hashable, made: Callable[[Any], CheapHead]) -> Readout:
        """Return a readout by what ``made`` makes of the shared head and of each exit's own."""
        shared = self.model.get_output_embeddings()
        heads = {0: shared, **self.own.heads}
        for depth, head in heads.items():
            if (key, depth) not in self._cheap:
                self._cheap[key, depth] = made(head)

        def readout(hidden: Tensor, depth: int) -> Tensor:
            self.meter.checked(len(hidden))
            cheap = self._cheap[key, depth if depth in self._heads else 0]
            return self._read(cheap.down, cheap.head, cheap.weights, self._mapped(hidden, depth))

        return readout

    def _read(
        self, down: MatrixStruct | None, head: MatrixStruct, weights: int, hidden: Tensor
    ) -> Tensor:
        """Return logits ``[N, outputs]`` of one head, of one matrix or two."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), head.outputs)
        status = self._library.offramp_readout(
            self._taken.struct,
            down,
            head,
            hidden.data_ptr(),
            len(hidden),
            logits.data_ptr(),
            _threads(len(hidden) * weights),
        )
        _check(status)
        return logits

    def multiplied(self) -> list[dict[str, int]]:
        """Return, per layer, the rows that each kind of matrix has multiplied so far.

        Counted by the kernels themselves; the last entry is of the vocabulary head and its cheap
        stand-ins.
        """
        kinds = {"key": "qkv", "output": "output", "mlp": "down"}
        counts = [
            {kind: getattr(layer, name).rows for kind, name in kinds.items()}
            for layer in self._taken.layers
        ]
        checks = sum(cheap.head.rows for cheap in self._cheap.values())
        heads = [self._taken.struct.head, *(own.head for own in self._heads.values())]
        return [*counts, {"head": sum(head.rows for head in heads), "check": checks}]

    def _call(
        self, function: _Run, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]
    ) -> None:
        self._reserve(layers, spans)
        indices = (ctypes.c_int32 * len(layers))(*layers)
        status = function(
            self._taken.struct,
            indices,
            len(layers),
            hidden.data_ptr(),
            _rows(spans),
            _threads(len(hidden) * self.shape.layer_weights),
        )
        _check(status)
        for span in spans:
            for layer in layers:
                span.text.slot.lengths[layer] = span.stop

    def _reserve(self, layers: Sequence[int], spans: Sequence[Span]) -> None:
        for span in spans:
            slot = span.text.slot
            for layer in layers:
                assert slot.lengths[layer] == span.start, "a layer was run out of turn"
            slot.reserve(span.stop)
        self._rotary.reserve(max(span.stop for span in spans), self._taken.layers)


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
