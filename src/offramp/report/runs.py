"""What a report reads of the JSON of each verb, strictly typed; and the curve anybody can feed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from offramp.records import Record

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

    verb: Literal["bench"]
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


class Estimate(Result):
    """A mean, or a median, with its interval or its quartiles."""

    mean: float = Field(validation_alias=AliasChoices("mean", "median"))
    low: float
    high: float


class ScoreRow(Result):
    """One score of a task: the plan's, full depth's and the paired difference."""

    score: str
    against: str
    plan: Estimate
    full: Estimate
    difference: Estimate
    verdict: str


class JudgedTask(Result):
    """One task of a comparison: a point, and full depth beside it."""

    task: str
    items: Count
    left_out: Count
    mean_depth: float
    flops_ratio: float
    tokens: dict[str, Count]
    time_ratio: Estimate
    time_per_token_ratio: Estimate
    scores: tuple[ScoreRow, ...]
    curve: Curve


class EvaluateRun(Result):
    """What ``evaluate`` printed."""

    verb: Literal["evaluate"]
    model: str
    num_layers: Annotated[int, Field(ge=1)]
    plan: dict[str, Any]
    tasks: tuple[JudgedTask, ...]
    machine: dict[str, Any]


class CurveRun(Result):
    """Any other result that brings a curve."""

    verb: str = ""
    model: str = ""
    curve: Curve


Run = Generated | TraceRun | BenchRun | TuneRun | EvaluateRun | CurveRun
