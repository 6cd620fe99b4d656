"""Prices: the published arithmetic, and predictions that equal what counters count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.backbone import Backbone, Shape
from offramp.batch import Span
from offramp.checks import FULL_HEAD, Check, LowRank, Shortlist
from offramp.cost import (
    Figures,
    break_even_depth,
    cheap_check_in_layers,
    check_in_layers,
    exit_ratio,
    fill_in_layers,
    flops,
    full_depth,
    path_ratio,
    speculation_ratio,
    weight_bytes,
)
from offramp.decode import decode
from offramp.meter import Meter
from offramp.model import Model
from offramp.policy import Threshold
from offramp.probe import Readout
from offramp.request import Request, Token
from offramp.speculate import Draft, speculate
from offramp.step import KV
from offramp.watch import Ran, Watch

LAW = settings(max_examples=100, deadline=None)


def shaped(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int, matrices: int
) -> Shape:
    """A model of published dimensions, with 3 ``matrices`` in a gated feed-forward part, else 2."""
    size = width // heads
    kv = 2 * width * kv_heads * size
    return Shape(
        num_layers=layers,
        hidden_size=width,
        vocab_size=vocabulary,
        context=4096,
        layer_weights=2 * width * heads * size + kv + matrices * width * inner,
        head_weights=width * vocabulary,
        kv_weights=kv,
        fill_weights=kv,
        attention_size=heads * size,
        bytes_per_weight=2,
        kv_bytes=4,
        head_bytes_per_weight=2,
    )


PUBLISHED = {
    "LLaMA-2-7B": shaped(32, 4096, 32, 32, 11008, 32000, 3),
    "LLaMA-2-13B": shaped(40, 5120, 40, 40, 13824, 32000, 3),
    "Llama-3-8B": shaped(32, 4096, 32, 8, 14336, 128256, 3),
    "OPT-1.3B": shaped(24, 2048, 32, 32, 8192, 50272, 2),
    "GPT-2 124M": shaped(12, 768, 12, 12, 3072, 50257, 2),
    "Qwen2.5-0.5B": shaped(24, 896, 14, 2, 4864, 151936, 3),
    "SmolLM2-135M": shaped(30, 576, 9, 3, 1536, 49152, 3),
}

shapes = st.builds(
    Shape,
    num_layers=st.integers(2, 12),
    hidden_size=st.just(1),
    vocab_size=st.just(2),
    context=st.just(4096),
    layer_weights=st.integers(1, 50),
    head_weights=st.integers(0, 200),
    kv_weights=st.integers(0, 50),
    fill_weights=st.integers(0, 50),
    attention_size=st.integers(0, 9),
    attention_weights=st.integers(0, 1),
    bytes_per_weight=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    head_bytes_per_weight=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)


class Counting:
    """A backbone without a model that counts as the reference one does; a depth has one token."""

    def __init__(
        self, shape: Shape, token: Callable[[int], int] = lambda _depth: 0, *, batched: bool = True
    ) -> None:
        self.shape, self.meter, self.fingerprint = shape, Meter(), ""
        self.name, self.weights, self.build = "counting", "none", ""
        self.token, self.batched, self.ragged = token, batched, False
        self.halves = False
        self.blocks: Mapping[int, int] = {
            depth: shape.num_layers + i for i, depth in enumerate(shape.blocks)
        }
        self.apart = frozenset[int]()

    def open(self) -> object:
        """Return a slot that holds nothing."""
        return object()

    def close(self, slot: object) -> None:
        """Free nothing."""

    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return states that say nothing."""
        return torch.zeros(sum(map(len, spans)), 1)

    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Count: texts with equally many rows share a pass; position p looks at p + 1 keys."""
        lengths = [len(span) for span in spans]
        together = [n * lengths.count(n) for n in set(lengths)] if self.batched else lengths
        for _ in layers:
            self.meter.layer_passes += len(together)
            self.meter.layer_tokens += len(hidden)
            self.meter.attended += sum(p + 1 for s in spans for p in range(s.start, s.stop))
            self.meter.tally.layers.update(together)
            self.meter.tally.keys += sum(span.stop for span in spans)
        return hidden

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run the first segment."""
        return Ran(self.run(segments[0], hidden, spans))

    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Count: all rows share a pass."""
        self.meter.filled(len(layers), len(hidden))

    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Count, and return logits of this depth's one token."""
        self.meter.head_passes += 1
        self.meter.head_rows += len(hidden)
        self.meter.tally.heads[len(hidden)] += 1
        logits = torch.zeros(len(hidden), 2)
        logits[:, self.token(depth)] = 1
        return logits

    def shortlist(self, tokens: Tensor) -> Readout:
        """Count, and return logits of equal entries."""
        return lambda hidden, _depth: self.checked(len(hidden), len(tokens))

    def low_rank(self, rank: int) -> Readout:
        """Count, and return logits of equal entries."""
        return lambda hidden, _depth: self.checked(len(hidden), 2)

    def refined(self) -> Readout:
        """Count, and return logits of equal entries."""
        return lambda hidden, _depth: self.checked(len(hidden), 2)

    def checked(self, rows: int, entries: int) -> Tensor:
        """Count a cheap check."""
        self.meter.check_passes += 1
        self.meter.check_rows += rows
        return torch.zeros(rows, entries)

    def trim(self, slot: object, length: int, *, first_layer: int = 0) -> None:
        """Forget nothing: there are no keys."""


