"""The card of a tuned model: ``offramp.json`` beside its weights. Says what was tuned, and how.

A tuned model is a folder: a whole checkpoint, an adapter of a base model or of some of its layers
(low-rank, or a bit per weight), or readouts alone. The card names the exits, what reads each of
them out, the base model and the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from offramp.files import write_text
from offramp.records import Record, read_record
from offramp.sketch import unpacked

CARD, READOUTS, GATES = "offramp.json", "readouts.safetensors", "gates.safetensors"

ReadoutKind = Literal["shared", "affine", "head", "block"]
"""What an exit's state passes before it becomes logits.

``shared``: the model's last norm and head (LITE, Sorted LLaMA). ``affine``: a linear map in front
of both (tuned lens). ``head``: the last norm and a head of its own (Sorted LLaMA's ICT baseline).
``block``: a decoder layer of its own, with its own keys and values, in front of both (Balcony).
"""


class Base(Record):
    """The model that was tuned: what the readouts or the adapter are put on.

    Of a whole checkpoint it is what the tuning began from, and is not needed again.
    """

    name: str
    """Hub id, folder or file it was opened by; the default model by its shown name."""
    fingerprint: str
    """Of the base model's own weights, before an adapter is merged into them."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Those of its layers that were kept, before anything is added; None for all of them."""


class Recipe(Record):
    """How it was tuned."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Data(Record):
    """What it was tuned on."""

    files: dict[str, str]
    """SHA-256 of each file's bytes, by its name without folders."""
    texts: int
    tokens: int
    """Tokens seen in training, prompts included, repeats counted."""
    prompts: str | None = None
    """A sketch of all prompts (documents, where nothing is asked), those kept out among them, see
    :mod:`offramp.sketch`; None where it was not made."""

    @field_validator("prompts")
    @classmethod
    def _is_sketch(cls, prompts: str | None) -> str | None:
        unpacked(prompts or "")
        return prompts


class Card(Record):
    """What ``offramp.json`` says."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    base: Base
    exits: tuple[Annotated[int, Field(ge=1)], ...]
    """Depths at which the model was taught to speak, ascending."""
    readouts: dict[int, ReadoutKind] = Field(default_factory=dict)
    """By depth; an exit that is not named is ``shared``."""
    teacher: str | None = None
    """Fingerprint of the model that was distilled, where that was not its own last layer; the
    recipe's settings have its name."""
    recipe: Recipe
    data: Data | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Return what it says, ready for JSON, without the sketch, which tells nobody anything."""
        return self.model_dump(mode="json", exclude={"data": {"prompts"}})


def read_card(folder: Path) -> Card | None:
    """Return the card of a tuned model, or None where the folder has none.

    Raises:
        OfframpError: it cannot be read or is no card; the first thing wrong is named.
    """
    path = folder / CARD
    return read_record(path, Card, "card of a tuned model") if path.is_file() else None


def write_card(folder: Path, card: Card) -> None:
    """Write ``offramp.json`` into a folder, whole or not at all.

    Raises:
        OfframpError: it cannot be written.
    """
    write_text(folder / CARD, card.model_dump_json(indent=2) + "\n")
