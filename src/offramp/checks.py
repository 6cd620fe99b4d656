"""How an exit looks at its rows: with the whole vocabulary head, or with something cheaper.

A check decides only whether a token leaves. The token that leaves is always chosen by the full
head, which runs once for it then (and was the check itself where the check is full).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from offramp.backbone import Backbone, Shape
from offramp.errors import UsageError
from offramp.probe import Readout

_MOST = 2**31 - 1


class Record(BaseModel):
    """Base of what is stored as JSON: frozen, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FullHead(Record):
    """Logits of the whole vocabulary."""

    kind: Literal["full"] = "full"

    def __str__(self) -> str:
        return "full"

    def must_fit(self, shape: Shape) -> None:
        """Accept any model."""

    def weights(self, shape: Shape) -> int:
        """Return the matrix weights that one row multiplies beside the full head's: none."""
        return 0

    def look(self, backbone: Backbone) -> Readout | None:
        """Return None: the check sees what chooses the token."""
        return None

    def choose(self, backbone: Backbone, always: Iterable[int]) -> Readout | None:
        """Return None: the backbone's own readout."""
        return None


class Shortlist(Record):
    """Logits of the first ``size`` vocabulary entries only.

    A byte-pair vocabulary is in the order of its merges, which is roughly that of frequency, so no
    text has to be counted.
    """

    kind: Literal["shortlist"] = "shortlist"
    size: Annotated[int, Field(ge=2, le=_MOST)]

    def __str__(self) -> str:
        return f"shortlist:{self.size}"

    def must_fit(self, shape: Shape) -> None:
        """Refuse a list longer than the vocabulary."""
        if self.size > shape.vocab_size:
            raise UsageError(
                f"a shortlist of {self.size} is longer than the vocabulary of {shape.vocab_size}"
            )

    def weights(self, shape: Shape) -> int:
        """Return the matrix weights that one row multiplies."""
        return self.size * shape.hidden_size

    def look(self, backbone: Backbone) -> Readout | None:
        """Return the readout of these entries."""
        return backbone.shortlist(torch.arange(self.size))

    def choose(self, backbone: Backbone, always: Iterable[int]) -> Readout | None:
        """Return a readout to choose tokens by: these entries, and those that must be possible."""
        extra = sorted({token for token in always if token >= self.size})
        short = backbone.shortlist(torch.tensor([*range(self.size), *extra]))
        if not extra:
            return short

        def readout(hidden: Tensor, depth: int) -> Tensor:
            found = short(hidden, depth)
            logits = found.new_full((len(found), extra[-1] + 1), -math.inf)
            logits[:, : self.size] = found[:, : self.size]
            logits[:, extra] = found[:, self.size :]
            return logits

        return readout


class LowRank(Record):
    """Approximate logits of the whole vocabulary: the head's best approximation of this rank."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Annotated[int, Field(ge=1, le=_MOST)]

    def __str__(self) -> str:
        return f"low-rank:{self.rank}"

    def must_fit(self, shape: Shape) -> None:
        """Refuse a rank larger than the width of the model."""
        if self.rank > shape.hidden_size:
            raise UsageError(
                f"a head of rank {self.rank} is no cheaper than the full one: the model is "
                f"{shape.hidden_size} wide"
            )

    def weights(self, shape: Shape) -> int:
        """Return the matrix weights that one row multiplies."""
        return self.rank * (shape.hidden_size + shape.vocab_size)

    def look(self, backbone: Backbone) -> Readout | None:
        """Return the readout by the approximate head."""
        return backbone.low_rank(self.rank)


class GateFile(Record):
    """No head at all: the gates in a file (see :mod:`offramp.gate`) judge the state itself."""

    kind: Literal["gate"] = "gate"
    file: str
    """Path of the gates, from the folder the program runs in."""

    def __str__(self) -> str:
        return f"gate:{self.file}"

    def must_fit(self, shape: Shape) -> None:
        """Accept any model: the gates in the file know theirs."""

    def weights(self, shape: Shape) -> int:
        """Return 0: one product per width of the state is nothing beside a layer's thousands."""
        return 0

    def look(self, backbone: Backbone) -> Readout | None:
        """Return None: a gate looks at no logits."""
        return None


Check = FullHead | Shortlist | LowRank | GateFile
Head = FullHead | Shortlist
"""What may choose tokens."""

FULL_HEAD = FullHead()


def parse_check(text: str) -> Check:
    """Return the check that ``full``, ``shortlist:SIZE``, ``low-rank:RANK`` or ``gate:FILE`` names.

    Raises:
        UsageError: it names none.
    """
    kind, _, value = text.partition(":")
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    if text == "full":
        return FULL_HEAD
    if kind == "shortlist" and number >= 2:
        return Shortlist(size=number)
    if kind == "low-rank" and number >= 1:
        return LowRank(rank=number)
    if kind == "gate" and value:
        return GateFile(file=value)
    raise UsageError(
        f"--check {text!r}: write full, shortlist:SIZE (2 or more), low-rank:RANK or gate:FILE"
    )


def parse_head(text: str) -> Head:
    """Return the head that ``full`` or ``shortlist:SIZE`` names.

    Raises:
        UsageError: it names none.
    """
    kind, _, value = text.partition(":")
    if text == "full":
        return FULL_HEAD
    if kind == "shortlist" and value.isascii() and value.isdigit() and 2 <= int(value[:10]) < _MOST:
        return Shortlist(size=int(value[:10]))
    raise UsageError(f"--head {text!r}: write full or shortlist:SIZE (2 or more)")
