"""Makes a model of some layers of another, which shares its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from offramp.errors import UnsupportedModelError
from offramp.hf.adapter import find_layers
from offramp.hf.load import line, quiet
from offramp.paths import check_path


def cut(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model of these layers, ascending, that shares this one's weights.

    A configuration may hold to its old number of layers in any way: what comes out may say
    something else than the layers do in their own model. Who exports it compares; who tuned it has
    tuned what it says.

    Raises:
        UsageError: the model has no such path.
        UnsupportedModelError: its layers cannot be told from the rest of it, or no model can be
            made of these.
    """
    whole = find_layers(model)
    check_path(layers, len(whole))
    try:
        return _made(model, whole, layers)
    except Exception as error:  # of whatever in the configuration still counts all layers
        name = f"{type(model).__name__} cut to {len(layers)} layers"
        raise UnsupportedModelError(f"{name} is no model: {line(error)}") from error


def _made(model: PreTrainedModel, whole: nn.ModuleList, layers: Sequence[int]) -> PreTrainedModel:
    """Return the small model, or raise anything."""
    with quiet(), torch.device("meta"):
        small: PreTrainedModel = type(model)(_cut_config(model.config, layers))
    place = next(name for name, module in model.named_modules() if module is whole)

    def kept(name: str) -> str | None:
        """Return what this weight is called in the small model, None for one that goes."""
        if not name.startswith(f"{place}."):
            return name
        index, _, rest = name.removeprefix(f"{place}.").partition(".")
        return f"{place}.{layers.index(int(index))}.{rest}" if int(index) in layers else None

    def renamed(tensors: Any) -> dict[str, Any]:
        return {new: tensor for name, tensor in tensors if (new := kept(name)) is not None}

    # Strict: the cut configuration has just these weights. Tables that no checkpoint holds
    # (rotary frequencies) are still on no device.
    small.load_state_dict(renamed(model.state_dict().items()), assign=True)
    saved = small.state_dict().keys()
    for name, table in renamed(model.named_buffers(remove_duplicate=False)).items():
        if name not in saved:
            module, _, buffer = name.rpartition(".")
            small.get_submodule(module).register_buffer(buffer, table, persistent=False)
    small.tie_weights()
    small.generation_config = model.generation_config
    return small.eval()


def _cut_config(config: Any, layers: Sequence[int]) -> Any:
    """Return a configuration of these layers, with what it says of each layer cut as well."""
    inner, facts = config.get_text_config(decoder=True), config.to_dict()
    where = facts
    if inner is not config:
        [part] = [key for key in config.sub_configs if getattr(config, key) is inner]
        where = facts[part]
    for key, value in where.items():
        if key not in _NOT_LAYERS:
            where[key] = _cut_fact(value, inner.num_hidden_layers, layers)
    where[inner.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(facts)


def _cut_fact(value: Any, count: int, layers: Sequence[int]) -> Any:
    """Return the entries of these layers, of a list of all or a table by layer."""
    if isinstance(value, list) and len(value) == count:
        return [value[layer] for layer in layers]
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
        kept = {key: layers.index(int(key)) for key in value if int(key) in layers}
        return {type(key)(place): value[key] for key, place in kept.items()}
    return value


_NOT_LAYERS = {"architectures", "id2label", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Lists that may be as long as the model is deep, but by chance."""