def reads_per_token(backbone: Backbone, tokens: Iterator[Token], count: int) -> float:
    """Weight bytes per token of ``count`` tokens, the prompt's step and first token apart."""
    next(tokens)
    before = backbone.meter.copy()
    assert count == len(list(islice(tokens, count)))
    return weight_bytes(backbone.meter - before, backbone.shape) / count


def plain_reads(shape: Shape) -> float:
    """The same of plain decoding."""
    backbone = Counting(shape)
    return reads_per_token(backbone, decode(backbone, [Request([0], 4)]), 3)


# -- the published table


@pytest.mark.parametrize(
    ("model", "check", "fill", "latest"),
    [
        ("LLaMA-2-7B", 0.65, 0.166, 18.4),
        ("LLaMA-2-13B", 0.52, 0.165, 25.1),
        ("Llama-3-8B", 2.41, 0.038, 9.8),
        ("OPT-1.3B", 2.05, 0.167, 7.7),
        ("GPT-2 124M", 5.45, 0.167, 2.5),
        ("Qwen2.5-0.5B", 9.13, 0.015, 3.2),
        ("SmolLM2-135M", 8.00, 0.062, 4.0),
    ],
)
def test_costs_are_the_published_ones(model: str, check: float, fill: float, latest: float) -> None:
    """Exit check, K/V fill and break-even of seven models, in layers, to the table's digits."""
    shape = PUBLISHED[model]
    expected = (check, fill)
    assert expected == (round(check_in_layers(shape), 2), round(fill_in_layers(shape), 3))
    # The table's last column was computed from the rounded ones.
    assert latest == pytest.approx(break_even_depth(shape), abs=0.06)


@LAW
@given(shapes.filter(lambda shape: shape.kv_weights <= shape.layer_weights and shape.head_weights))
def test_at_break_even_a_checked_token_costs_a_full_one(shape: Shape) -> None:
    """e layers, e checks and L - e fills cost L layers and a head."""
    h, f, depth = check_in_layers(shape), fill_in_layers(shape), shape.num_layers
    latest = break_even_depth(shape)
    assert depth + h == pytest.approx(latest + latest * h + f * (depth - latest))


