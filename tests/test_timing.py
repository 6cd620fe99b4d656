"""Times: known costs are found again, predict what the loops take, and are kept whole or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from offramp import timing
from offramp.backbone import Backbone, Shape
from offramp.batch import Span
from offramp.checks import Shortlist
from offramp.cost import Figures, exit_ratio, full_depth, path_ratio, seconds, speculation_ratio
from offramp.decode import decode
from offramp.inspection import at_best
from offramp.meter import Meter
from offramp.policy import Threshold, fixed
from offramp.request import Request, Token
from offramp.runs import Exit, Full, Run, Speculate
from offramp.runs import Path as SubModel
from offramp.speculate import Draft, speculate
from offramp.timing import ROWS, Constants, at, measure
from tests.test_cost import Counting
from tests.tools import BOTH, assert_sums, collected, opened, texts_of

LAW = settings(max_examples=40, deadline=None)
LAYERS = 5
SHAPE = Shape(
    num_layers=LAYERS,
    hidden_size=1,
    vocab_size=2,
    context=4096,
    layer_weights=3,
    head_weights=6,
    kv_weights=1,
    fill_weights=1,
    attention_size=1,
    bytes_per_weight=1,
    kv_bytes=4,
    head_bytes_per_weight=1,
)


@dataclass(frozen=True)
class Costs:
    """What the parts of the fake take, in seconds: a call, and each row of it."""

    layer: tuple[float, float] = (3e-3, 1e-3)
    head: tuple[float, float] = (2e-3, 5e-4)
    fill: tuple[float, float] = (4e-4, 1e-4)
    pair: float = 0.0
    key: float = 0.0
    step: float = 7e-4
    ask: float = 0.0


class Clockwork(Counting):
    """A backbone without a model whose parts take known times on a clock of its own."""

    def __init__(self, costs: Costs, shape: Shape = SHAPE, *, right: bool = True) -> None:
        super().__init__(shape, (lambda _: 0) if right else lambda depth: int(depth == LAYERS))
        self.costs, self.ragged, self.fingerprint = costs, True, "clockwork"
        self.halves = False
        self.spent, self.calls, self.slots = 0.0, 0, 0

    @property
    def now(self) -> float:
        """Return the seconds since the beginning, those of asking at exits among them."""
        return self.spent + self.costs.ask * self.meter.tally.asks

    def clock(self) -> float:
        """Return the time here."""
        return self.now

    def open(self) -> object:
        self.slots += 1
        return object()

    def close(self, slot: object) -> None:
        self.slots -= 1

    def _take(self, price: tuple[float, float], rows: int) -> None:
        self.calls += 1
        self.spent += price[0] + price[1] * rows

    def embed(self, spans: Sequence[Span]) -> Tensor:
        self.spent += self.costs.step
        return super().embed(spans)

    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        for _ in layers:
            self._take(self.costs.layer, len(hidden))
            for span in spans:
                pairs = sum(p + 1 for p in range(span.start, span.stop))
                self.spent += self.costs.pair * pairs + self.costs.key * span.stop
        self.meter.ran(len(layers), spans)
        return hidden

    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        for _ in layers:
            self._take(self.costs.fill, len(hidden))
        self.meter.filled(len(layers), len(hidden))

    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        self._take(self.costs.head, len(hidden))
        return super().readout(hidden, depth)


times = st.floats(1e-5, 1e-2)
prices = st.tuples(times, times)
small = st.floats(0, 1e-6)
apart = st.floats(0, 1e-2)
costs = st.builds(
    Costs, layer=prices, head=prices, fill=prices, pair=small, key=small, step=apart, ask=apart
)


def constants_of(work: Costs) -> Constants:
    """The constants that these costs are, by hand."""

    def line(price: tuple[float, float], most: int) -> tuple[tuple[int, float], ...]:
        return tuple((n, price[0] + price[1] * n) for n in sorted(ROWS) if n <= most)

    layer = tuple(
        (n, value + work.pair * n * (n + 1) / 2 + work.key * n)
        for n, value in line(work.layer, 512)
    )
    head = line(work.head, 64)
    depths = sorted({max(SHAPE.num_layers * fifths // 5, 1) for fifths in range(1, 6)})
    return Constants(
        layer=layer,
        pair=work.pair,
        key=work.key,
        head=head,
        fill=line(work.fill, 64),
        path=tuple((depth, depth * layer[0][1] + head[0][1]) for depth in depths),
        bare=tuple((depth, depth * layer[0][1]) for depth in depths[:2]),
        step=work.step,
        ask=work.ask,
    )


# -- what the meter remembers

stretches = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda pair: range(pair[0], sum(pair))),
    min_size=1,
    max_size=4,
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("ran"), st.integers(1, 4), stretches),
        st.tuples(st.just("filled"), st.integers(1, 4), st.integers(1, 9)),
        st.tuples(st.just("read"), st.integers(1, 9)),
    ),
    max_size=12,
)


def replayed(told: list[tuple[object, ...]], meter: Meter) -> None:
    """Tell the meter these events."""
    for name, *arguments in told:
        getattr(meter, str(name))(*arguments)


@given(events, events)
def test_tallies_add_up_and_differences_are_what_came_between(
    before: list[tuple[object, ...]], after: list[tuple[object, ...]]
) -> None:
    """Of any passes; a copy stays as it was; attended keys are p + 1 for each position."""
    meter, apart = Meter(), Meter()
    replayed(before, meter)
    earlier = meter.copy()
    replayed(after, meter)
    replayed(after, apart)
    assert_sums(meter)
    assert apart == meter - earlier
    again = Meter()
    replayed(before, again)
    assert again == earlier
    passes = [(e[1], e[2]) for e in after if e[0] == "ran"]
    assert apart.attended == sum(n * (p + 1) for n, spans in passes for s in spans for p in s)  # type: ignore[attr-defined]
    assert apart.tally.keys == sum(n * s.stop for n, spans in passes for s in spans)  # type: ignore[attr-defined]


# -- from work to seconds


def test_seconds_are_the_hand_arithmetic() -> None:
    """A prompt of two, a batch of three at ten tokens, a copied token, one readout of each."""
    known = Constants(
        layer=((1, 10.0), (2, 12.0), (4, 20.0)),
        pair=0.5,
        key=0.25,
        head=((1, 7.0), (3, 9.0)),
        fill=((1, 3.0),),
        path=((1, 11.0), (3, 35.0)),
        bare=((1, 4.0),),
        step=100.0,
        ask=0.0,
    )
    work = Meter()
    work.ran(2, [range(2)])  # 2 x 12: keys of its own are in the table
    work.read(1)  # 7
    work.ran(1, [range(10, 11)] * 3)  # 16, between 12 and 20; see below for the keys
    work.read(3)  # 9
    work.filled(4, 2)  # 4 x 6: proportional beyond the table
    work.tally.steps = 2
    # Three rows look at 11 keys each, 33 read; the table's three rows had 6 pairs, and read 3.
    keys = 0.5 * (33 - 6) + 0.25 * (33 - 3)
    # Steps of 1.5 layers take 17 where layer and head apart take 22: the cache keeps 5 of each.
    assert seconds(work, known) == 2 * 12 + 7 + 16 + keys + 9 + 4 * 6 + 2 * (100 - 5)


def test_a_short_head_keeps_more_in_the_cache() -> None:
    """By the seconds of what is read, whatever it is: layers alone, less than was ever timed."""
    known = Constants(
        layer=((1, 10.0),),
        pair=0,
        key=0,
        head=((1, 40.0),),
        fill=((1, 3.0),),
        path=((1, 30.0), (3, 70.0)),
        bare=((1, 2.0), (2, 8.0)),
        step=0,
        ask=0.0,
    )
    assert known.kept_seconds(3) == 70 - 70
    assert known.kept_seconds(1) == 30 - 50
    assert known.kept_seconds(2, heads=0) == 8 - 20
    assert known.kept_seconds(1, heads=0.25) == 8 - 20  # as much is read as of two layers
    assert known.kept_seconds(1.5, heads=0) == 5 - 15
    assert known.kept_seconds(0.5, heads=0) == 1 - 5
    assert known.kept_seconds(7) == 110 - 110


tables = st.dictionaries(st.integers(1, 99), st.floats(1e-6, 1), min_size=1, max_size=9).map(
    lambda points: tuple(zip(sorted(points), sorted(points.values()), strict=True))
)


@given(tables, st.floats(1, 300), st.floats(1, 300))
def test_more_rows_never_take_less(
    table: tuple[tuple[int, float], ...], first: float, second: float
) -> None:
    """Between points of a growing table and beyond its end; at a point, that point's time."""
    low, high = sorted([first, second])
    assert at(table, low) <= at(table, high) * (1 + 1e-12)
    for rows, value in table:
        assert at(table, rows) == pytest.approx(value)
    last, value = table[-1]
    assert at(table, 3 * last) == pytest.approx(3 * value)


