"""A model's parts as torch wants them: fused, in its own precision, on its own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.fast.parts import Facts, LayerParts, Matrix, Reader, TopParts, refusal


@dataclass(frozen=True)
class Linear:
    """``[outputs, inputs]``, and what is added."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class FusedLayer:
    """One decoder layer."""

    matrices: dict[str, Linear]
    """Under ``qkv``, ``output``, ``gate_up`` and ``down``."""
    gains: dict[str, Tensor]


@dataclass(frozen=True)
class Fused:
    """A whole model."""

    facts: Facts
    layers: list[FusedLayer]
    top: TopParts
    kv: Tensor
    """``[L, 2K, D]``: what makes keys and values in every layer, for one product of all."""
    kv_bias: Tensor | None
    before: Tensor | None
    """``[L, 1, D]``: the gains in front of it, fp32."""


@torch.no_grad()
def fuse(model: nn.Module, layers: Sequence[nn.Module]) -> Fused:
    """Return the model's weights.

    Where matrices are fused, the model's own modules become views of the result: nothing is held
    twice, and the model computes what it did.

    Raises:
        UnsupportedModelError: it has other parts, or its layers differ in more than windows and
            rotary tables, or they are held in several precisions.
    """
    reader = Reader(model)
    parts = [reader.layer(layer) for layer in layers]
    top = reader.top()
    if len({parameter.dtype for layer in layers for parameter in layer.parameters()}) > 1:
        raise refusal(model, "its weights are of several precisions")
    if len({(frozenset(part.gains), part.qkv.bias() is None) for part in parts}) > 1:
        raise refusal(model, "its layers have different norms or biases")
    facts = reader.facts
    assert facts is not None
    qkv = _stacked([part.qkv for part in parts])
    biases = [bias for part in parts if (bias := part.qkv.bias()) is not None]
    bias = torch.stack(biases) if biases else None
    before = [gains for part in parts if (gains := part.gains.get("before_attention")) is not None]
    return Fused(
        facts,
        [
            _layer(part, Linear(qkv[i], None if bias is None else bias[i]))
            for i, part in enumerate(parts)
        ],
        top,
        qkv[:, facts.queries :],
        None if bias is None else bias[:, None, facts.queries :],
        torch.stack(before)[:, None] if before else None,
    )


def _layer(part: LayerParts, qkv: Linear) -> FusedLayer:
    matrices = {"output": part.output, "gate_up": part.gate_up, "down": part.down}
    fused = {kind: Linear(_side_by_side(m), m.bias()) for kind, m in matrices.items()}
    return FusedLayer({"qkv": qkv, **fused}, part.gains)


def _stacked(matrices: Sequence[Matrix]) -> Tensor:
    """Return ``[L, outputs, inputs]``, each layer's matrix let go as soon as it is copied."""
    first = matrices[0].modules[0].weight
    stack = first.new_empty(len(matrices), sum(matrices[0].sizes), first.shape[1])
    for into, matrix in zip(stack, matrices, strict=True):
        into.copy_(matrix.weight())
        _point(matrix, into)
    return stack


def _side_by_side(matrix: Matrix) -> Tensor:
    if len(matrix.modules) == 1:
        return matrix.modules[0].weight.data
    weight = matrix.weight()
    _point(matrix, weight)
    return weight


def _point(matrix: Matrix, weight: Tensor) -> None:
    """Let the modules look into the fused weight."""
    sizes = [len(module.weight) for module in matrix.modules]
    for module, rows in zip(matrix.modules, weight.split(sizes), strict=True):
        module.weight.data = rows
