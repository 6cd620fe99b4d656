"""From a checked generic backbone to a checked fast one: on a CPU, or on another device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import UnsupportedModelError
from offramp.fast.backbone import FastBackbone
from offramp.fast.build import kernels
from offramp.fast.fused import fuse
from offramp.fast.graphs import GraphBackbone
from offramp.fast.pack import BYTES, KV_BYTES, Format
from offramp.fast.parts import refusal
from offramp.fast.rotary import Rotary, prepared, windows
from offramp.fast.weights import take
from offramp.hf.backbone import HFBackbone
from offramp.hf.check import alone, probe_ids, read_at, together
from offramp.meter import Meter
from offramp.step import step

TOLERANCE: dict[Format, float] = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.25, "int4": 1.0}
"""Largest difference from the generic backbone's logits, as a share of the largest one.

Beyond fp32 it is what rounding may do, to a random model at that: what the kernels make of a model
is always checked in fp32, on one layer of each kind.
"""


def open_fast(generic: HFBackbone, weights: Format = "fp32") -> FastBackbone:
    """Return a fast backbone for the same model, checked against the generic one.

    Args:
        generic: the model, opened; it must hold its weights in full precision.
        weights: the format to hold them in.

    Raises:
        UnavailableError: the kernels cannot be built or loaded on this machine.
        UnsupportedModelError: the model has parts that the kernels do not, or its logits differ.
    """
    kernels()
    if generic.model.device.type != "cpu":
        raise UnsupportedModelError("the fast kernels run on a CPU, and the model is elsewhere")
    positions = Rotary(generic.adapter), windows(generic.adapter)
    if weights != "fp32":  # what the kernels make of the model shows best without rounding
        sample = _one_of_each(generic, *positions)
        _check(_made(generic, "fp32", *positions, only=sample), generic, "fp32", sample)
    backbone = _made(generic, weights, *positions)
    _check(backbone, generic, weights, range(generic.shape.num_layers))
    backbone.give(generic.own)
    for depth in sorted({*backbone.blocks, *backbone.apart}):
        ids = probe_ids(backbone.shape.vocab_size)
        made, expected = (read_at(each, depth, ids, first=7) for each in (backbone, generic))
        _compare(backbone, generic, weights, (made - expected).abs().max().item(), expected)
    return backbone


def open_graphs(generic: HFBackbone) -> GraphBackbone:
    """Return a fast backbone on the model's own device, checked against the generic one.

    It holds the model's weights, in their precision; where they are fused the model's own modules
    become views of them. It is meant for CUDA and has been run on CPUs only.

    Args:
        generic: the model, opened; in fp32 or bf16.

    Raises:
        UnsupportedModelError: the model has parts that this backbone does not, or its logits
            differ.
    """
    model = generic.model
    if generic.blocks or generic.apart:
        raise refusal(
            model, "its exits own readouts, which only the backbones for a CPU and hf take"
        )
    weights = _HELD.get(model.dtype)
    if weights is None:
        raise refusal(
            model, f"it holds {str(model.dtype).removeprefix('torch.')}, not fp32 or bf16"
        )
    rotary, windows_ = Rotary(generic.adapter), windows(generic.adapter)
    fused = fuse(model, list(generic.adapter.layers))
    rotary.size(fused.facts.head_size)  # refuses tables that do not fit
    embedding = model.get_input_embeddings()
    first = torch.zeros(1, dtype=torch.long, device=model.device)
    backbone = GraphBackbone(
        model,
        fused,
        rotary,
        windows_,
        replace(generic.shape, fill_weights=generic.shape.kv_weights),
        fingerprint=generic.fingerprint,
        embedding_scale=_embedding_scale(generic, embedding(first)[0]),
        weights=weights,
    )
    _check(backbone, generic, weights, range(generic.shape.num_layers))
    backbone.graphs.clear()  # the check's segments are nobody else's
    return backbone


_HELD: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _made(
    generic: HFBackbone,
    weights: Format,
    rotary: Rotary,
    windows: list[int],
    only: Sequence[int] | None = None,
) -> FastBackbone:
    taken = take(generic.model, [*generic.adapter.layers], generic.own.layers, weights, only)
    rotary.point(taken.layers)
    taken.struct.rotary = rotary.size(taken.struct.head_size)
    for index, layer in enumerate(taken.layers):
        layer.window = windows[min(index, len(windows) - 1)]  # a block's is the last layer's
    return FastBackbone(
        generic.model,
        taken,
        rotary,
        replace(
            generic.shape,
            fill_weights=generic.shape.kv_weights,
            bytes_per_weight=BYTES[weights],
            kv_bytes=KV_BYTES[weights],
            map_bytes_per_weight=BYTES["fp32"],
            head_bytes_per_weight=taken.precise_bytes,
            block_bytes_per_weight=taken.precise_bytes,
        ),
        fingerprint=generic.fingerprint,
        embedding_scale=_embedding_scale(generic, generic.model.get_input_embeddings().weight[0]),
        weights=weights,
    )


def _one_of_each(generic: HFBackbone, rotary: Rotary, windows: list[int]) -> list[int]:
    """Return the first layer of each kind, and the last layer."""
    first: dict[object, int] = {}
    for index, layer in enumerate(generic.adapter.layers):
        parts = tuple(name for name, _ in layer.named_parameters())
        first.setdefault((parts, windows[index], rotary.kinds[index]), index)
    return sorted({*first.values(), generic.shape.num_layers - 1})


def _embedding_scale(generic: HFBackbone, looked_up: Tensor) -> float:
    """Return what the model multiplies this embedding of token 0 by before the first layer."""
    asked = prepared(generic.adapter, 0, 1).hidden.float()
    size = looked_up.detach().float().norm().item()
    scale = asked.norm().item() / size if size else 1.0
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _check(backbone: Backbone, generic: HFBackbone, weights: Format, layers: Sequence[int]) -> None:
    """Compare both on this path of layers."""
    ids = probe_ids(backbone.shape.vocab_size)
    text = Text(list(ids), generic.open())
    expected = step(generic, [text], layers=layers, tails=[len(ids)]).logits.float()
    differences = (check(backbone, ids, expected, layers) for check in (alone, together))
    _compare(backbone, generic, weights, max(differences), expected)


def _compare(
    backbone: Backbone, generic: HFBackbone, weights: Format, difference: float, expected: Tensor
) -> None:
    """Refuse logits that differ by more than this format may, and forget what checking cost."""
    off = difference / max(expected.abs().max().item(), 1.0)
    backbone.meter, generic.meter = Meter(), Meter()
    if not off <= TOLERANCE[weights]:  # also catches NaN
        raise UnsupportedModelError(
            f"the fast backbone gives other logits for {type(generic.model).__name__} (off by "
            f"{off:.2g} of the largest, where {TOLERANCE[weights]:g} is allowed in {weights})"
        )
