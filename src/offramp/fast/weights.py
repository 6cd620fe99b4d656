"""Packs a loaded model's parts for the kernels, in one of their formats."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from offramp.fast.heads import head_form
from offramp.fast.layout import INT8, LayerStruct, MatrixStruct, ModelStruct
from offramp.fast.memory import Arena
from offramp.fast.pack import BYTES, LANES, Format, pack
from offramp.fast.parts import Matrix, Reader


@dataclass
class Taken:
    """The kernels' view of a model, and whatever must stay in memory for it."""

    struct: ModelStruct
    layers: ctypes.Array[LayerStruct]
    precise_bytes: float
    """Bytes per weight of what reads out: the vocabulary head and exits' blocks."""
    gains: Tensor
    """``[D]`` of the last norm."""
    kept: list[Tensor] = field(default_factory=list)


def take(
    model: nn.Module,
    layers: Sequence[nn.Module],
    blocks: Sequence[nn.Module],
    form: Format,
    only: Sequence[int] | None = None,
) -> Taken:
    """Return the model's weights in this format.

    Args:
        model: the causal LM.
        layers: its decoder layers.
        blocks: those that exits own; their indices follow the layers'.
        form: the format of the layers. With int4 what reads out, the vocabulary head and exits'
            blocks, keeps 8 bits: it is what chooses, and a block is tuned, which int4 undoes.
        only: the layers and blocks to take; all by default. The others must not be run.

    Raises:
        UnsupportedModelError: it has parts that the kernels do not have.
    """
    taker = _Taker(Reader(model), form)
    precise = head_form(form)
    parts = [*((layer, form) for layer in layers), *((block, precise) for block in blocks)]
    structs = (LayerStruct * len(parts))()
    for index in range(len(parts)) if only is None else only:
        taker.layer(structs[index], *parts[index])
    struct, gains = taker.top(precise)
    struct.layers = ctypes.cast(structs, ctypes.POINTER(LayerStruct))
    return Taken(struct, structs, BYTES[precise], gains, taker.kept)


class _Taker:
    def __init__(self, reader: Reader, form: Format) -> None:
        self.kept: list[Tensor] = []
        self._reader, self._form = reader, form
        self._arena = Arena()

    def layer(self, struct: LayerStruct, layer: nn.Module, form: Format) -> None:
        parts = self._reader.layer(layer)
        struct.qkv = self._matrix(parts.qkv, form)
        assert self._reader.facts is not None
        struct.qkv.first = self._reader.facts.queries
        struct.output = self._matrix(parts.output, form)
        struct.gate_up = self._matrix(parts.gate_up, form)
        struct.down = self._matrix(parts.down, form)
        for place, gains in parts.gains.items():
            setattr(struct, place, self._address(gains))
        struct.head_norm = parts.head_norm

    def top(self, form: Format) -> tuple[ModelStruct, Tensor]:
        """Return the model with its head and what scales the logits, and its last norm's gains."""
        parts = self._reader.top()
        assert self._reader.facts is not None
        struct = ModelStruct(**asdict(self._reader.facts))
        struct.norm = self._address(parts.gains)
        struct.epsilon = parts.epsilon
        struct.head = self._matrix(parts.head, form)
        struct.logit_scale, struct.logit_softcap = parts.logit_scale, parts.logit_softcap
        return struct, parts.gains

    def _matrix(self, matrix: Matrix, form: Format) -> MatrixStruct:
        """Pack modules side by side; each part begins at a whole block."""
        packed = pack(_apart(matrix.weight().float(), matrix.sizes), form)
        # Beside layers in int4 states of 8 bits do, and many rows take half the time.
        coarse = self._form == "int4" and form == "int8"
        struct = MatrixStruct(
            weights=self._address(packed.data),
            format=INT8 if coarse else packed.format,
            outputs=packed.outputs,
            inputs=packed.inputs,
        )
        bias = matrix.bias()
        if bias is not None:
            bias = _apart(bias.float(), matrix.sizes)
            spare = bias.new_zeros(LANES)  # the kernels read whole vectors
            struct.bias = self._address(torch.cat((bias, spare)))
        return struct

    def _address(self, tensor: Tensor) -> int:
        kept = self._arena.keep(tensor)
        self.kept.append(kept)
        return kept.data_ptr()


def _apart(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pad each part but the last to whole blocks of outputs."""
    if len(sizes) == 1:
        return rows
    parts = []
    for part in rows.split(list(sizes)):
        parts += [part, part.new_zeros(-len(part) % LANES, *part.shape[1:])]
    return torch.cat(parts)