@LAW
@given(
    shapes.filter(lambda shape: shape.kv_weights <= shape.layer_weights),
    st.sampled_from([Shortlist(size=2), LowRank(rank=1)]),
    st.data(),
)
def test_where_a_cheap_check_breaks_even_a_token_costs_a_full_one(
    shape: Shape, check: Check, data: st.DataObject
) -> None:
    """e layers, e cheap checks, L - e fills and a head: priced, and counted by the loop."""
    weights, f = check.weights(shape), fill_in_layers(shape)
    latest = break_even_depth(shape, weights)
    c, depth = cheap_check_in_layers(shape, weights), shape.num_layers
    assert depth == pytest.approx(latest + latest * c + f * (depth - latest))
    stop = data.draw(st.integers(1, depth - 1))
    never = tuple((d, math.inf) for d in range(1, stop))
    backbone = Counting(shape)
    policy, look = Threshold("max_prob", (*never, (stop, 0.0))), check.look(backbone)
    new = decode(backbone, [Request([0, 0], 9)], policy, look=look, max_waiting=9)
    next(new)
    before = backbone.meter.copy()
    assert len(list(islice(new, 8))) == 8
    reads = weight_bytes(backbone.meter - before, shape, weights) / 8
    layers = shape.bytes_per_weight * shape.layer_weights * stop * (1 + c)
    assert reads == pytest.approx(layers + shape.head_bytes_per_weight * shape.head_weights)


def test_a_small_models_check_can_cost_half_a_layer() -> None:
    """Of SmolLM2's eight layers, 2,048 entries cost a third of one, and rank 32 under a half."""
    shape = PUBLISHED["SmolLM2-135M"]
    prices = {
        str(check): round(cheap_check_in_layers(shape, check.weights(shape)), 3)
        for check in (Shortlist(size=2048), Shortlist(size=4096), LowRank(rank=32))
    }
    assert prices == {"shortlist:2048": 0.333, "shortlist:4096": 0.667, "low-rank:32": 0.45}
    assert FULL_HEAD.weights(shape) == 0  # its rows are the head's own


@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("context", [1, 2, 1000])
def test_a_token_at_full_depth_has_the_textbook_price(shape: Shape, context: int) -> None:
    """2 P + 4 s n d per layer at context s, and 2 d V for the head."""
    longer, shorter = [full_depth([(context - 1, new)], shape, 1) for new in (2, 1)]
    layer = 2 * shape.layer_weights + 4 * context * shape.attention_size
    expected = shape.num_layers * layer + 2 * shape.hidden_size * shape.vocab_size
    assert expected == flops(longer - shorter, shape)


# -- prices of counts


@LAW
@given(shapes, st.integers(0, 9), st.integers(0, 99))
def test_rows_are_operations_and_passes_are_bytes(shape: Shape, count: int, check: int) -> None:
    """Each count has one price in one view and none in the other; drafts have none of their own."""
    prices = {
        "layer_tokens": (2 * shape.layer_weights, 0),
        "head_rows": (2 * shape.head_weights, 0),
        "check_rows": (2 * check, 0),
        "fill_rows": (2 * shape.fill_weights, 0),
        "attended": (4 * shape.attention_size, 0),
        "layer_passes": (0, shape.layer_weights),
        "attention_tokens": (2 * shape.attention_weights, 0),
        "mlp_tokens": (2 * (shape.layer_weights - shape.attention_weights), 0),
        "attention_passes": (0, shape.attention_weights),
        "mlp_passes": (0, shape.layer_weights - shape.attention_weights),
        "head_passes": (0, shape.head_weights),
        "check_passes": (0, check),
        "fill_passes": (0, shape.fill_weights),
        "map_rows": (2 * shape.hidden_size**2, 0),
        "map_passes": (0, shape.hidden_size**2),
        "drafted": (0, 0),
        "accepted": (0, 0),
    }
    assert set(prices) == set(Meter().as_dict())
    for name, (operations, weights) in prices.items():
        work = Meter()
        setattr(work, name, count)
        size = {
            "head_passes": shape.head_bytes_per_weight,
            "map_passes": shape.map_bytes_per_weight,
        }.get(name, shape.bytes_per_weight)
        expected = (count * operations, count * weights * size)
        assert expected == (flops(work, shape, check), weight_bytes(work, shape, check))