# -- measuring


@LAW
@given(costs)
def test_known_costs_are_found_again(work: Costs) -> None:
    """Every table, the price of a key both ways, and what steps and asking take beside them."""
    backbone = Clockwork(work)
    found = measure(backbone, clock=backbone.clock)
    expected = constants_of(work)
    assert backbone.slots == 0
    for name in ("layer", "head", "fill"):
        table = dict(getattr(found, name))
        assert table.keys() >= {1, 4, 16}
        for rows, value in table.items():
            assert at(getattr(expected, name), rows) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert found.step == pytest.approx(work.step, abs=1e-9)
    assert found.ask == pytest.approx(work.ask, abs=1e-9)
    assert (found.pair, found.key) == pytest.approx((work.pair, work.key), rel=1e-3, abs=1e-10)


def test_a_quick_backbone_is_timed_at_every_point() -> None:
    """And more than once at each, within the budget."""
    backbone = Clockwork(Costs(layer=(1e-6, 1e-7), head=(1e-6, 1e-7)))
    told: list[float] = []
    found = measure(backbone, clock=backbone.clock, told=told.append)
    assert [rows for rows, _ in found.layer] == sorted(ROWS)
    assert backbone.now < 8
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_a_slow_backbone_gets_few_looks(scale: float) -> None:
    """At the fewest points that make a table, warm-up and all: it is one look at each."""
    backbone = Clockwork(Costs(layer=(0.1 * scale, 0.01 * scale), head=(0.2 * scale, 0.0)))
    found = measure(backbone, clock=backbone.clock)
    assert [rows for rows, _ in found.layer] == [1, 4, 16]
    # Two steps, four that ask or do not, three numbers of rows, and the long text; paths of 1 to 5
    # layers, each four times, and two of them without the head.
    tally = backbone.meter.tally
    assert tally.layers.total() == (2 + 4 + 3 + 2) * LAYERS + 4 * (1 + 2 + 3 + 4 + 5 + 1 + 2)
    assert tally.heads.total() == 2 + 4 + 3 + 4 * 5
    assert tally.fills.total() == (1 + 3) * LAYERS


