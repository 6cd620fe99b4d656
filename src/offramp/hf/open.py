"""From a Hugging Face model to a checked backbone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from offramp.backbone import Shape
from offramp.errors import UnsupportedModelError
from offramp.hf.adapter import Adapter
from offramp.hf.backbone import HFBackbone
from offramp.hf.check import check


def open_model(model: PreTrainedModel) -> HFBackbone:
    """Open a causal LM for depth-adaptive running, and check it against itself.

    Args:
        model: any Hugging Face causal LM; put into evaluation mode, otherwise untouched.

    Raises:
        UnsupportedModelError: it cannot be run layer by layer with the same result.
    """
    model.eval()
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; offramp runs decoder-only models"
        )
    adapter = Adapter(model)
    backbone = HFBackbone(model, adapter, _shape(model, adapter, config))
    check(backbone)
    return backbone


def _shape(model: Any, adapter: Adapter, config: Any) -> Shape:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = model.get_output_embeddings()
    active = getattr(config, "num_experts_per_tok", None) or 1
    weights = [_active_weights(layer, active) for layer in adapter.layers]
    return Shape(
        num_layers=len(adapter.layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None) or 2**31,
        layer_weights=sum(weights) // len(weights),
        head_weights=config.hidden_size * config.vocab_size
        if head is None
        else head.weight.numel(),
        kv_weights=2 * config.hidden_size * kv_heads * size,
        # Entering a layer for its keys and values computes its queries, too.
        fill_weights=(2 * kv_heads + heads) * config.hidden_size * size,
        attention_size=heads * size,
        bytes_per_weight=next(model.parameters()).element_size(),
    )


def _active_weights(layer: nn.Module, active_experts: int) -> int:
    """Return the matrix weights one token multiplies; of stacked experts ``[E, ...]`` its own."""
    return sum(
        p.numel() * active_experts // len(p) if p.dim() == 3 else p.numel()
        for p in layer.parameters()
        if p.dim() >= 2
    )