texts = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=7)


@LAW
@given(shapes, texts, st.integers(1, 4))
def test_full_depth_is_what_plain_decoding_counts(
    shape: Shape, lengths: list[tuple[int, int]], batch_size: int
) -> None:
    """Rows, keys and passes of the baseline equal those of the real loop, whatever ends when."""
    backbone = Counting(shape)
    requests = [Request([0] * prompt, new) for prompt, new in lengths]
    tokens = list(decode(backbone, requests, batch_size=batch_size))
    assert sum(new for _, new in lengths) == len(tokens)
    assert backbone.meter == full_depth(lengths, shape, batch_size)


class Letters:
    """A tokenizer without a chat template: every letter is a token."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the letters' code points."""
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids: Sequence[int], **_options: object) -> str:
        """Return the letters."""
        return "".join(map(chr, ids))


@pytest.mark.parametrize("batched", [True, False])
def test_without_a_plan_every_ratio_is_one(batched: bool) -> None:
    """Full depth costs what full depth costs, on a model that takes texts one by one, too."""
    backbone = Counting(PUBLISHED["SmolLM2-135M"], lambda _depth: 1, batched=batched)
    model = Model(backbone, Letters(), "letters", frozenset())
    prompts = ["abc", "abc", "a", "abcdef", "ab"]
    told = model.generate(prompts, max_new_tokens=4, batch_size=3).figures.as_dict()
    assert (told["flops_ratio"], told["bytes_ratio"]) == (1.0, 1.0)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_full_depth_of_equal_texts_shares_every_pass(prompt: int, new: int, count: int) -> None:
    """A batch of equal texts reads the weights as often as one, and computes so many times more."""
    shape = PUBLISHED["GPT-2 124M"]
    one, many = [full_depth([(prompt, new)] * n, shape, count) for n in (1, count)]
    assert weight_bytes(one, shape) == weight_bytes(many, shape)
    assert count * flops(one, shape) == flops(many, shape)


# -- predictions

numbers = st.integers(1, 5)


@LAW
@given(shapes, numbers, st.data())
def test_a_draft_that_is_always_right_costs_what_is_predicted(
    shape: Shape, tokens: int, data: st.DataObject
) -> None:
    """At agreement 1 each full step yields every draft and one more token."""
    depth = data.draw(st.integers(1, shape.num_layers - 1))
    h, layers = check_in_layers(shape), shape.num_layers
    expected = (tokens * (depth + h) + layers + h) / ((tokens + 1) * (layers + h))
    assert expected == pytest.approx(speculation_ratio(shape, depth, tokens, 1.0))
    backbone, count = Counting(shape), 2 * (tokens + 1)
    draft = Draft(tuple(range(depth)), tokens)
    new = speculate(backbone, [Request([0, 0], 1 + count)], draft)
    assert expected == pytest.approx(reads_per_token(backbone, new, count) / plain_reads(shape))


@LAW
@given(shapes, numbers, st.data())
def test_a_draft_that_is_always_wrong_costs_what_is_predicted(
    shape: Shape, tokens: int, data: st.DataObject
) -> None:
    """At agreement 0 each full step yields its own token only, and the drafts are lost."""
    depth = data.draw(st.integers(1, shape.num_layers - 1))
    h, layers = check_in_layers(shape), shape.num_layers
    expected = 1 + tokens * (depth + h) / (layers + h)
    assert expected == pytest.approx(speculation_ratio(shape, depth, tokens, 0.0))
    backbone = Counting(shape, lambda depth: int(depth == layers))
    draft = Draft(tuple(range(depth)), tokens)
    new = speculate(backbone, [Request([0, 0], 100)], draft)
    assert expected == pytest.approx(reads_per_token(backbone, new, 3) / plain_reads(shape))