@pytest.mark.parametrize("family", [*BOTH, "gpt2", "bloom"])
def test_measuring_works_on_real_layers_and_changes_nothing(family: str) -> None:
    """Through the protocol alone, on a clock that ticks; the next answer is the one before.

    Layers refuse to start where their keys do not end, so every look must leave none behind.
    """
    backbone = opened(family)
    requests = [Request(ids, 6) for ids in texts_of(backbone, [5, 3])]
    before = collected(decode(backbone, requests), 2)
    ticks = count()
    found = measure(backbone, clock=lambda: 0.01 * next(ticks))
    assert before == collected(decode(backbone, requests), 2)
    depth = backbone.shape.num_layers
    assert at(found.layer, 1) == pytest.approx(0.01 / depth)  # one tick for all layers
    assert at(found.head, 1) == pytest.approx(0.01)
    assert found.step == pytest.approx(0.03)  # five ticks, of them one in layers and one in a head


# -- predictions are what the loops take


@LAW
@given(costs, st.integers(1, 2), st.integers(1, 2), st.integers(1, LAYERS - 1))
def test_predicted_seconds_are_what_the_loops_take(
    work: Costs, batch_size: int, tokens: int, depth: int
) -> None:
    """Plain, leaving early with waits or copies, sub-models and drafts, alone and together."""
    known = constants_of(work)
    requests = [Request([0] * n, 6) for n in (2, 3)]
    policy = fixed(depth)
    ways: list[Callable[[Backbone], Iterator[Token]]] = [
        lambda b: decode(b, requests, batch_size=batch_size),
        lambda b: decode(b, requests, policy, max_waiting=2, batch_size=batch_size),
        lambda b: decode(b, requests, policy, kv="copy", batch_size=batch_size),
        lambda b: decode(b, requests, layers=range(depth), batch_size=batch_size),
        lambda b: speculate(b, requests, Draft(tuple(range(depth)), tokens), batch_size=batch_size),
    ]
    for run in ways:
        backbone = Clockwork(work)
        list(run(backbone))
        assert backbone.meter.tally.steps >= 3
        assert seconds(backbone.meter, known) == pytest.approx(backbone.now)


