"""Merges a LoRA adapter, as peft writes it, into its base model. Trusts nothing in its folder.

peft imports modules that an adapter's configuration names, and starts some methods by changing the
base; so a configuration is made anew from the settings known to be data.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from offramp.errors import OfframpError
from offramp.hf.check import probe_ids
from offramp.hf.load import line

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"

_TAKEN = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
    *("target_modules", "exclude_modules", "target_parameters"),
    *("layers_to_transform", "layers_pattern"),
}
"""What decides which weights there are and how they are added."""
_IDLE = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "lora_dropout", "init_lora_weights", "megatron_core"),
}
"""What decides nothing here, whatever it says."""
_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Ways of starting an adapter that leave the base as it is."""
_MOST_BYTES = 2**24
_TOLERANCE = 1e-3
"""Largest difference of the merged model's logits, as a share of the largest one."""


def base_of(folder: Path) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        OfframpError: it cannot be read, or names none.
    """
    name = _facts(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise OfframpError(f"{folder / ADAPTER_CONFIG} names no base model")
    return name


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model with the folder's adapter added to its weights; it is changed in place.

    Args:
        model: the base model, in fp32 and evaluation mode.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are.

    Raises:
        OfframpError: peft is not installed, the adapter is no LoRA, is pickled, cannot be read,
            does not fit this model, or cannot be merged with the same result.
    """
    adapted = _attached(model, folder)
    before = _logits(adapted, model.config)
    try:
        whole: PreTrainedModel = adapted.merge_and_unload().eval()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise OfframpError(f"the adapter in {folder} cannot be merged: {line(error)}") from error
    off = (_logits(whole, model.config) - before).abs().max().item()
    if not off <= _TOLERANCE * max(before.abs().max().item(), 1.0):  # also catches NaN
        raise OfframpError(
            f"the adapter in {folder} cannot be merged: the model gives other logits then (off by "
            f"{off:.2g})"
        )
    return whole


def _attached(model: PreTrainedModel, folder: Path) -> Any:
    """Return peft's model with the adapter beside the weights."""
    try:
        import peft
    except ImportError as error:
        raise OfframpError(f"{folder} is an adapter: pip install offramp[tune]") from error
    tensors = _tensors(folder)
    settings = _settings(folder, peft.LoraConfig)
    try:
        # On no device until the tensors are there: a rank of a million takes no memory.
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings), low_cpu_mem_usage=True)
        loaded = peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    except Exception as error:  # peft has many ways of saying that weights and model differ
        raise _misfit(folder, line(error)) from error
    made = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for name in (*loaded.unexpected_keys, *sorted(made & set(loaded.missing_keys))):
        raise _misfit(folder, f"{name} has no counterpart")
    return adapted.eval()


def _logits(model: Any, config: Any) -> Tensor:
    ids = torch.tensor([probe_ids(config.get_text_config(decoder=True).vocab_size)])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise OfframpError(
            f"{folder} holds its adapter as pickle (adapter_model.bin), which can run code; "
            "convert it to safetensors"
            if pickled
            else f"{folder} holds no {ADAPTER}"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OfframpError(f"the adapter {path} cannot be read: {line(error)}") from error
    return tensors


def _settings(folder: Path, kind: Any) -> dict[str, Any]:
    """Return the settings of the adapter that peft is to know."""
    facts, path = _facts(folder), folder / ADAPTER_CONFIG
    if facts.get("peft_type") != "LORA":
        raise OfframpError(f"{path}: only LoRA adapters can be opened")
    usual = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(kind)
    }
    odd = {key for key in facts.keys() - _TAKEN - _IDLE if facts[key] not in (usual.get(key), None)}
    if facts.get("init_lora_weights") not in _STARTS:
        odd.add("init_lora_weights")
    if odd:
        raise OfframpError(f"{path}: {min(odd)!r} is set to what cannot be opened; merge it first")
    return {key: facts[key] for key in _TAKEN & facts.keys() & usual.keys()}


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OfframpError(f"{path} is too large for a configuration")
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise OfframpError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OfframpError(f"{path} is no JSON: {line(error)}") from error
    if not isinstance(facts, dict):
        raise OfframpError(f"{path} is no configuration of an adapter")
    return facts


def _misfit(folder: Path, reason: str) -> OfframpError:
    return OfframpError(f"the adapter in {folder} does not fit its base model: {reason}")
