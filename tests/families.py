"""Tiny random models of many decoder families: those to open, and those to refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Builder = Callable[[int], PreTrainedConfig]


def _named(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Every name under which some family keeps a size. A configuration takes those that it declares.
_SIZES: dict[str, Any] = {
    **_named("vocab_size vocab_size_per_layer_input", 160),
    **_named("hidden_size n_embd d_model", 32),
    **_named("num_attention_heads n_head n_heads num_heads attention_heads", 4),
    **_named("swa_num_attention_heads index_n_heads linear_num_heads linear_num_value_heads", 4),
    **_named("num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads", 2),
    **_named("head_dim v_head_dim kv_channels swa_head_dim index_head_dim linear_head_dim", 8),
    **_named("linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input", 8),
    **_named("intermediate_size n_inner dff ffn_dim ffn_hidden_size intermediate_size_mlp", 64),
    **_named("moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size", 16),
    **_named("shared_expert_intermediate_size dense_intermediate_size", 16),
    **_named("max_position_embeddings n_positions max_seq_len", 256),
    **_named("sliding_window sliding_window_size window_size local_attention", 8),
    **_named("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_named("num_experts_per_tok moe_topk moe_k", 2),
    **_named("num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group", 1),
    **_named("rotary_dim qk_rope_head_dim qk_nope_head_dim", 4),
    **_named("q_lora_rank kv_lora_rank", 12),
    **_named("query_pre_attn_scalar mamba_n_heads mamba_num_heads mamba_d_state mamba_head_dim", 8),
    **_named("pad_token_id cls_token_id sep_token_id", 0),
    **_named("bos_token_id n_groups", 1),
    **_named("eos_token_id", None),  # nothing ends a text early
    **_named("use_cache", True),
    **_named("logit_scale logits_mup_width_multiplier", 1.0),
}


def _family(model_type: str, special: dict[str, Any]) -> Builder:
    """A builder of one family; what depends on the number of layers is given as a function."""

    def config(layers: int) -> PreTrainedConfig:
        kind = CONFIG_MAPPING[model_type]
        declared = {field.name for field in fields(kind)}
        sizes = _SIZES | _named("num_hidden_layers n_layer n_layers num_layers", layers)
        own = {name: value(layers) if callable(value) else value for name, value in special.items()}
        built: PreTrainedConfig = kind(**{k: v for k, v in sizes.items() if k in declared} | own)
        return built

    return config


def _alternating(other: str, last: str) -> Callable[[int], list[str]]:
    return lambda layers: [(last, other)[left % 2] for left in reversed(range(layers))]


def _gpt_neo_windows(layers: int) -> list[list[Any]]:
    return [[["global", "local"], layers // 2], [["global"], layers % 2]]


_MIXED = {"layer_types": _alternating("sliding_attention", "full_attention")}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_ROPE_WHERE_SLIDING = {
    "full_attention": None,
    "sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has no groups
_SCALED = {
    "attention_multiplier": 0.35,
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.8,
    "residual_multiplier": 0.8,
}

_PLAIN = """
afmoe arcee aria_text beam biogpt bitnet bloom codegen cohere cohere2_moe ctrl diffllama doge
ernie4_5 ernie4_5_moe exaone_moe falcon flex_olmo flint gemma glm glm4 glm4_moe gpt2 gpt_bigcode
gpt_neox gpt_neox_japanese gptj helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2
jetmoe kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mistral mixtral mpt
nanochat nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen3 qwen3_moe seed_oss
smollm3 solar_open stablelm starcoder2 xglm
"""

_OPENED: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    **_named("cohere2 dots1 exaone4 gemma2 gemma3_text", _MIXED),
    **_named("gemma4_text gemma4_unified_text ministral", _MIXED),
    **_named("modernbert-decoder olmo3 vaultgemma", _MIXED),
    **_named("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite youtu", _LATENT),
    **_named("granite granitemoe granitemoeshared", _SCALED),
    **_named("granite_swa granitemoe_swa", _SCALED | _MIXED),
    # Its own activation, xielu, logs that a CUDA kernel is absent.
    "apertus": {"hidden_act": "relu2", "rope_parameters": _ROPE},
    "cohere_compass_text": {**_MIXED, "rope_parameters": _ROPE_WHERE_SLIDING},
    "cwm": {**_MIXED, "rope_parameters": _ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "gpt_neo": {"attention_types": _gpt_neo_windows},
    "gpt_oss": {**_MIXED, "rope_parameters": _YARN},
    "llama4_text": {"attention_chunk_size": 16},
    "minicpm3": {**_LATENT, "scale_emb": 2, "dim_model_base": 32},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    # Its masks ignore the window, so a shorter one disagrees with its own cache.
    "moshi": {"sliding_window": 256},
    "qwen2_moe": {**_MIXED, "use_sliding_window": True},
}

_HYBRID = {"layer_types": _alternating("linear_attention", "full_attention")}
_CONVOLUTION = {"layer_types": _alternating("conv", "full_attention")}
_ZAMBA = {"layers_block_type": _alternating("linear_attention", "hybrid"), "num_key_value_heads": 4}

_UNOPENED: dict[str, dict[str, Any]] = {
    # Every layer carries a recurrent state.
    **_named("falcon_h1 falcon_mamba mamba rwkv", {}),
    "mamba2": {"num_heads": 8},
    # Recurrent, linear-attention or convolution layers among attention layers.
    **_named("granitemoehybrid olmo_hybrid qwen3_5_text qwen3_next", _HYBRID),
    **_named("lfm2 lfm2_moe", _CONVOLUTION),
    **_named("kimi_linear", _LATENT | _HYBRID),
    **_named("zamba zamba2", _ZAMBA),
    "bamba": {"attn_layer_indices": lambda layers: list(range(1, layers, 2))},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {"layers_block_type": _HYBRID["layer_types"]},
    **_named("minimax recurrent_gemma", {}),
    # Attention layers that also keep a convolution state (and, in Zaya, hand on router states).
    "inkling_text": {},
    "zaya": {"num_experts_per_tok": 1},
    # The last layers read the keys and values of earlier ones.
    "gemma3n_text": {**_MIXED, "num_kv_shared_layers": 2, "laurel_rank": 8},
    # Compressed caches; four residual streams; in HY-V4, top-k indices handed from layer to layer.
    "deepseek_v4": {},
    "hy_v4": _LATENT,
    # Two cache layers per decoder layer; layers run several times per token; no cache at all.
    "longcat_flash": {**_LATENT, "head_dim": 4},
    "hrm_text": {},
    "openai-gpt": {},
}

FAMILIES: dict[str, Builder] = {
    name: _family(name, special) for name, special in sorted(_OPENED.items())
}
REFUSED: dict[str, Builder] = {
    name: _family(name, special) for name, special in sorted(_UNOPENED.items())
}

# How much a matrix amplifies. Plain feed-forward layers need more of it for a varied text than
# gated ones, which multiply two of its results; GPT-Neo does not scale its attention scores.
_GAIN = {
    **_named("biogpt bloom codegen ctrl falcon gpt2 gpt_bigcode gpt_neox", 2.5),
    **_named("gpt_neox_japanese gptj jais2 mpt opt persimmon phi starcoder2 xglm", 2.5),
    "gpt_neo": 1.0,
}
_FIRST_SEED = 2000  # chosen among a dozen: nearly every family's text is varied at seed 0


def build(name: str, *, layers: int = 6, seed: int = 0) -> PreTrainedModel:
    """A tiny fp32 model of the family, ready to run, with no weight left at its default."""
    config = (FAMILIES | REFUSED)[name](layers)
    untyped: Any = AutoModelForCausalLM  # its methods carry no annotations
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_FIRST_SEED + seed)
        model: PreTrainedModel = untyped.from_config(config, dtype=torch.float32).eval()
        _randomise(model, _GAIN.get(name, 1.5))
    return model


def _randomise(model: Any, gain: float) -> None:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.add(id(getattr(model.get_output_embeddings(), "weight", None)))
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            parameter.normal_(0, 0.3)
        elif parameter.ndim >= 2:
            _draw_matrix(parameter, gain, inputs=0 if id(parameter) in transposed else -1)
        elif name.endswith("weight"):
            _draw_norm(parameter)
        else:  # biases, sinks, scales: something around what they start from
            parameter.add_(0.15 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias", "balancing_biases", "layer_scalar")):
            buffer.add_(0.15 * torch.randn_like(buffer))


def _draw_matrix(matrix: Tensor, gain: float, *, inputs: int) -> None:
    """Rows that sum to 0: else the mean of GELU or ReLU is the same vector in every state."""
    matrix.normal_(0, gain * matrix.shape[inputs] ** -0.5)
    if matrix.shape[inputs] > 1:
        matrix.sub_(matrix.mean(inputs, keepdim=True))


def _draw_norm(weight: Tensor) -> None:
    """Gains of either sign: with positive ones, a tied head repeats the token that it was given."""
    around = 1.0 if weight.abs().max() < 0.5 else 0.0  # Gemma's norms multiply by 1 + weight
    sign = torch.randn_like(weight).sign()
    weight.copy_(sign * (1 + 0.2 * torch.randn_like(weight)) - around)
