"""How long a layer, a head, a fill and a step take on this machine: measured once, and kept.

Time is not linear in rows: a pass reads its weights once, so a second row is nearly free until
arithmetic no longer hides behind memory. So each part has a table by rows. Attention is apart: a
row looks at keys, which a text's rows read together.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from offramp.backbone import Backbone
from offramp.batch import Span, Text
from offramp.errors import OfframpError
from offramp.files import cache_dir, write_text
from offramp.machine import processor
from offramp.policy import FULL, Policy, Threshold
from offramp.step import step

ROWS = (1, 4, 16, 64, 256, 2, 8, 32, 128, 512, 3, 5, 6, 12, 24)
"""Rows at which a layer is timed, the most telling first: a slow backbone gets fewer of them."""
_MOST_READ = 64
"""A head or a fill rarely takes more rows; beyond, arithmetic binds, and time is linear."""
_LONG = 2048
"""Keys of the long text, by which the time of attention is found."""
_SETTLED = 3
"""Passes after which a cache keeps what it will keep of few layers."""
_FEW = 32
"""Vocabulary entries that a check looks through, to see what it takes beside them."""
_TOGETHER = 4
"""Rows that look at the long text together."""
_BUDGET = 8.0
"""Seconds that measuring should take; a slow backbone takes longer for one look at each point."""
_FEWEST, _TURNS = 20, 21
"""Points always timed (three numbers of rows); looks at each point after the first."""
_BYTES = 2**20
"""More than a file of constants could have."""

Clock = Callable[[], float]
Told = Callable[[float], object]
"""Is called with the share of the measuring that is done, 0 to 1."""

Seconds = Annotated[float, Field(ge=0)]
Rows = Annotated[int, Field(ge=1)]


def _ascending(table: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    rows = [count for count, _ in table]
    if rows != sorted(set(rows)):
        raise ValueError("rows must ascend")
    return table


Table = Annotated[
    tuple[tuple[Rows, Seconds], ...], Field(min_length=1, max_length=64), AfterValidator(_ascending)
]
"""(rows, seconds) of one call, ascending by rows."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Constants(_Record):
    """Seconds of each part of a step, on one machine, by one backbone."""

    layer: Table
    """One layer, for the first rows of one text: attention to each other is in it."""
    pair: Seconds
    """One row looking at one more key, in one layer: arithmetic."""
    key: Seconds
    """One more key in one layer, once for all rows of its text: memory."""
    head: Table
    """One readout."""
    fill: Table
    """One layer, only for its keys and values."""
    path: Table
    """(layers, seconds): so many layers and the head, again and again, one row. Of few layers a
    processor's cache keeps a part from step to step."""
    bare: Table
    """The same without the head: fewer weights yet."""
    step: Seconds
    """What a step takes beside layers and head: preparing, embedding, looping, choosing."""
    ask: Seconds
    """What asking at an exit takes beside reading the check's weights: meeting and scoring."""

    def layer_seconds(self, rows: float, context: int = 0) -> float:
        """Return seconds of one layer for ``rows`` new rows of a text of ``context`` tokens."""
        return at(self.layer, rows) + context * (self.pair * rows + self.key)

    def head_seconds(self, rows: float) -> float:
        """Return seconds of one readout."""
        return at(self.head, rows)

    def fill_seconds(self, rows: float) -> float:
        """Return seconds of making one layer's keys and values."""
        return at(self.fill, rows)

    def kept_seconds(self, depth: float, heads: float = 1.0) -> float:
        """Return what a step takes more (mostly less, so negative) than its parts among all others.

        That is what a cache keeps of them. How much it keeps goes by the weights that a step reads:
        ``depth`` layers and ``heads`` readouts (0.1 is a short head), in seconds of one row.
        """
        again = [(self._apart(count, 1), seconds) for count, seconds in self.path]
        again += [(self._apart(count, 0), seconds) for count, seconds in self.bare]
        apart = self._apart(depth, heads)
        return at(sorted([(0.0, 0.0), *again]), apart) - apart

    def _apart(self, depth: float, heads: float) -> float:
        return depth * self.layer_seconds(1) + heads * self.head_seconds(1)

    def summary(self) -> dict[str, object]:
        """Return the figures a person asks for first, ready for JSON; microseconds, and layers."""
        layer = self.layer_seconds(1)
        return {
            "layer_microseconds": {str(rows): 1e6 * seconds for rows, seconds in self.layer},
            "head_microseconds": 1e6 * self.head_seconds(1),
            "step_microseconds": 1e6 * self.step,
            "ask_microseconds": 1e6 * self.ask,
            "key_microseconds": 1e6 * (self.pair + self.key),
            "check_in_layers": self.head_seconds(1) / layer if layer else None,
            "fill_in_layers": self.fill_seconds(1) / layer if layer else None,
        }


def at(table: Sequence[tuple[float, float]], x: float) -> float:
    """Return the seconds for ``x`` rows: a line between neighbours, proportional at the end."""
    i = bisect_left(table, x, key=lambda point: point[0])
    if i == len(table):
        last, seconds = table[-1]
        return seconds * x / last if last else seconds
    if i == 0:
        return table[0][1]
    (low, before), (high, after) = table[i - 1], table[i]
    return before + (after - before) * (x - low) / (high - low)


