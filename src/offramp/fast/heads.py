"""Packs cheap stand-ins for the vocabulary head: some of its rows, or two factors of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.fast.layout import MatrixStruct
from offramp.fast.memory import Arena
from offramp.fast.pack import LANES, Format, pack
from offramp.heads import low_rank


@dataclass(eq=False)
class CheapHead:
    """One matrix, or two in sequence, and what must stay in memory for them."""

    down: MatrixStruct | None
    head: MatrixStruct
    weights: int
    """Weights that one row multiplies."""
    kept: list[Tensor]


def shortlist_head(head: nn.Linear, tokens: Tensor, form: Format, arena: Arena) -> CheapHead:
    """Return these entries of the head."""
    weight = head.weight.detach()[tokens]
    made = _Packer(form, arena)
    bias = None if head.bias is None else head.bias.detach()[tokens]
    return CheapHead(None, made.packed(weight, bias), weight.numel(), made.kept)


def low_rank_head(
    head: nn.Linear, gains: Tensor, rank: int, form: Format, arena: Arena
) -> CheapHead:
    """Return the head's best approximation of this rank for states of a norm with these gains."""
    up, down = low_rank(head.weight.detach(), gains, rank)
    made = _Packer(form, arena)
    bias = None if head.bias is None else head.bias.detach()
    structs = (made.packed(down, None), made.packed(up, bias))
    return CheapHead(*structs, up.numel() + down.numel(), made.kept)


class _Packer:
    def __init__(self, form: Format, arena: Arena) -> None:
        self.kept: list[Tensor] = []
        self._form, self._arena = form, arena

    def packed(self, weight: Tensor, bias: Tensor | None) -> MatrixStruct:
        packed = pack(weight, self._form)
        struct = MatrixStruct(
            weights=self._address(packed.data),
            format=packed.format,
            outputs=packed.outputs,
            inputs=packed.inputs,
        )
        if bias is not None:
            spare = bias.new_zeros(LANES)  # the kernels read whole vectors
            struct.bias = self._address(torch.cat((bias, spare)).float())
        return struct

    def _address(self, tensor: Tensor) -> int:
        self.kept.append(self._arena.keep(tensor))
        return self.kept[-1].data_ptr()
