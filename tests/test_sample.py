"""Sampling: Hugging Face's own logits, and tokens that are a function of seed and position alone.

The statistics are over fixed seeds, so a test passes always or never; the odds stated are those of
a right sampler failing on a random choice of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offramp.errors import UsageError
from offramp.sample import Sampling

SEEDS = 10_000
ODDS = 1e-6
"""How rarely a right sampler would fail one chi-square test."""

LAW = settings(max_examples=80, deadline=None)
VOCABULARY = 12

samplings = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.05, 5),
    top_k=st.integers(0, VOCABULARY + 3),
    top_p=st.sampled_from([1.0, 1e-30]) | st.floats(0.01, 1),  # 1 - 1e-30 is 1
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3),
    seed=st.integers(-(2**70), 2**70),
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, list[int], int]:
    """``(logits [n, V], ids, first)``: often with equal or removed logits, never with no token."""
    rows = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 3 * torch.randn(rows, VOCABULARY, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()
    removed = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0, 0.2, 0.9]))
    logits[removed] = -math.inf
    logits[:, draw(st.integers(0, VOCABULARY - 1))] = 1.0
    ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=rows, max_size=2 * VOCABULARY)
    known = draw(ids)
    return logits, known, draw(st.integers(1, len(known) - rows + 1))


def huggingface(sampling: Sampling, logits: Tensor, ids: Sequence[int], first: int) -> Tensor:
    """What ``generate`` makes of each row, in fp32 and in its own order."""
    done = []
    for i, row in enumerate(logits.float().split(1)):
        seen, scores = torch.tensor([list(ids[: first + i])]), row
        if sampling.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores)
        if sampling.temperature > 0:
            scores = TemperatureLogitsWarper(sampling.temperature)(seen, scores)
            if sampling.top_k > 0:
                scores = TopKLogitsWarper(sampling.top_k)(seen, scores)
            if sampling.top_p < 1:
                scores = TopPLogitsWarper(sampling.top_p)(seen, scores)
        done.append(scores)
    return torch.cat(done)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, -math.inf]),
        ("top_k", [-1, -100]),
        ("top_p", [0.0, -0.1, 1.0001, math.nan, math.inf]),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, values: list[float]) -> None:
    """Every setting names itself and the value that it refuses."""
    for value in values:
        with pytest.raises(UsageError) as refusal:
            Sampling(**{name: value})  # type: ignore[arg-type]
        assert name.replace("_", "-") in str(refusal.value).replace(" ", "-")
        assert str(value) in str(refusal.value)


def test_the_ends_of_the_ranges_are_accepted() -> None:
    """Zero and one are values, not mistakes."""
    assert Sampling() == Sampling(0.0, 0, 1.0, 1.0, 0)
    assert math.ulp(0) == Sampling(top_p=math.ulp(0), repetition_penalty=math.ulp(0)).top_p


@LAW
@given(samplings, situations())
def test_warped_logits_are_those_of_hugging_face(
    sampling: Sampling, situation: tuple[Tensor, list[int], int]
) -> None:
    """Penalty, temperature, top-k and top-p equal the library's own processors, in its order."""
    logits, ids, first = situation
    before = logits.clone()
    expected = huggingface(sampling, logits, ids, first)
    assert expected.tolist() == sampling.warp(logits, ids, first).tolist()
    assert before.tolist() == logits.tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.1),
        Sampling(temperature=0.7, repetition_penalty=1.1),
        Sampling(temperature=0.7, top_k=3, top_p=0.9),
    ],
    ids=str,
)
def test_half_precision_logits_are_processed_in_full_precision(sampling: Sampling) -> None:
    """As in ``generate``, rounding to bf16 ends with the head: it makes no ties of its own."""
    logits = torch.tensor([[2.0, 1.8203125, -1.0, 0.5]], dtype=torch.bfloat16)
    expected = huggingface(sampling, logits, [0], 1)
    assert expected.tolist() == sampling.warp(logits, [0], 1).float().tolist()


@LAW
@given(samplings, situations())
def test_greedy_is_the_largest_penalised_logit(
    sampling: Sampling, situation: tuple[Tensor, list[int], int]
) -> None:
    """At temperature 0 only the repetition penalty counts, whatever else is set."""
    logits, ids, first = situation
    penalty = sampling.repetition_penalty
    plain = Sampling(
        0.0, sampling.top_k, sampling.top_p, sampling.repetition_penalty, sampling.seed
    )
    penalised = huggingface(Sampling(repetition_penalty=penalty), logits, ids, first)
    assert penalised.argmax(-1).tolist() == plain.chooser()(logits, ids, first)


@LAW
@given(samplings, situations(), st.data())
def test_rows_may_be_chosen_in_any_batches(
    sampling: Sampling, situation: tuple[Tensor, list[int], int], data: st.DataObject
) -> None:
    """A position's token is the same alone, in any run of rows, and from a new chooser."""
    logits, ids, first = situation
    expected = sampling.chooser()(logits, ids, first)
    cut = data.draw(st.integers(0, len(logits)))
    parts = [(logits[:cut], first), (logits[cut:], first + cut)]
    choose = sampling.chooser()
    assert expected == [t for rows, at in parts if len(rows) for t in choose(rows, ids, at)]
    singly = [choose(row, ids, first + i) for i, row in enumerate(logits.split(1))]
    assert expected == [token for [token] in singly]


