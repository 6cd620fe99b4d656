"""Tiny tuned models of every form, for the tests: adapters with weights, cards, readouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from offramp.card import READOUTS, Base, Card, Data, Recipe, write_card
from offramp.hf.backbone import fingerprint
from offramp.hf.load import load_checkpoint, quiet
from offramp.readouts import ExitReadout, write_readouts

IDS = torch.arange(40, 60)[None]


def said(model: Any) -> Tensor:
    """Return a model's own logits for a few tokens, ``[1, T, V]``."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def card_of(base: Path, **changes: Any) -> Card:
    """Return the card of something tuned on this checkpoint."""
    model, _, _ = load_checkpoint(str(base))
    facts: dict[str, Any] = {
        "base": Base(name=str(base), fingerprint=fingerprint(model)),
        "exits": (2, 4),
        "recipe": Recipe(name="lite", settings={"rank": 4}),
        "data": Data(files={"alpaca.jsonl": "ab"}, texts=3, tokens=1234),
    }
    return Card(**(facts | changes))


def save_adapter(base: Path, folder: Path, *, size: float = 0.1, **settings: Any) -> Tensor:
    """Write a random adapter of this checkpoint and return the logits of peft's own model."""
    model, _, _ = load_checkpoint(str(base))
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
    return said(adapted)


def affine(width: int) -> ExitReadout:
    """Return a small random map."""
    draw = torch.Generator().manual_seed(1)
    weight = 0.1 * torch.randn(width, width, generator=draw)
    return ExitReadout("affine", {"weight": weight, "bias": torch.zeros(width)})


def save_tuned(base: Path, folder: Path, form: str) -> Path:
    """Write a tuned model of this form: checkpoint, adapter or readouts."""
    folder.mkdir()
    if form == "checkpoint":
        model, tokenizer, _ = load_checkpoint(str(base))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif form == "adapter":
        save_adapter(base, folder)
    else:
        width = load_checkpoint(str(base))[0].config.hidden_size
        write_readouts(folder / READOUTS, {2: affine(width)})
        write_card(folder, card_of(base, readouts={2: "affine"}))
        return folder
    write_card(folder, card_of(base))
    return folder