# -- kept per model, backbone and machine


class _Kept(_Record):
    format: Literal[3] = 3
    of: dict[str, str]
    constants: Constants


def constants(backbone: Backbone, told: Told = lambda _share: None) -> Constants:
    """Return this backbone's constants on this machine, measured if no one has done so yet.

    They are kept in the user's cache; where that cannot be written, they are measured every time.
    """
    found = known(backbone)
    if found is None:
        found = measure(backbone, told=told)
        with suppress(OfframpError, OSError):
            path = _path(backbone)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _Kept(of=_of(backbone), constants=found)
            write_text(path, kept.model_dump_json() + "\n")
    return found


def known(backbone: Backbone) -> Constants | None:
    """Return the constants kept for this backbone on this machine, or None; measures nothing."""
    try:
        with _path(backbone).open("rb") as file:
            kept = _Kept.model_validate_json(file.read(_BYTES))
    except (OSError, ValidationError):  # not there, half a file, or another version's
        return None
    return kept.constants if kept.of == _of(backbone) else None


def _path(backbone: Backbone) -> Path:
    digest = hashlib.sha256(repr(sorted(_of(backbone).items())).encode())
    return cache_dir() / f"timing-{digest.hexdigest()[:16]}.json"


def _of(backbone: Backbone) -> dict[str, str]:
    """Return all that times depend on."""
    return {
        "fingerprint": backbone.fingerprint,
        "backbone": backbone.name,
        "weights": backbone.weights,
        "build": backbone.build,
        "layers": str(backbone.shape.num_layers),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "processor": processor(),
    }


# -- measuring

_Point = tuple[str, int]


def measure(
    backbone: Backbone, *, clock: Clock = time.perf_counter, told: Told = lambda _share: None
) -> Constants:
    """Return the constants of a backbone by timing it, all points in turn, medians.

    No point may take more than its share of the budget, so a long one, which averages over more of
    what else the machine does, is looked at less often.

    Args:
        backbone: what to time; its meter goes on counting.
        clock: seconds, from any moment.
        told: hears how far it is.
    """
    stand, begin = Stand(backbone, clock), clock()
    try:
        first: dict[_Point, float] = {}  # warm-up, but where nothing else is
        for point in stand.points():
            if len(first) >= _FEWEST and clock() - begin > _BUDGET / 4:
                break
            first[point] = stand.time(*point)
        share = _BUDGET / len(first)
        for turn in range(1, _TURNS + 1):
            for point in first:
                if clock() - begin < _BUDGET and sum(stand.samples[point]) < share:
                    stand.look(point)
            told(max(turn / _TURNS, min((clock() - begin) / _BUDGET, 1.0)))
        for point, seconds in first.items():
            if not stand.samples[point]:
                stand.samples[point] = [seconds]
        return stand.constants()
    finally:
        stand.close()