def per_token(backbone: Clockwork, tokens: Iterator[Token], number: int) -> float:
    """Seconds per token of ``number`` tokens, the prompt's step apart."""
    next(tokens)
    begin = backbone.now
    for _ in range(number):
        next(tokens)
    return (backbone.now - begin) / number


def plain_seconds(work: Costs) -> float:
    """The same of plain decoding."""
    backbone = Clockwork(work)
    return per_token(backbone, decode(backbone, [Request([0], 9)]), 4)


linear = st.builds(Costs, layer=prices, head=prices, fill=prices, step=times, ask=times)


@LAW
@given(linear, st.integers(1, LAYERS - 1))
def test_predicted_ratios_are_what_the_loops_take(work: Costs, depth: int) -> None:
    """A sub-model; always leaving, with a full queue every 17th token; copying."""
    known, plain = constants_of(work), plain_seconds(work)
    backbone = Clockwork(work)
    shallow = decode(backbone, [Request([0], 9)], layers=range(depth))
    expected = per_token(backbone, shallow, 4) / plain
    assert path_ratio(SHAPE, depth, known) == pytest.approx(expected)
    backbone = Clockwork(work)
    waiting = decode(backbone, [Request([0], 99)], fixed(depth))
    expected = per_token(backbone, waiting, 34) / plain
    # The table has no 17 rows: a line between 16 and 24 is exact for a linear cost.
    assert exit_ratio(SHAPE, [depth], [1.0], known) == pytest.approx(expected)
    backbone = Clockwork(work)
    copied = decode(backbone, [Request([0], 9)], fixed(depth), kv="copy")
    expected = per_token(backbone, copied, 4) / plain
    assert exit_ratio(SHAPE, [depth], [1.0], known, copy=True) == pytest.approx(expected)


@LAW
@given(linear, st.integers(1, LAYERS - 1))
def test_never_leaving_takes_what_is_predicted(work: Costs, depth: int) -> None:
    """Every check is paid beside the whole model."""
    backbone = Clockwork(work)
    never = Threshold("max_prob", ((depth, math.inf),))
    expected = per_token(backbone, decode(backbone, [Request([0], 9)], never), 4)
    predicted = exit_ratio(SHAPE, [depth], [0.0], constants_of(work))
    assert predicted == pytest.approx(expected / plain_seconds(work))


