"""Reads the JSON of runs, and refuses what is none. Of each kind only what a report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from offramp.errors import OfframpError
from offramp.records import Record
from offramp.report import FORMAT

_MOST_BYTES = 2**26

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Result(Record):
    """Base of what verbs print: it holds more than a report shows."""

    model_config = ConfigDict(extra="ignore")


class Point(Record):
    """A way of running the model: what it costs, and how good it is."""

    name: str
    cost: Annotated[float, Field(ge=0)]
    """In units of full depth: 1 costs as much."""
    quality: float
    """Higher is better."""
    low: float | None = None
    high: float | None = None
    """The quality's interval, where there is one."""
    note: str = ""
    """What to say of it, such as what it was certified for."""


class Curve(Record):
    """Quality against cost; what anybody can feed (docs/report.md)."""

    quality: str
    """What quality is, in words."""
    cost: str
    """What cost is, in words; in units of full depth."""
    points: tuple[Point, ...]
    full: Point
    """Full depth, the reference."""


class Bin(Result):
    """Tokens of one bin of confidence."""

    tokens: Count
    confidence: float
    agreement: float


class ExitRow(Result):
    """Means at one exit."""

    depth: Count
    agreement: float | None = None
    reliability: tuple[Bin, ...] = ()


class Answer(Result):
    """One answer of ``generate``."""

    prompt: str | tuple[dict[str, str], ...]
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    depths: tuple[int, ...]
    accepted: tuple[bool, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.token_ids) == len(self.pieces) == len(self.depths) == len(self.accepted):
            raise ValueError("token_ids, pieces, depths and accepted differ in length")
        return self


class Generated(Result):
    """What ``generate`` printed."""

    verb: Literal["generate"]
    model: str
    plan: dict[str, Any]
    num_layers: Annotated[int, Field(ge=1)]
    raw: bool
    backbone: str
    weights: str
    tokens: Count
    seconds: float
    flops_ratio: float | None
    bytes_ratio: float | None
    predicted_ratio: float | None
    drafted: Count
    accepted: Count
    versions: dict[str, str]
    machine: dict[str, Any]
    outputs: tuple[Answer, ...]


class Traced(Result):
    """One text of a trace, token by token; rows are its counted tokens."""

    prompt: str | tuple[dict[str, str], ...]
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    depths: tuple[int, ...] | None
    """Layers that chose each token when the plan was replayed."""
    chosen: tuple[tuple[int, ...], ...]
    """What each exit, and the last layer, would have said of each token."""
    scores: dict[str, tuple[tuple[float, ...], ...]]
    """Signals at each exit, by name."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        columns = (self.pieces, self.chosen, self.depths or self.token_ids, *self.scores.values())
        if any(len(column) != len(self.token_ids) for column in columns):
            raise ValueError("the columns of a text differ in length")
        return self


class TraceRun(Result):
    """What ``trace`` printed."""

    verb: Literal["trace"]
    model: str
    plan: dict[str, Any]
    num_layers: Annotated[int, Field(ge=1)]
    tokens: Count
    exits: tuple[int, ...]
    rows: tuple[ExitRow, ...]
    texts: tuple[Traced, ...]
    vocabulary: dict[int, str]
    curve: Curve
    versions: dict[str, str]
    machine: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        wide = len(self.exits)
        for text in self.texts:
            if any(len(row) != wide + 1 for row in text.chosen) or any(
                len(row) != wide for column in text.scores.values() for row in column
            ):
                raise ValueError("a text's rows do not have a column for each exit")
        return self


class Timed(Result):
    """One contestant of a bench."""

    name: str
    batch: Count
    context: Count
    lossless: bool
    reason: str | None
    decode_tokens_per_second: float | None = None
    decode_quartiles: tuple[float, float] | None = None
    ratio_to_full: float | None = None
    mismatches: int | None = None
    compared: int | None = None


class BenchRun(Result):
    """What ``bench`` printed."""

    verb: Literal["bench"] = "bench"
    model: str
    rounds: Count
    rows: tuple[Timed, ...]
    versions: dict[str, str]
    machine: dict[str, Any]


class TuneRun(Result):
    """What ``tune`` printed: figures of each exit by the name of the text, before and after."""

    verb: Literal["tune"]
    model: str
    before: dict[str, tuple[ExitRow, ...]]
    after: dict[str, tuple[ExitRow, ...]]


class CurveRun(Result):
    """Any other result that brings a curve."""

    verb: str = ""
    model: str = ""
    curve: Curve


Run = Generated | TraceRun | BenchRun | TuneRun | CurveRun

_KINDS: dict[str, type[Run]] = {
    "generate": Generated,
    "trace": TraceRun,
    "bench": BenchRun,
    "tune": TuneRun,
}


def read_run(path: Path) -> Run:
    """Return the run in a JSON file.

    Raises:
        OfframpError: it cannot be read, is no run, is of another version, or holds nothing to show.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OfframpError(f"{path} is too large for a run: over {_MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
        found = json.loads(content)
    except OSError as error:
        raise OfframpError(f"cannot read the run {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OfframpError(
            f"{path} is no run: it is not JSON; offramp VERB --json prints it"
        ) from error
    if not isinstance(found, dict):
        raise OfframpError(f"{path} is no run: it holds no JSON object")
    version = found.get("format", FORMAT)
    if version != FORMAT:
        raise OfframpError(
            f"{path} is a result of format {str(version)[:20]}, and this offramp reads {FORMAT}: "
            "make it again, or use the version that made it"
        )
    return _checked(path, _kind(path, found), content)


def _kind(path: Path, found: dict[str, Any]) -> type[Run]:
    verb = found.get("verb", "bench" if "rounds" in found else None)
    if isinstance(verb, str) and verb in _KINDS:
        return _KINDS[verb]
    if "curve" in found:
        return CurveRun
    if "outputs" in found:
        raise OfframpError(f"{path} was made before reports were: generate it again")
    raise OfframpError(
        f"{path} is no run that a report can show: give the JSON of generate, trace, bench or "
        "tune, or one with a 'curve'"
    )


def _checked(path: Path, kind: type[Run], content: bytes) -> Run:
    try:
        run = kind.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise OfframpError(
            f"{path} is no run: {where + ': ' if where else ''}{wrong['msg']}"
        ) from error
    match run:
        case Generated(outputs=()) | TraceRun(texts=()) | BenchRun(rows=()):
            raise OfframpError(f"{path} holds no examples: there is nothing to show")
    return run