@LAW
@given(shapes, numbers, st.floats(0, 1), st.floats(0, 1), st.data())
def test_a_better_draft_costs_no_more(
    shape: Shape, tokens: int, first: float, second: float, data: st.DataObject
) -> None:
    """The predicted cost falls from agreement 0 to 1."""
    depth = data.draw(st.integers(1, shape.num_layers - 1))
    worse, better = sorted([first, second])
    ratios = [speculation_ratio(shape, depth, tokens, a) for a in (1.0, better, worse, 0.0)]
    assert ratios == sorted(ratios)


@LAW
@given(shapes, st.data())
def test_leaving_always_costs_what_is_predicted(shape: Shape, data: st.DataObject) -> None:
    """When all leave at one exit, a token costs that depth and the checks made until there."""
    depths = st.integers(1, shape.num_layers - 1)
    *earlier, depth = sorted(data.draw(st.sets(depths, min_size=1, max_size=3)))
    h, layers = check_in_layers(shape), shape.num_layers
    expected = (depth + (len(earlier) + 1) * h) / (layers + h)
    shares = [0.0] * len(earlier) + [1.0]
    assert expected == pytest.approx(exit_ratio(shape, [*earlier, depth], shares))
    backbone = Counting(shape)
    never = tuple((stop, math.inf) for stop in earlier)
    policy = Threshold("max_prob", (*never, (depth, 0.0)))
    new = decode(backbone, [Request([0, 0], 9)], policy, max_waiting=9)
    assert expected == pytest.approx(reads_per_token(backbone, new, 8) / plain_reads(shape))


@LAW
@given(shapes, st.data())
def test_never_leaving_costs_what_is_predicted(shape: Shape, data: st.DataObject) -> None:
    """When none leaves, every check is paid beside the whole model; without exits it costs 1."""
    exits = sorted(data.draw(st.sets(st.integers(1, shape.num_layers - 1))))
    h, layers = check_in_layers(shape), shape.num_layers
    expected = (layers + (len(exits) + 1) * h) / (layers + h)
    assert expected == pytest.approx(exit_ratio(shape, exits, [0.0] * len(exits)))
    backbone = Counting(shape)
    policy = Threshold("max_prob", tuple((depth, math.inf) for depth in exits))
    new = decode(backbone, [Request([0, 0], 9)], policy)
    assert expected == pytest.approx(reads_per_token(backbone, new, 8) / plain_reads(shape))


@LAW
@given(shapes, numbers, st.sampled_from(["exact", "copy"]), st.data())
def test_a_block_costs_what_is_predicted(
    shape: Shape, tokens: int, kv: KV, data: st.DataObject
) -> None:
    """A layer for a row that asks, keys and values for one that passes; drafts and sub-models."""
    shape = replace(shape, num_layers=shape.num_layers + 1, fill_weights=shape.kv_weights)
    first, depth = sorted(data.draw(st.permutations(range(1, shape.num_layers)))[:2])
    shape, plain = replace(shape, blocks=(depth,)), plain_reads(shape)
    inf = math.inf
    for bars, shares in (((inf, inf), [0, 0]), ((inf, 0.0), [0, 1]), ((0.0, inf), [1, 0])):
        policy = Threshold("max_prob", ((first, bars[0]), (depth, bars[1])))
        backbone = Counting(shape)
        new = decode(backbone, [Request([0, 0], 9)], policy, kv=kv, max_waiting=9)
        expected = exit_ratio(shape, [first, depth], shares, copy=kv == "copy")
        assert expected == pytest.approx(reads_per_token(backbone, new, 8) / plain)
    precise = replace(shape, block_bytes_per_weight=3 * shape.bytes_per_weight)
    more = exit_ratio(precise, [depth], [0]) - exit_ratio(shape, [depth], [0])
    assert more == pytest.approx(2 / (shape.num_layers + check_in_layers(shape)))
    backbone = Counting(shape)
    new = decode(backbone, [Request([0, 0], 9)], layers=range(depth))
    expected = path_ratio(shape, depth, speaks_at=depth)
    assert expected == pytest.approx(reads_per_token(backbone, new, 8) / plain)
    backbone, count = Counting(shape), 2 * (tokens + 1)
    draft = Draft(tuple(range(depth)), tokens)
    new = speculate(backbone, [Request([0, 0], 1 + count)], draft)
    expected = speculation_ratio(shape, depth, tokens, 1.0)
    assert expected == pytest.approx(reads_per_token(backbone, new, count) / plain)