@LAW
@given(linear, st.integers(1, LAYERS - 1), st.integers(1, 5), *[st.booleans()] * 3)
def test_drafts_take_what_is_predicted(
    work: Costs, depth: int, tokens: int, right: bool, free: bool, skips: bool
) -> None:
    """Always right and always wrong; by the full head, and by one that takes no time; by the first
    layers, and by as many that skip layer 1."""
    right |= skips  # read out where the full model is, such a draft says the same here
    backbone = Clockwork(work, right=right)
    draft = Draft((0, *range(2, depth + 1)) if skips else tuple(range(depth)), tokens)
    head = partial(Counting.readout, backbone) if free else None
    written = speculate(backbone, [Request([0, 0], 200)], draft, head=head)
    expected = per_token(backbone, written, (tokens + 1 if right else 1) * 3)
    price = 0.0 if free else 1.0
    predicted = speculation_ratio(
        *(SHAPE, depth, tokens, float(right), constants_of(work)), head=price, shared=draft.shared
    )
    assert predicted == pytest.approx(expected / plain_seconds(work))


@LAW
@given(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.integers(1, 8), st.floats(0, 1))
def test_where_only_weights_take_time_both_views_agree(
    shares: list[float], tokens: int, agreement: float
) -> None:
    """Time by passes alone is weights read: the formulas are the same."""
    flat = [((1, price), (512, price)) for price in (1.0, 2.0)]
    tables = {"path": ((1, 3.0), (9, 11.0)), "bare": ((1, 1.0),)}
    known = Constants(
        layer=flat[0], pair=0, key=0, head=flat[1], fill=flat[0], step=0, ask=0, **tables
    )
    shares = [share * 0.45 for share in shares]  # beyond, a full queue costs passes
    expected = exit_ratio(SHAPE, [2, 3], shares)
    assert exit_ratio(SHAPE, [2, 3], shares, known) == pytest.approx(expected)
    expected = speculation_ratio(SHAPE, 2, tokens, agreement)
    assert speculation_ratio(SHAPE, 2, tokens, agreement, known) == pytest.approx(expected)
    assert path_ratio(SHAPE, 2, known) == pytest.approx(path_ratio(SHAPE, 2)) == 4 / 7


def test_longer_contexts_take_longer_but_not_sub_models() -> None:
    """Attention is paid by the layers that are run: the ratio of a sub-model nears its share."""
    known = constants_of(Costs(pair=1e-5, key=1e-5))
    ratios = [path_ratio(SHAPE, 1, known, context) for context in (0, 1000, 10**6)]
    assert all(later < earlier for earlier, later in pairwise(ratios))
    assert ratios[-1] == pytest.approx(1 / LAYERS, rel=0.01)


def test_figures_predict_where_times_are_known() -> None:
    """Seconds of the work done, and their ratio to full depth; None where nothing was measured."""
    baseline = full_depth([(3, 4)], SHAPE, 1)
    half = Meter()
    half.ran(1, [range(3)])
    known = constants_of(Costs())
    told = Figures(4, 1.0, [], half, baseline, SHAPE, constants=known).as_dict()
    assert told["predicted_seconds"] == seconds(half, known)
    assert told["predicted_ratio"] == seconds(half, known) / seconds(baseline, known)
    told = Figures(4, 1.0, [], baseline, baseline, SHAPE, constants=known).as_dict()
    assert told["predicted_ratio"] == 1
    told = Figures(4, 1.0, [], half, baseline, SHAPE).as_dict()
    assert (told["predicted_seconds"], told["predicted_ratio"]) == (None, None)


def test_a_plan_at_its_best() -> None:
    """Every guess right: drafts pay where reading weights takes the time, not where rows do."""
    runs: list[Run] = [
        Speculate(draft=(0, 1), tokens=4),
        Speculate(draft=(0, 1), tokens=4, head=Shortlist(size=2)),
        Exit(signal="max_prob", thresholds={4: 0.9}),
        Exit(signal="max_prob", thresholds={4: 0.9}, kv="copy"),
    ]
    reading = constants_of(Costs(layer=(1e-2, 1e-5), head=(1e-3, 1e-5)))
    rows = constants_of(Costs(layer=(1e-5, 1e-2), head=(1e-5, 1e-2)))
    for run in runs:
        assert at_best(run, SHAPE, reading) < 1
    full, short, waits, copies = (at_best(run, SHAPE, rows) for run in runs)
    assert 1 < short < full  # nothing is saved, and the drafts' heads are lost
    assert 0.99 < waits < 1  # tokens that waited run all the same
    assert copies < 0.9  # copies do save rows
    assert at_best(Full(), SHAPE, rows) == 1
    assert at_best(SubModel(layers=(0, 2)), SHAPE, rows) == path_ratio(SHAPE, 2, rows)


