"""Writes what came out of a run as a folder that opens like any model: weights, then the card."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from offramp.card import GATES, READOUTS, Card, write_card
from offramp.errors import OfframpError
from offramp.gate import GateWeights
from offramp.hf.backbone import fingerprint
from offramp.hf.load import quiet
from offramp.readouts import ExitReadout, write_readouts
from offramp.skipping import SkipFacts, SkipGates
from offramp.tune.network import Net


def write_tuned(folder: Path, net: Net, adapted: Any, tokenizer: Any, card: Card) -> None:
    """Write the trained parts of a model, and the card last: a folder with a card is whole.

    Args:
        folder: where; its log and states stay.
        net: the trained net.
        adapted: the peft model around it, or None.
        tokenizer: of the model; saved beside whole weights.
        card: what to say of it.

    Raises:
        OfframpError: it cannot be written.
    """
    if net.readouts:
        write_readouts(folder / READOUTS, _readouts(net))
    if card.recipe.name == "gates":
        _gates(net, card).save(folder / GATES)
    elif net.gates:
        _skip_gates(net, adapted, card).save(folder / GATES)
    if card.recipe.name not in ("gates", "heads"):  # these leave the model as it was
        _write_model(folder, net, adapted, tokenizer)
    write_card(folder, card)


def _write_model(folder: Path, net: Net, adapted: Any, tokenizer: Any) -> None:
    if adapted is not None:
        _beside(folder, adapted.save_pretrained)
        (folder / "README.md").unlink(missing_ok=True)  # peft's template, with nothing filled in
        return
    _beside(folder, net.model.save_pretrained)
    _beside(folder, tokenizer.save_pretrained)


def _readouts(net: Net) -> dict[int, ExitReadout]:
    """Return what the exits own."""
    assert net.kind != "shared"
    return {
        int(depth): ExitReadout(net.kind, dict(module.state_dict()))
        for depth, module in net.readouts.items()
    }


def _gates(net: Net, card: Card) -> GateWeights:
    """Return the exits' gates as ``--check gate:FILE`` reads them."""
    parts = [net.gates[str(depth)].state_dict() for depth in net.exits]
    return GateWeights(
        exits=net.exits,
        num_layers=net.num_layers,
        fingerprint=card.base.fingerprint,
        weights=torch.cat([part["weight"].float().cpu() for part in parts]),
        biases=torch.cat([part["bias"].float().cpu() for part in parts]),
        fitted_on={} if card.data is None else {"tokens": card.data.tokens},
    )


def _skip_gates(net: Net, adapted: Any, card: Card) -> SkipGates:
    """Return the layers' gates as the plan ``skip`` reads them, of the model as it will open."""
    model = net.model
    if adapted is not None:  # on the CPU, where it is merged when it is opened
        model = copy.deepcopy(adapted).cpu().merge_and_unload()
    gate_input = card.recipe.settings.get("gate_input", "hidden")
    parts = {int(layer): gate.state_dict() for layer, gate in net.gates.items()}
    return SkipGates(
        SkipFacts(num_layers=net.num_layers, fingerprint=fingerprint(model), gate_input=gate_input),
        {layer: part["weight"].float().cpu().contiguous() for layer, part in parts.items()},
        {layer: part["bias"].float().cpu().contiguous() for layer, part in parts.items()},
    )


def _beside(folder: Path, save: Callable[[str], Any]) -> None:
    """Let ``save`` fill a folder beside, then move its files into place."""
    part = folder / ".model.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with quiet():
            save(str(part))
        for file in sorted(part.iterdir()):
            file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise OfframpError(f"cannot write the tuned model to {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
