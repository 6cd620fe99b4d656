"""The score table: how well each way of running a model does on each text, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Annotated

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import OfframpError, UsageError
from offramp.files import write_tensors
from offramp.paths import check_parts
from offramp.plan import ModelId
from offramp.records import Record
from offramp.runs import Exit, Full, Path, Whole

LEAST_TEXTS = 20
"""Fewer texts than this say nothing of a budget: a bootstrap over them is no interval."""

_FORMAT = 1
_MOST_BYTES = 2**30


class Facts(Record):
    """What a table's file says beside its numbers."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    model: ModelId
    score: str
    """What the scores are, higher = better."""
    teacher_forced: bool
    """Whether every way was judged on the same text (one pass), not on text of its own."""
    runs: tuple[Whole, ...]
    exits: tuple[int, ...] = ()
    """Depths at which the features were seen."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N texts by P ways of running one model, cheapest way first.

    Raises:
        UsageError: parts that do not go together, or a score that is no number.
    """

    model: ModelId
    score: str
    teacher_forced: bool
    runs: tuple[Full | Exit | Path, ...]
    costs: Tensor
    """``[P]`` fp64: layers per token."""
    scores: Tensor
    """``[N, P]`` fp64, higher = better; the last way, the dearest, is what is to be equalled."""
    halves: Tensor | None = None
    """``[2, N, P]`` fp64: the same scores on either half of each text's tokens (held-out)."""
    null: Tensor | None = None
    """``[N, P]`` fp64: the last way P times under other seeds (see :mod:`~.oracle`)."""
    features: Tensor | None = None
    """``[N, F]`` fp32: what a router sees of each prompt."""
    exits: tuple[int, ...] = ()
    """Depths at which it looked."""

    def __post_init__(self) -> None:
        count, ways = len(self.scores), len(self.runs)
        if self.scores.shape != (count, ways) or self.costs.shape != (ways,) or not 2 <= ways <= 64:
            raise UsageError(
                f"a score table has a row per text and a column per way, 2 to 64 ways; this "
                f"one has {ways} ways, {len(self.costs)} costs and scores of shape "
                f"{tuple(self.scores.shape)}"
            )
        shapes = {"halves": (2, count, ways), "null": (count, ways)}
        for name, shape in shapes.items():
            part: Tensor | None = vars(self)[name]
            if part is not None and part.shape != shape:
                raise UsageError(f"the table's {name} have shape {tuple(part.shape)}, not {shape}")
        if self.features is not None and (self.features.ndim, len(self.features)) != (2, count):
            raise UsageError(f"the table has {count} texts, and features of other ones")
        costs = self.costs.tolist()
        if not all(0 < a <= b for a, b in pairwise(costs)) or not costs[-1] < float("inf"):
            raise UsageError(f"ways are listed by cost, cheapest first, not at {costs} layers")
        for name, part in self.tensors().items():
            _check_numbers(name, part)

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers by name, without those that are missing."""
        names = ("costs", "scores", "halves", "null", "features")
        return {name: vars(self)[name] for name in names if vars(self)[name] is not None}

    def must_be_of(self, backbone: Backbone) -> None:
        """Refuse another model than the one that was scored (UsageError)."""
        if self.model.fingerprint != backbone.fingerprint:
            raise UsageError(
                f"this table was made of {self.model.name} ({self.model.num_layers} layers, "
                f"fingerprint {self.model.fingerprint}), not of this model (fingerprint "
                f"{backbone.fingerprint})"
            )

    def must_allocate(self) -> None:
        """Refuse scores that say nothing of who should get which depth.

        Raises:
            UsageError: too few texts, or scores that do not differ between the ways.
        """
        must_be_enough(len(self.scores))
        if bool((self.scores == self.scores[:, :1]).all()):
            raise UsageError(
                "no text's score differs between the ways: there is nothing to allocate; try "
                "other exits or another score"
            )

    def with_features(self, features: Tensor, exits: tuple[int, ...]) -> ScoreTable:
        """Return the table with what a router saw at these depths of each prompt, ``[N, F]``."""
        return replace(self, features=features, exits=exits)

    def save(self, path: FilePath) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        facts = Facts(
            model=self.model,
            score=self.score,
            teacher_forced=self.teacher_forced,
            runs=self.runs,
            exits=self.exits,
        )
        parts = {name: part.contiguous() for name, part in self.tensors().items()}
        write_tensors(path, parts, {"offramp_table": facts.model_dump_json()})


def must_be_enough(texts: int) -> None:
    """Refuse fewer texts than an oracle can be asked of (UsageError)."""
    if texts < LEAST_TEXTS:
        raise UsageError(
            f"{texts} texts are too few to speak of a budget: {LEAST_TEXTS} or more are needed, "
            "and some hundreds for a router"
        )


def _check_numbers(name: str, part: Tensor) -> None:
    if not part.isfinite().all():
        place = (~part.isfinite()).nonzero()[0].tolist()
        raise UsageError(f"the table's {name} hold a value at {place} that is no finite number")


def load_table(path: FilePath) -> ScoreTable:
    """Return the score table in a file.

    Raises:
        OfframpError: it cannot be read, is no score table, or its parts do not go together.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})["offramp_table"]
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if json.loads(text)["format"] != _FORMAT:
            raise OfframpError(f"{path} is a score table of another format than {_FORMAT}")
        facts = Facts.model_validate_json(text)
        for run in facts.runs:
            if isinstance(run, Path):
                check_parts(run.layers, facts.model.num_layers)
        known = facts.model_dump(include={"score", "teacher_forced", "exits"})
        return ScoreTable(model=facts.model, runs=facts.runs, **known, **parts)
    except OSError as error:
        raise OfframpError(f"cannot read the table {path}: {error.strerror or error}") from error
    except UsageError as error:
        raise OfframpError(f"{path} is no usable score table: {error}") from error
    except (SafetensorError, ValidationError, KeyError, ValueError, TypeError) as error:
        raise OfframpError(f"{path} is no offramp score table") from error
