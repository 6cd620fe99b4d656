"""Packs heads beside the model's: an exit's own, and cheap ones of some rows or of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.fast.layout import INT8, MatrixStruct
from offramp.fast.pack import LANES, Format, pack
from offramp.heads import low_rank


@dataclass
class CheapHead:
    """One matrix, or two in sequence, and what must stay in memory for them."""

    down: MatrixStruct | None
    head: MatrixStruct
    weights: int
    """Weights that one row multiplies."""
    kept: list[Tensor]


def shortlist_head(head: nn.Linear, tokens: Tensor, form: Format) -> CheapHead:
    """Return these entries of the head."""
    weight = head.weight.detach()[tokens]
    kept: list[Tensor] = []
    bias = None if head.bias is None else head.bias.detach()[tokens]
    return CheapHead(None, _packed(weight, bias, form, kept), weight.numel(), kept)


def low_rank_head(head: nn.Linear, gains: Tensor, rank: int, form: Format) -> CheapHead:
    """Return the head's best approximation of this rank for states of a norm with these gains."""
    up, down = low_rank(head.weight.detach(), gains, rank)
    kept: list[Tensor] = []
    bias = None if head.bias is None else head.bias.detach()
    structs = (_packed(down, None, form, kept), _packed(up, bias, form, kept))
    return CheapHead(*structs, up.numel() + down.numel(), kept)


def own_head(head: nn.Linear, form: Format) -> CheapHead:
    """Return an exit's own head, as precise as the model's is beside layers of this format."""
    kept: list[Tensor] = []
    bias = None if head.bias is None else head.bias.detach()
    struct = _packed(head.weight.detach(), bias, head_form(form), kept)
    if form == "int4":
        struct.format = INT8
    return CheapHead(None, struct, head.weight.numel(), kept)


def head_form(form: Format) -> Format:
    """Return how a head that chooses tokens is packed: with int4 it keeps 8 bits."""
    return "int8" if form == "int4" else form


def _packed(weight: Tensor, bias: Tensor | None, form: Format, kept: list[Tensor]) -> MatrixStruct:
    packed = pack(weight, form)
    kept.append(packed.data)
    struct = MatrixStruct(
        weights=packed.data.data_ptr(),
        format=packed.format,
        outputs=packed.outputs,
        inputs=packed.inputs,
    )
    if bias is not None:
        kept.append(torch.cat((bias.float(), bias.new_zeros(LANES).float())))  # whole vectors
        struct.bias = kept[-1].data_ptr()
    return struct
