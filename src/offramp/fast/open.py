"""From a checked generic backbone to a checked fast one."""

from __future__ import annotations

from dataclasses import replace

import torch

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import UnsupportedModelError
from offramp.fast.backbone import FastBackbone
from offramp.fast.build import kernels
from offramp.fast.pack import BYTES, Format
from offramp.fast.rotary import Rotary, prepared, windows
from offramp.fast.weights import take
from offramp.hf.backbone import HFBackbone
from offramp.hf.check import alone, probe_ids, together
from offramp.step import step

TOLERANCE: dict[Format, float] = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1, "int4": 0.5}
"""Largest difference from the generic backbone's logits, as a share of the largest one."""


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
    adapter, shape = generic.adapter, generic.shape
    if generic.model.device.type != "cpu":
        raise UnsupportedModelError("the fast kernels run on a CPU, and the model is elsewhere")
    rotary = Rotary(adapter, shape.context)
    taken = take(generic.model, adapter.layers, windows(adapter), weights)
    rotary.reserve(1, taken.layers)
    taken.struct.rotary = rotary.size
    backbone = FastBackbone(
        generic.model,
        taken,
        rotary,
        replace(
            shape,
            fill_weights=shape.kv_weights,
            bytes_per_weight=BYTES[weights],
            head_bytes_per_weight=taken.head_bytes,
        ),
        fingerprint=generic.fingerprint,
        embedding_scale=_embedding_scale(generic),
        weights=weights,
    )
    _check(backbone, generic, weights)
    return backbone


def _embedding_scale(generic: HFBackbone) -> float:
    """Return what the model multiplies its embeddings by on the way to the first layer."""
    asked = prepared(generic.adapter, 0, 1).hidden.float()
    with torch.no_grad():
        looked_up = generic.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))
    size = looked_up.float().norm().item()
    scale = asked.norm().item() / size if size else 1.0
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _check(backbone: FastBackbone, generic: HFBackbone, weights: Format) -> None:
    ids = probe_ids(backbone.shape.vocab_size)
    expected = _logits(generic, ids)
    scale = max(expected.abs().max().item(), 1.0)
    off = max(alone(backbone, ids, expected), together(backbone, ids, expected)) / scale
    backbone.meter = type(backbone.meter)()
    if not off <= TOLERANCE[weights]:  # also catches NaN
        raise UnsupportedModelError(
            f"the fast kernels give other logits for {type(generic.model).__name__} (off by "
            f"{off:.2g} of the largest, where {TOLERANCE[weights]:g} is allowed in {weights})"
        )


def _logits(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    return step(backbone, [Text(list(ids), backbone.open())], tails=[len(ids)]).logits.float()
