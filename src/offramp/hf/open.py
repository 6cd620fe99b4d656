"""From a Hugging Face model to a checked backbone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from offramp.backbone import Shape
from offramp.errors import UnsupportedModelError
from offramp.hf.adapter import Adapter
from offramp.hf.backbone import HFBackbone, fingerprint
from offramp.hf.check import check, check_own
from offramp.hf.own import own
from offramp.readouts import ExitReadout

_NONE: Mapping[int, ExitReadout] = MappingProxyType({})


def open_model(model: PreTrainedModel, readouts: Mapping[int, ExitReadout] = _NONE) -> HFBackbone:
    """Open a causal LM for depth-adaptive running, and check it against itself.

    Args:
        model: any Hugging Face causal LM; put into evaluation mode, otherwise untouched.
        readouts: what exits own, by depth; the others share the last norm and head.

    Raises:
        OfframpError: a readout does not fit the model.
        UnsupportedModelError: it cannot be run layer by layer with the same result.
    """
    model.eval()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; offramp runs decoder-only models"
        )
    if _CHANGING & set(_rope_types(model.config.get_text_config(decoder=True).to_dict())):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its rotary positions with the length of the "
            "text (dynamic or longrope scaling), so its keys would depend on when they were made"
        )
    adapter = Adapter(model)
    backbone = HFBackbone(model, adapter, _shape(model, adapter))
    check(backbone)
    if readouts:  # full depth, which the check is of, never touches them
        backbone.give(own(model, adapter, readouts))
        backbone.fingerprint = fingerprint(model, readouts)
        check_own(backbone)
    return backbone


_CHANGING = {"dynamic", "longrope"}


def _rope_types(facts: Any) -> list[str]:
    """Return every kind of rotary scaling named in a configuration, however deep."""
    if not isinstance(facts, dict):
        return []
    own = [facts[key] for key in ("rope_type", "type") if isinstance(facts.get(key), str)]
    return own + [kind for value in facts.values() for kind in _rope_types(value)]


def _shape(model: PreTrainedModel, adapter: Adapter) -> Shape:
    config = model.config.get_text_config(decoder=True)
    written = config.to_dict()  # plain values, also where a configuration varies by layer

    def fact(name: str) -> Any:
        return written.get(config.attribute_map.get(name, name))

    hidden, vocab = config.hidden_size, config.vocab_size
    heads = fact("num_attention_heads") or 1
    size = fact("head_dim") or hidden // heads
    kv_heads = fact("num_key_value_heads") or heads
    head = model.get_output_embeddings()
    weights = [_active_weights(layer, fact("num_experts_per_tok") or 1) for layer in adapter.layers]
    children = [dict(layer.named_children()) for layer in adapter.layers]
    attentions = [_active_weights(c["self_attn"], 1) for c in children if "self_attn" in c]
    return Shape(
        num_layers=len(adapter.layers),
        hidden_size=hidden,
        vocab_size=vocab,
        context=fact("max_position_embeddings") or 2**31,
        layer_weights=sum(weights) // len(weights),
        attention_weights=sum(attentions) // len(adapter.layers),
        head_weights=hidden * vocab if head is None else head.weight.numel(),
        kv_weights=2 * hidden * kv_heads * size,
        # Entering a layer for its keys and values computes its queries, too.
        fill_weights=(2 * kv_heads + heads) * hidden * size,
        attention_size=heads * size,
        bytes_per_weight=next(model.parameters()).element_size(),
        kv_bytes=next(model.parameters()).element_size(),
        head_bytes_per_weight=next(model.parameters()).element_size(),
        map_bytes_per_weight=next(model.parameters()).element_size(),
    )


def _active_weights(layer: nn.Module, active_experts: int) -> int:
    """Return the matrix weights one token multiplies; of stacked experts ``[E, ...]`` its own."""
    return sum(
        p.numel() * active_experts // len(p) if p.dim() == 3 else p.numel()
        for p in layer.parameters()
        if p.dim() >= 2
    )