@LAW
@given(shapes, st.lists(st.floats(0, 1), min_size=2, max_size=2), st.data())
def test_a_mixture_costs_its_share_of_each(
    shape: Shape, weights: list[float], data: st.DataObject
) -> None:
    """The prediction is the mean over tokens of what each of them costs."""
    exits = sorted(data.draw(st.sets(st.integers(1, shape.num_layers), min_size=2, max_size=2)))
    first, second = weights[0] / 2, weights[1] / 2
    each = [exit_ratio(shape, exits, shares) for shares in ([1, 0], [0, 1], [0, 0])]
    expected = first * each[0] + second * each[1] + (1 - first - second) * each[2]
    assert expected == pytest.approx(exit_ratio(shape, exits, [first, second]))


# -- figures


def figures(
    work: Meter, baseline: Meter, depths: Sequence[int] = (), seconds: float = 2.0
) -> Figures:
    """Figures of some work of SmolLM2."""
    return Figures(len(depths), seconds, depths, work, baseline, PUBLISHED["SmolLM2-135M"])


def test_figures_have_the_shared_names() -> None:
    """Every command gives the same keys: those of the design, drafts, and what the meter counts."""
    shared = {
        *("tokens", "layer_passes", "layer_tokens", "head_rows", "fill_rows", "flops_ratio"),
        *("bytes_ratio", "seconds", "tokens_per_second", "mean_depth", "depth_histogram"),
        *("predicted_seconds", "predicted_ratio"),
    }
    counters = {"drafted", "accepted", "head_passes", "fill_passes", "attended"}
    counters |= {"check_passes", "check_rows", "map_passes", "map_rows"}
    counters |= {"attention_passes", "attention_tokens", "mlp_passes", "mlp_tokens"}
    work = full_depth([(3, 2)], PUBLISHED["SmolLM2-135M"], 1)
    assert shared | counters == set(figures(work, work, [30, 30]).as_dict())


@LAW
@given(texts.filter(len), st.integers(1, 4))
def test_full_depth_over_itself_is_one(lengths: list[tuple[int, int]], batch_size: int) -> None:
    """The baseline against itself is no saving and no loss."""
    work = full_depth(lengths, PUBLISHED["SmolLM2-135M"], batch_size)
    told = figures(work, work, [30]).as_dict()
    assert (told["flops_ratio"], told["bytes_ratio"]) == (1.0, 1.0)


@given(st.lists(st.integers(1, 30), min_size=1), st.floats(0.001, 1000))
def test_figures_of_depth_and_speed_are_those_of_the_tokens(
    depths: list[int], seconds: float
) -> None:
    """Mean, histogram and speed describe the tokens; depths ascend, and none is left out."""
    work = full_depth([(3, len(depths))], PUBLISHED["SmolLM2-135M"], 1)
    told = figures(work, work, depths, seconds).as_dict()
    assert len(depths) == told["tokens"]
    assert (seconds, len(depths) / seconds) == (told["seconds"], told["tokens_per_second"])
    assert sum(depths) / len(depths) == told["mean_depth"]
    histogram = [(str(depth), depths.count(depth)) for depth in sorted(set(depths))]
    assert histogram == list(told["depth_histogram"].items())  # type: ignore[attr-defined]
    assert work.as_dict() == {name: told[name] for name in work.as_dict()}


def test_figures_of_nothing_can_be_told() -> None:
    """A stream has figures before its first token: no tokens, and no division by zero."""
    nothing = full_depth([], PUBLISHED["SmolLM2-135M"], 1)
    told = figures(Meter(), nothing, [], 0.0).as_dict()
    assert (told["tokens"], told["mean_depth"], told["depth_histogram"]) == (0, 0, {})
