"""How an exit looks at its rows: with the whole vocabulary head, or with something cheaper.

A check decides only whether a token leaves. The token that leaves is chosen by the full head, which
runs once for it then (and was the check itself where the check is full), or by a short one where a
plan says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from offramp.backbone import Backbone, Shape
from offramp.errors import OfframpError, UsageError
from offramp.probe import Listed, Readout
from offramp.records import Record

_MOST = 2**31 - 1
_MOST_TOKENS = 2**18
"""Longest list of tokens: about the largest vocabulary there is."""
_MOST_BYTES = 2**23
"""Largest file of a list: so many tokens, written out, and much white space."""


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
        return _among(backbone, range(self.size), always)


class Tokens(Record):
    """Logits of the listed vocabulary entries only: those that a narrow task writes.

    The list stands in the plan itself, so that a plan means the same wherever it is read.
    """

    kind: Literal["tokens"] = "tokens"
    tokens: Annotated[
        tuple[Annotated[int, Field(ge=0, le=_MOST)], ...],
        Field(min_length=2, max_length=_MOST_TOKENS),
    ]
    """Token ids, ascending, each once."""

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in pairwise(tokens)):
            raise ValueError("token ids ascend, each once")
        return tokens

    def __str__(self) -> str:
        """Return its length and a digest: traces know by it whether two lists are one."""
        text = " ".join(map(str, self.tokens))
        return f"tokens:{len(self.tokens)}#{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def must_fit(self, shape: Shape) -> None:
        """Refuse tokens outside the vocabulary."""
        if self.tokens[-1] >= shape.vocab_size:
            raise UsageError(
                f"the list holds the token {self.tokens[-1]}, and the vocabulary ends at "
                f"{shape.vocab_size - 1}: count the tokens with this model's tokenizer"
            )

    def weights(self, shape: Shape) -> int:
        """Return the matrix weights that one row multiplies."""
        return len(self.tokens) * shape.hidden_size

    def look(self, backbone: Backbone) -> Readout | None:
        """Return the readout of these entries."""
        return backbone.shortlist(torch.tensor(self.tokens))

    def choose(self, backbone: Backbone, always: Iterable[int]) -> Readout | None:
        """Return a readout to choose tokens by: these entries, and those that must be possible."""
        return _among(backbone, self.tokens, always)


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


class Refined(Record):
    """All logits, by a rough look at the weights; those that may be the largest, once more exactly.

    So the token chosen is the full head's, but for an error of many standard errors at once. The
    other logits are near, no more: what samples, has a penalty or is scored is given the full head.
    """

    kind: Literal["refined"] = "refined"

    def __str__(self) -> str:
        return "refined"

    def must_fit(self, shape: Shape) -> None:
        """Accept any model."""

    def weights(self, shape: Shape) -> int:
        """Return the matrix weights that one row multiplies: all, held as roughly as int4 layers.

        Beside layers of another format this says too much: they are priced as those are.
        """
        return shape.head_weights

    def look(self, backbone: Backbone) -> Readout | None:
        """Return the readout by the rough head."""
        return backbone.refined()

    def choose(self, backbone: Backbone, always: Iterable[int]) -> Readout | None:
        """Return the same: every token is possible."""
        return backbone.refined()


class GateFile(Record):
    """No head at all: the gates in a file (see :mod:`offramp.gate`) judge the state itself."""

    kind: Literal["gate"] = "gate"
    file: str
    """Path of the gates, from the folder the program runs in."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """That of the gates, in a certified plan: others are refused. None for whatever is there."""

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


Check = FullHead | Shortlist | Tokens | LowRank | Refined | GateFile
Head = FullHead | Shortlist | Tokens | Refined
"""What may choose tokens."""

FULL_HEAD = FullHead()


def _among(backbone: Backbone, listed: Sequence[int], always: Iterable[int]) -> Readout:
    """Return a readout of logits ``[N, largest token + 1]``: -inf but for these tokens."""
    tokens = torch.tensor(sorted({*listed, *always}))
    short = backbone.shortlist(tokens)
    return short if len(tokens) == int(tokens[-1]) + 1 else Listed(short, tokens)


def read_tokens(path: Path) -> Tokens:
    """Return the list in a file: a JSON list of token ids, or ids with white space between them.

    Raises:
        OfframpError: it cannot be read, or holds anything else; repeats and any order are taken.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
        return Tokens(tokens=tuple(sorted(set(_numbers(raw)))))
    except OSError as error:
        raise OfframpError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OfframpError(
            f"{path} is no list of 2 to {_MOST_TOKENS} token ids: write them as a JSON list, or "
            "with white space between them"
        ) from error


def _numbers(raw: bytes) -> list[int]:
    """Return the numbers of a JSON list or of words; ValueError for anything else."""
    if len(raw) > _MOST_BYTES:
        raise ValueError
    text = raw.decode()
    if not text.lstrip().startswith("["):
        return [int(word) for word in text.split()]
    found = json.loads(text)
    if not all(type(one) is int for one in found):  # true is no token, nor is 3.0
        raise ValueError
    return list(found)


def parse_check(text: str) -> Check:
    """Return the check that ``--check`` names: a head's name, ``low-rank:RANK`` or ``gate:FILE``.

    Raises:
        UsageError: it names none.
        OfframpError: a list of tokens cannot be read.
    """
    kind, _, value = text.partition(":")
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    if kind == "low-rank" and number >= 1:
        return LowRank(rank=number)
    if kind == "gate" and value:
        return GateFile(file=value)
    found = _head(text)
    if found is None:
        raise UsageError(
            f"--check {text!r}: write full, refined, shortlist:SIZE (2 or more), tokens:FILE, "
            "low-rank:RANK or gate:FILE"
        )
    return found


def parse_head(text: str) -> Head:
    """Return the head that ``full``, ``refined``, ``shortlist:SIZE`` or ``tokens:FILE`` names.

    Raises:
        UsageError: it names none.
        OfframpError: a list of tokens cannot be read.
    """
    found = _head(text)
    if found is None:
        raise UsageError(
            f"--head {text!r}: write full, refined, shortlist:SIZE (2 or more) or tokens:FILE"
        )
    return found


def _head(text: str) -> Head | None:
    kind, _, value = text.partition(":")
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    if text == "full":
        return FULL_HEAD
    if text == "refined":
        return Refined()
    if kind == "shortlist" and number >= 2:
        return Shortlist(size=number)
    if kind == "tokens" and value:
        return read_tokens(Path(value))
    return None
