"""The settings of a tuning run: what identifies it, and what a resumed run must share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from offramp.card import ReadoutKind
from offramp.errors import UsageError
from offramp.records import Record

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Settings(Record):
    """How a model is tuned. All of it changes the result, so a run goes on only with the same."""

    recipe: str
    exits: tuple[Count, ...] = ()
    """Depths taught to speak, ascending, without the last layer."""
    readout: ReadoutKind = "shared"
    """What reads the exits out; one of their own is trained along, or alone (``heads``)."""
    each_step: Literal["all", "rotate", "sample"] = "all"
    """Which exits a step trains: all; one in turn, weighted as all together (LayerSkip's rotation);
    or one sub-model drawn at random, the whole model among them (SortedNet)."""
    distill: Share = 0.0
    """Share of each exit's loss that is the divergence from the teacher, not the labels."""
    teacher: Annotated[str, Field(min_length=1)] = "last"
    """Who is distilled: ``last``, the model's own last layer; ``base``, the model as it was before
    tuning; else the name of another model, of any depth and width, with the same vocabulary."""
    lora: Annotated[int, Field(ge=0, le=4096)] = 0
    """Rank of the adapters that are trained in place of all weights; 0 trains all weights."""
    lora_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the first layers get adapters; 0 gives all of them some."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the executed share of layers in the loss of the recipe ``skip``."""
    gate_input: Literal["hidden", "fixed"] = "hidden"
    """What the gates of ``skip`` see: the state, or ones (its ablation: a learnt static share)."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-5
    warmup: Share = 0.03
    """Share of the steps in which the rate climbs; then it falls to 0 along a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a step's gradient."""
    length: Annotated[int, Field(ge=2, le=2**20)] = 512
    """Tokens of a packed row; longer answers are cut."""
    rows: Count = 16
    """Packed rows of one optimiser step, over all processes."""
    rows_at_once: Count = 4
    """Packed rows that one process holds at once; changes memory, hardly the result."""
    epochs: Count = 1
    tokens: Count | None = None
    """End after this many tokens, padding not counted; epochs then say nothing."""
    held_out: Annotated[int, Field(ge=0)] = 100
    """Examples that are kept out of training, for the report."""
    seed: int = 0
    rounding: Literal["none", "int4"] = "none"
    """Train the layers through this rounding, which is then in the weights that come out."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the arithmetic, auto: bf16 where the machine multiplies it; weights are held in fp32."""
    raw: bool = False
    """Do not use the chat template."""
    answers: str | None = None
    """Who answers the prompts of the data in place of the data: ``self``, or another model."""
    answer_tokens: Count = 128
    """Most tokens of such an answer."""
    answer_weights: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How the one who answers holds its weights."""


def make_settings(**options: Any) -> Settings:
    """Return the settings that options of the command line name.

    Raises:
        UsageError: a value is out of range; the option is named.
    """
    try:
        return Settings(**options)
    except ValidationError as error:
        wrong = error.errors()[0]
        option = str(wrong["loc"][0]).replace("_", "-")
        said = wrong["msg"].removeprefix("Input ")
        raise UsageError(f"--{option}: {wrong['input']} {said}") from error