# -- kept in the cache


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Backbone]:
    """Whom ``constants`` measured; each time a step takes a second more."""
    seen: list[Backbone] = []

    def fake(backbone: Backbone, **_options: object) -> Constants:
        seen.append(backbone)
        return constants_of(Costs(step=float(len(seen))))

    monkeypatch.setattr(timing, "measure", fake)
    return seen


def test_constants_are_measured_once(measured: list[Backbone], own_timings: Path) -> None:
    """Then read again, by another process too; nothing lies beside the file."""
    backbone = Clockwork(Costs())
    assert timing.known(backbone) is None
    first = timing.constants(backbone)
    assert timing.constants(Clockwork(Costs())) == first == timing.known(backbone)
    assert len(measured) == 1
    [file] = own_timings.iterdir()
    assert json.loads(file.read_text())["of"]["threads"] == str(torch.get_num_threads())


@pytest.mark.parametrize("what", ["fingerprint", "name", "weights", "build"])
def test_another_models_constants_are_not_used(measured: list[Backbone], what: str) -> None:
    """Nor those of another backbone, weight format or build."""
    timing.constants(Clockwork(Costs()))
    other = Clockwork(Costs())
    setattr(other, what, "other")
    assert timing.known(other) is None
    timing.constants(other)
    assert len(measured) == 2


def test_another_machines_constants_are_not_used(
    measured: list[Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache in a home folder may serve several machines, and one of them several threads."""
    backbone = Clockwork(Costs())
    timing.constants(backbone)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "processor", lambda: "another")
        assert timing.known(backbone) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        assert timing.known(backbone) is None
    assert timing.known(backbone) is not None
    assert len(measured) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda _text: "",
        lambda _text: "[]",
        lambda text: text.replace('"format":3', '"format":2'),
        lambda text: text.replace('"step":1.0', '"step":-1.0'),
        lambda text: text.replace('"step":1.0', '"step":NaN'),
        lambda text: text.replace('"step":1.0', '"step":1.0,"more":1'),
        lambda text: text.replace("[1,", "[7,"),
        lambda text: text.replace("clockwork", "another"),
    ],
    ids=["half", "empty", "a list", "format", "negative", "nan", "key", "rows", "of"],
)
def test_a_file_that_is_no_constants_of_ours_is_measured_again(
    measured: list[Backbone], own_timings: Path, spoil: Callable[[str], str]
) -> None:
    """Half written, edited, of another version, or moved: no error, and it is replaced."""
    backbone = Clockwork(Costs())
    timing.constants(backbone)
    [file] = own_timings.iterdir()
    text = file.read_text()
    file.write_text(spoil(text))
    assert text != file.read_text()
    assert timing.known(backbone) is None
    again = timing.constants(backbone)
    assert len(measured) == 2
    assert timing.known(backbone) == again


def test_a_cache_that_cannot_be_written_is_no_error(
    measured: list[Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured every time."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(timing, "cache_dir", lambda: blocked / "folder")
    backbone = Clockwork(Costs())
    assert timing.constants(backbone) != timing.constants(backbone)
    assert len(measured) == 2


def test_constants_refuse_what_no_machine_takes() -> None:
    """Negative and endless times, tables out of order or empty, unknown parts."""
    good = constants_of(Costs()).model_dump()
    wrong: list[dict[str, object]] = [
        {"step": -1.0},
        {"step": math.inf},
        {"layer": ()},
        {"layer": ((2, 1.0), (1, 1.0))},
        {"layer": ((1, 1.0), (1, 1.0))},
        {"layer": ((0, 1.0),)},
        {"head": ((1, math.nan),)},
        {"more": 1},
    ]
    assert Constants(**good).model_dump() == good
    for part in wrong:
        with pytest.raises(ValidationError):
            Constants(**(good | part))