class Stand:
    """Times parts of a backbone on two texts of its own: an empty one and a long one.

    Every look at layers runs all of them, so that each finds its weights where a step finds them
    (one layer alone would sit in a cache).
    """

    def __init__(self, backbone: Backbone, clock: Clock = time.perf_counter) -> None:
        shape = backbone.shape
        self.backbone, self.clock = backbone, clock
        self.path = range(shape.num_layers)
        self.long = min(_LONG, shape.context // 2)
        self.most = max(shape.context // 2, 1)
        ids = [7919 * i % shape.vocab_size for i in range(self.long + max(ROWS))]  # all different
        self.texts = {0: Text(ids, backbone.open())}
        if self.long:
            self.texts[self.long] = Text(ids, backbone.open())
            spans = (Span(self.texts[self.long], 0, self.long),)
            backbone.fill(self.path, backbone.embed(spans), spans)  # any keys will do
        self.samples: dict[_Point, list[float]] = defaultdict(list)

    def look(self, point: _Point) -> None:
        """Time one point, and keep what it took."""
        self.samples[point].append(self.time(*point))

    def constants(self) -> Constants:
        """Return what the points looked at say, by their medians."""
        return _fitted(self, {point: median(times) for point, times in self.samples.items()})

    def points(self) -> list[_Point]:
        """Return what to time, the most telling first."""
        rows = [n for n in ROWS if n <= self.most or n == 1]
        long = [("long", n) for n in (1, min(_TOGETHER, self.most)) if self.long]
        parts = [
            (part, n)
            for n in rows
            for part in ("layers", "head", "fill")
            if part == "layers" or n <= _MOST_READ
        ]
        depth = len(self.path)
        paths = [("path", max(depth * fifths // 5, 1)) for fifths in (2, 5, 1, 3, 4)]
        bare = [("bare", max(depth * fifths // 5, 1)) for fifths in (2, 1)]
        return [("step", 1), ("ask", 1), *dict.fromkeys((*long, *paths, *bare)), *parts]

    def time(self, part: str, rows: int) -> float:
        """Return the seconds of one call; for a step, those outside its layers and head.

        For asking, those of one check among few entries: of asking wherever no exit owns anything,
        for alone it would be lost in what a step takes more and less.
        """
        match part:
            case "ask":
                return self._asked()
            case "step":
                self._step()  # a loop runs again and again, too
                return self._step()
            case "head":
                hidden = self.backbone.embed([Span(self.texts[0], 0, rows)])
                return self._timed(lambda: self.backbone.readout(hidden, len(self.path)))
            case "path" | "bare":
                for _ in range(_SETTLED):
                    self._path(rows, reads=part == "path")
                return self._path(rows, reads=part == "path")
            case "long":
                return self._pass(self.backbone.run, self.long, rows)
            case "fill":
                return self._pass(self.backbone.fill, 0, rows)
            case _:
                return self._pass(self.backbone.run, 0, rows)

    def close(self) -> None:
        """Give the slots back."""
        for text in self.texts.values():
            self.backbone.close(text.slot)

    def _pass(self, run: Callable[..., object], start: int, rows: int) -> float:
        text = self.texts[start]
        spans = (Span(text, start, start + rows),)
        hidden = self.backbone.embed(spans)
        seconds = self._timed(lambda: run(self.path, hidden, spans))
        self.backbone.trim(text.slot, start)
        return seconds

    def _path(self, depth: int, *, reads: bool) -> float:
        spans = (Span(self.texts[0], 0, 1),)
        hidden, path = self.backbone.embed(spans), self.path[:depth]

        def call() -> None:
            states = self.backbone.run(path, hidden, spans)
            if reads:
                self.backbone.readout(states, depth)

        seconds = self._timed(call)
        self.backbone.trim(self.texts[0].slot, 0)
        return seconds

    def _asked(self) -> float:
        backbone, depth = self.backbone, len(self.path)
        own = {*backbone.apart, *backbone.blocks}
        exits = [stop for stop in range(1, depth) if stop not in own]
        if not exits:
            return 0.0
        never = Threshold("max_prob", tuple((stop, math.inf) for stop in exits))
        few = backbone.shortlist(torch.arange(min(_FEW, backbone.shape.vocab_size)))

        def once(policy: Policy) -> float:
            text = Text(self.texts[0].ids[:1], self.texts[0].slot)
            seconds = self._timed(lambda: step(backbone, [text], policy, look=few))
            backbone.trim(text.slot, 0)
            return seconds

        once(never)  # a plain step and one that asks, both after one of their kind
        asking = once(never)
        once(FULL)
        return (asking - once(FULL)) / len(exits)

    def _step(self) -> float:
        text = Text(self.texts[0].ids[:1], self.texts[0].slot)
        inside = _Inside(self.backbone, self.clock)
        seconds = self._timed(
            lambda: step(cast("Backbone", inside), [text]).logits.argmax(-1).tolist()
        )
        self.backbone.trim(text.slot, 0)
        return seconds - inside.seconds

    def _timed(self, call: Callable[[], object]) -> float:
        begin = self.clock()
        call()
        return self.clock() - begin


class _Inside:
    """A backbone that adds up the seconds spent in its layers and its head."""

    def __init__(self, backbone: Backbone, clock: Clock) -> None:
        self._backbone, self._clock = backbone, clock
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def run(self, *args: Any) -> Any:
        """Run layers, timed."""
        return self._add(self._backbone.run, args)

    def run_until(self, *args: Any) -> Any:
        """Run segments, timed."""
        return self._add(self._backbone.run_until, args)

    def readout(self, *args: Any) -> Any:
        """Read out, timed."""
        return self._add(self._backbone.readout, args)

    def _add(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        begin = self._clock()
        result = call(*args)
        self.seconds += self._clock() - begin
        return result


def _fitted(stand: Stand, seconds: dict[_Point, float]) -> Constants:
    depth = len(stand.path)

    def table(part: str, calls: int) -> tuple[tuple[int, float], ...]:
        found = sorted((n, value / calls) for (name, n), value in seconds.items() if name == part)
        return tuple(found)

    layer = table("layers", depth)
    pair, key = _attention(
        [
            (n, max(value / depth - at(layer, n), 0.0) / stand.long)
            for (part, n), value in seconds.items()
            if part == "long"
        ]
    )
    return Constants(
        layer=layer,
        pair=pair,
        key=key,
        head=table("head", 1),
        fill=table("fill", depth),
        path=table("path", 1),
        bare=table("bare", 1),
        step=max(seconds["step", 1], 0.0),
        ask=max(seconds["ask", 1], 0.0),
    )


def _attention(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Return (per row and key, per key) of ``(rows, seconds per key)`` of one row and of several.

    Neither is negative; both together are what one row takes.
    """
    if not points:
        return 0.0, 0.0
    (_, alone), (rows, together) = points[0], points[-1]
    pair = (together - alone) / (rows - 1) if rows > 1 else alone
    pair = min(max(pair, 0.0), alone)
    return pair, alone - pair
