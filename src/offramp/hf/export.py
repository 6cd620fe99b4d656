"""Writes some layers of a model as an ordinary checkpoint that loads with nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from offramp.batch import Text
from offramp.card import Card
from offramp.errors import OfframpError, UnsupportedModelError
from offramp.files import write_folder
from offramp.hf.backbone import HFBackbone
from offramp.hf.check import probe_ids
from offramp.hf.cut import cut
from offramp.hf.load import line, load_checkpoint, quiet
from offramp.paths import check_path
from offramp.step import step

_TOLERANCE = {torch.float32: 1e-5}
"""Largest difference from the sub-model's logits, as a share of the largest; half precisions: 2e-2.

On one machine they are the same to the last bit, as the tests hold; kernels may depend on where in
memory a weight lies.
"""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    layers: tuple[int, ...]
    num_layers: int
    parameters: int
    bytes: int
    """Of the weights on disk."""


def export(
    backbone: HFBackbone,
    tokenizer: Any,
    layers: Sequence[int],
    folder: Path,
    *,
    card: Card | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the sub-model of these layers, read back and compared before it counts.

    It holds the layers, embedding, norm, head, tokenizer and generation settings, in the
    model's own precision. The folder is whole or not there.

    Args:
        backbone: the model, opened; not changed.
        tokenizer: its tokenizer.
        layers: the path to keep, ascending; the first ones are an exit (Sorted LLaMA), others what
            a search found (*Dynamic layer selection*).
        folder: where to write; not there yet, or empty.
        card: how the model was tuned, if it was.
        trust_remote_code: run modelling code that came with the checkpoint, to compare.

    Raises:
        UsageError: the model has no such path, or something is in the folder.
        UnsupportedModelError: the cut model does not say what the model says by this path.
        OfframpError: it cannot be written.
    """
    check_path(layers, backbone.shape.num_layers)
    _must_be_plain(card, layers, backbone.shape.num_layers)
    ids = probe_ids(backbone.shape.vocab_size)
    text = Text(list(ids), backbone.open())
    expected = step(backbone, [text], layers=layers, tails=[len(ids)]).logits
    name = f"{type(backbone.model).__name__} cut to {len(layers)} layers"
    small = cut(backbone.model, layers)

    def write(beside: Path) -> None:
        _save(small, tokenizer, beside)
        try:
            found = _said(beside, ids, trust_remote_code)
        except OfframpError as error:
            raise UnsupportedModelError(f"{name} does not load: {error}") from error
        _must_agree(found, expected, name)

    write_folder(folder, write)
    return Exported(
        tuple(layers),
        backbone.shape.num_layers,
        sum(p.numel() for p in small.parameters()),
        sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def _must_be_plain(card: Card | None, layers: Sequence[int], num_layers: int) -> None:
    """Refuse an exit that is read out by something an ordinary checkpoint has no place for."""
    depth = len(layers)
    kind = "shared" if card is None else card.readouts.get(depth, "shared")
    if kind != "shared" and depth < num_layers and layers[-1] == depth - 1:
        raise UnsupportedModelError(
            f"exit {depth} is read out by a {kind} of its own, which an ordinary checkpoint of "
            f"{depth} layers has no place for; export another depth"
        )


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    with quiet():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # safetensors has its own words for a full disk
            raise OSError(str(error)) from error
        except ValueError as error:  # generation settings that contradict each other
            raise OfframpError(f"the checkpoint cannot be written: {line(error)}") from error


def _said(folder: Path, ids: list[int], trust_remote_code: bool) -> Tensor:
    """Return the logits ``[T, V]`` of the checkpoint that was written."""
    model, _, _ = load_checkpoint(str(folder), weights="own", trust_remote_code=trust_remote_code)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _must_agree(logits: Tensor, expected: Tensor, name: str) -> None:
    bound = _TOLERANCE.get(expected.dtype, 2e-2) * max(expected.abs().max().item(), 1.0)
    off = (logits - expected).abs().max().item()
    if logits.dtype != expected.dtype or not off <= bound:  # also catches NaN
        raise UnsupportedModelError(
            f"{name} does not say what the model says by them (off by {off:.2g} where "
            f"{bound:.2g} is allowed): something in it depends on the number of layers"
        )
