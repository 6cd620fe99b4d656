"""Opens whatever tuning makes: a checkpoint, an adapter added to its base, readouts over one.

The base that a card names is opened by the same guarded functions as a model that the user names:
no pickle is read, and no code of a checkpoint is run unless it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from offramp import shipped
from offramp.card import CARD, GATES, READOUTS, Card, read_card
from offramp.errors import OfframpError, UsageError
from offramp.hf.backbone import fingerprint
from offramp.hf.cut import cut
from offramp.hf.delta import DELTA, with_delta
from offramp.hf.load import DEFAULT_MODEL, Weights, load_checkpoint, quiet, read_tokenizer
from offramp.hf.lora import ADAPTER_CONFIG, base_of, merged
from offramp.readouts import ExitReadout, read_readouts


@dataclass(frozen=True)
class Tuned:
    """A model ready to be opened, tuned or not."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    """To show, and to be opened by again."""
    card: Card | None = None
    readouts: Mapping[int, ExitReadout] = field(default_factory=dict)
    """By depth, what reads that exit out; an exit that is not here has the model's own head."""
    changed: bool = False
    """Whether tuning changed the model's own weights; readouts and gates leave them alone."""


def load_tuned(
    name: str | None, *, weights: Weights = "fp32", trust_remote_code: bool = False
) -> Tuned:
    """Load a model of any form, in evaluation mode.

    Args:
        name: hub id, local folder or GGUF file; None for SmolLM2-135M-Instruct, and one of
            :data:`offramp.shipped.NAMES` for what comes with offramp.
        weights: precision of the weights in memory.
        trust_remote_code: run modelling code that comes with the checkpoint, or with its base.

    Raises:
        OfframpError: it cannot be found or read, its base is another model, or its card tells of
            layers that it does not have.
        UnsupportedModelError: it is no causal LM.
        UsageError: it is the name of a plan.
    """
    if name is not None and shipped.folder(name) is None and shipped.plan(name) != Path(name):
        raise UsageError(f"{name} is no model but a plan for the default one: --plan {name}")
    if is_whole(name):
        model, tokenizer, shown = load_checkpoint(
            name, weights=weights, trust_remote_code=trust_remote_code
        )
        folder = Path(shown)
        card = None if name is None else read_card(folder)
    else:
        shown = str(name)
        folder = shipped.folder(name) or Path(shown)
        card = read_card(folder)
        model, tokenizer = _over_base(folder, card, weights, trust_remote_code)
    if card is None:
        return Tuned(model, tokenizer, shown)
    changed = is_whole(name) or _is_changed(folder)
    if card.recipe.settings.get("raw") is True and changed:
        tokenizer.chat_template = None  # it learnt prompts as they are, and is asked so
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if max((*card.exits, *card.readouts), default=0) > layers:
        raise OfframpError(
            f"the card of {shown} names exit {max(*card.exits, *card.readouts)} of a model of "
            f"{layers} layers; it belongs to another model"
        )
    return Tuned(model, tokenizer, shown, card, _readouts(folder, card), changed)


def is_whole(name: str | None) -> bool:
    """Say whether this is a checkpoint by itself, not an adapter or readouts over a base model."""
    if shipped.folder(name) is not None:
        return False
    if name is None or not Path(name).is_dir():
        return True
    parts = {file.name for file in Path(name).iterdir()}
    return ADAPTER_CONFIG not in parts and ("config.json" in parts or CARD not in parts)


def at_full_depth(name: str | None) -> str | None:
    """Return the whole checkpoint that is this model at full depth: readouts leave their base be.

    Raises:
        UsageError: an adapter changes the base, or the base cannot be told.
    """
    if is_whole(name):
        return name
    folder = shipped.folder(name) or Path(str(name))
    card = read_card(folder)
    if card is None or card.base.layers is not None or _is_changed(folder):
        raise UsageError(
            f"{name} is an adapter on a base model, and other programs open whole checkpoints; "
            "make one with offramp export and all its layers"
        )
    return None if card.base.name == DEFAULT_MODEL else card.base.name


def _is_changed(folder: Path) -> bool:
    """Say whether what lies over a base model changes it: readouts and gates alone do not."""
    return any((folder / part).is_file() for part in (ADAPTER_CONFIG, DELTA))


def _over_base(
    folder: Path, card: Card | None, weights: Weights, trust_remote_code: bool
) -> tuple[PreTrainedModel, Any]:
    """Return the base model, with the folder's adapter merged if there is one, and a tokenizer."""
    adapter, dense = (folder / ADAPTER_CONFIG).is_file(), (folder / DELTA).is_file()
    if adapter and dense:
        raise OfframpError(f"{folder} holds two adapters, {ADAPTER_CONFIG}'s and {DELTA}")
    if not adapter and not any((folder / name).is_file() for name in (DELTA, READOUTS, GATES)):
        raise OfframpError(
            f"{folder} holds a card, but no weights, adapter, {DELTA}, {READOUTS} or {GATES}"
        )
    base = card.base.name if card else base_of(folder)
    model, tokenizer, _ = load_checkpoint(
        None if base == DEFAULT_MODEL else base,
        # An adapter is added in full precision: rounded before and after would be another model.
        weights="fp32" if (adapter or dense) and weights == "bf16" else weights,
        trust_remote_code=trust_remote_code,
    )
    if card is not None and fingerprint(model) != card.base.fingerprint:
        raise OfframpError(
            f"{folder} was tuned on {base!r} with fingerprint {card.base.fingerprint}, but what "
            f"{base!r} opens now has fingerprint {fingerprint(model)}: it is another base model"
        )
    if card is not None and card.base.layers is not None:
        model = cut(model, card.base.layers)
    with quiet():
        if (folder / "tokenizer_config.json").is_file():  # tuning may have taught it a template
            tokenizer = read_tokenizer(
                str(folder), str(folder), trust_remote_code=trust_remote_code
            )
        if dense:
            model = _added(model, folder, weights, with_delta)
        if adapter:
            model = _added(model, folder, weights, merged)
    return model, tokenizer


def _added(
    model: PreTrainedModel,
    folder: Path,
    weights: Weights,
    add: Callable[[PreTrainedModel, Path], PreTrainedModel],
) -> PreTrainedModel:
    """Return the model with the folder's adapter in its weights, in the precision asked for."""
    named = partial(model.named_parameters, remove_duplicate=False)  # an adapter may part them
    own = {name: p.dtype for name, p in named()}
    if weights == "bf16":
        full = tuple(model._keep_in_fp32_modules_strict or ())
        own = {n: d if any(m in n for m in full) else torch.bfloat16 for n, d in own.items()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model = add(model, folder)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(own[name])
    return model


def _readouts(folder: Path, card: Card) -> dict[int, ExitReadout]:
    """Return what reads each exit out, by depth, where that is not the model's own head."""
    named = {depth: kind for depth, kind in card.readouts.items() if kind != "shared"}
    path = folder / READOUTS
    if not named and not path.is_file():
        return {}
    if not path.is_file():
        raise OfframpError(
            f"{folder}: exit {min(named)} has a readout of its own, but no {READOUTS}"
        )
    found = read_readouts(path)
    if {depth: readout.kind for depth, readout in found.items()} != named:
        raise OfframpError(
            f"{path} holds the readouts of exits {sorted(found)}, and the card beside it tells of "
            f"{sorted(named)}, or of others there"
        )
    return found