@LAW
@given(samplings, situations(), st.integers(0, VOCABULARY - 1))
def test_noise_ignores_the_text(
    sampling: Sampling, situation: tuple[Tensor, list[int], int], other: int
) -> None:
    """Without a penalty the token depends on logits, seed and position, not on earlier tokens."""
    logits, ids, first = situation
    free = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, 1.0, sampling.seed)
    expected = free.chooser()(logits, ids, first)
    assert expected == free.chooser()(logits, [other] * len(ids), first)


@LAW
@given(samplings, situations())
def test_a_removed_token_is_never_chosen(
    sampling: Sampling, situation: tuple[Tensor, list[int], int]
) -> None:
    """What top-k, top-p or the model itself rules out, no noise brings back."""
    logits, ids, first = situation
    kept = sampling.warp(logits, ids, first) > -math.inf
    chosen = sampling.chooser()(logits, ids, first)
    assert [True] * len(chosen) == kept[range(len(chosen)), chosen].tolist()


LOGITS = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.5])


@cache
def drawn(sampling: Sampling = Sampling(temperature=1.0)) -> Tensor:  # noqa: B008
    """``[seeds, 2]``: the tokens of every seed at positions 5 and 6, from the same logits."""
    rows, ids = LOGITS.expand(2, -1), [0] * 7
    tokens = [
        Sampling(sampling.temperature, sampling.top_k, sampling.top_p, 1.0, seed).chooser()(
            rows, ids, 5
        )
        for seed in range(SEEDS)
    ]
    return torch.tensor(tokens)


def odds(counts: Tensor, probabilities: Tensor) -> float:
    """How probable a chi-square this large is, were the counts drawn with these probabilities."""
    likely = probabilities > 0
    assert not counts[~likely].any()
    expected = probabilities[likely].double() * counts.sum()
    assert expected.min() > 5, "too few draws for a chi-square"
    square = ((counts[likely] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(likely.sum().item() - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, square / 2))


def pair_odds(first: Tensor, second: Tensor) -> float:
    """How probable pairs at least this uneven are, were both drawn independently from LOGITS."""
    p = torch.softmax(LOGITS.double(), -1)
    pairs = torch.bincount(first * len(p) + second, minlength=len(p) ** 2)
    return odds(pairs, torch.outer(p, p).flatten())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.5, top_p=0.9),
    ],
    ids=str,
)
def test_frequencies_over_seeds_are_the_softmax(sampling: Sampling) -> None:
    """Over 10,000 seeds tokens come as often as they are probable (fails one time in a million)."""
    probabilities = torch.softmax(huggingface(sampling, LOGITS[None], [0], 1)[0].double(), -1)
    counts = torch.bincount(drawn(sampling)[:, 0], minlength=len(LOGITS))
    assert odds(counts, probabilities) > ODDS


def test_frequencies_over_positions_are_the_softmax() -> None:
    """Over 10,000 positions of one text, too, and neighbours are independent (2 in a million)."""
    choose = Sampling(temperature=1.0, seed=3).chooser()
    tokens = torch.tensor(choose(LOGITS.expand(SEEDS, -1), [0] * SEEDS, 1))
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert odds(counts, torch.softmax(LOGITS.double(), -1)) > ODDS
    assert pair_odds(tokens[::2], tokens[1::2]) > ODDS


def test_neighbouring_positions_are_independent() -> None:
    """Of 10,000 seeds, pairs of tokens at neighbouring positions come as chance has it (1e-6)."""
    tokens = drawn()
    assert pair_odds(tokens[:, 0], tokens[:, 1]) > ODDS


def test_neighbouring_seeds_are_independent() -> None:
    """Prompt i uses seed + i, and shares nothing with its neighbour, one position later (3e-6)."""
    tokens = drawn()
    assert pair_odds(tokens[::2, 0], tokens[1::2, 0]) > ODDS
    assert pair_odds(tokens[::2, 1], tokens[1::2, 0]) > ODDS
    assert pair_odds(tokens[::2, 0], tokens[1::2, 1]) > ODDS


def test_a_tiny_chance_stays_tiny() -> None:
    """Noise has no outliers: in 20,000,000 values none makes up for 40 nats (fails 1 in 1e10)."""
    likely, positions, size = 7, 400, 50_000
    logits = torch.zeros(1, size)
    logits[:, likely] = 40
    choose = Sampling(temperature=1.0, seed=11).chooser()
    expected = [[likely]] * positions
    assert expected == [choose(logits, [], position) for position in range(positions)]


def test_every_seed_writes_another_text() -> None:
    """64 seeds give 64 texts, and none is another one shifted by a few positions."""
    logits = torch.zeros(32, 50)
    choosers = [Sampling(temperature=1.0, seed=seed).chooser() for seed in range(64)]
    texts = [choose(logits, [], 0) for choose in choosers]
    parts = [tuple(text[shift : shift + 16]) for text in texts for shift in range(17)]
    assert len(parts) == len(set(parts))
