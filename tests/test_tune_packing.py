"""Packing: every example whole and once, labels of answers only, no cross-talk in any family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp.errors import UsageError
from offramp.tune.data import Example
from offramp.tune.packing import (
    IGNORED,
    Isolation,
    collate,
    efficiency,
    find_isolation,
    model_inputs,
    pack,
)
from tests.families import build
from tests.tools import TEN, assert_close

LAW = settings(max_examples=100, deadline=None)
LENGTH = 24

_OTHERWISE: dict[str, Isolation] = {
    **dict.fromkeys(("biogpt", "mpt", "opt", "xglm"), "mask"),
    **dict.fromkeys(("afmoe", "bloom", "gpt_oss"), "rows"),
}
_FAMILIES = sorted({*TEN, *_OTHERWISE, "gemma3_text", "gpt_neo", "llama4_text", "mistral"})


@st.composite
def examples_of(draw: st.DrawFn) -> list[Example]:
    """Examples of at most LENGTH tokens, no token among them twice."""
    sizes = draw(st.lists(st.integers(2, LENGTH), max_size=60))
    made, token = [], 1000
    for size in sizes:
        made.append(Example(list(range(token, token + size)), draw(st.integers(1, size - 1))))
        token += size
    return made


numbers = st.integers(0, 2**31)


@LAW
@given(examples_of(), numbers, numbers, st.booleans())
def test_an_epoch_has_every_example_whole_and_once(
    examples: list[Example], seed: int, epoch: int, alone: bool
) -> None:
    """In rows that are not too long, and none is empty."""
    packs = pack(examples, LENGTH, seed, epoch, alone=alone)
    assert list(range(len(examples))) == sorted(index for row in packs for index in row)
    assert all(0 < sum(len(examples[index].ids) for index in row) <= LENGTH for row in packs)
    assert not alone or all(len(row) == 1 for row in packs)


@LAW
@given(examples_of(), numbers, numbers)
def test_packs_depend_on_seed_and_epoch_alone(
    examples: list[Example], seed: int, epoch: int
) -> None:
    """A run that was killed goes on with the very same rows."""
    assert pack(examples, LENGTH, seed, epoch) == pack(examples, LENGTH, seed, epoch)


def test_packs_are_the_same_in_another_process() -> None:
    """Pinned: an order that came of `hash` would pass every other test."""
    examples = [Example([1] * size, 1) for size in (2, 3, 4, 5)]
    assert pack(examples, 7, 0, 1) == [[3, 0], [2, 1]]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    examples = [Example([1, 2], 1) for _ in range(50)]
    made = [pack(examples, 8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(packs) for packs in made}) == 9


def test_rows_are_well_filled() -> None:
    """At most a twentieth of padding where examples are short against rows; alone, most is."""
    examples = [Example([1] * (20 + 37 * i % 180), 1) for i in range(500)]
    assert efficiency(pack(examples, 512, 0, 0), examples, 512) > 0.95
    assert efficiency(pack(examples, 512, 0, 0, alone=True), examples, 512) < 0.3


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="9 tokens does not fit into a row of 8"):
        pack([Example([1] * 9, 1)], 8, 0, 0)


@LAW
@given(examples_of().filter(bool), numbers)
def test_a_position_learns_the_next_token_of_its_answer(examples: list[Example], seed: int) -> None:
    """Labels are the answers, each once; prompts, padding and neighbours are never learnt."""
    packs = pack(examples, LENGTH, seed, 0)
    batch = collate(packs, examples)
    answers = {
        (ids[at - 1], ids[at])
        for ids, first in ((example.ids, example.first) for example in examples)
        for at in range(first, len(ids))
    }
    learnt = batch.labels != IGNORED
    pairs = list(zip(batch.ids[learnt].tolist(), batch.labels[learnt].tolist(), strict=True))
    assert answers == set(pairs)
    assert len(answers) == len(pairs) == sum(len(e.ids) - e.first for e in examples)


@LAW
@given(examples_of().filter(bool), numbers)
def test_a_batch_holds_its_examples(examples: list[Example], seed: int) -> None:
    """Each in a segment of its own with positions from 0; padding comes last."""
    packs = pack(examples, LENGTH, seed, 0)
    batch = collate(packs, examples)
    longest = 0
    for row, members in enumerate(packs):
        for number, index in enumerate(members):
            there = batch.segments[row] == number
            assert examples[index].ids == batch.ids[row][there].tolist()
            assert list(range(len(examples[index].ids))) == batch.positions[row][there].tolist()
        padding = batch.segments[row] == -1
        longest = max(longest, int((~padding).sum()))
        assert not padding[: int((~padding).sum())].any()
    assert batch.ids.shape[1] == longest
    assert batch.tokens == sum(len(example.ids) for example in examples)
    tensors = (batch.ids, batch.positions, batch.segments, batch.labels)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def _examples(sizes: tuple[int, ...] = (5, 11, 2, 9, 4)) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [
        Example(torch.randint(4, 160, (size,), generator=generator).tolist(), 1) for size in sizes
    ]


def _model(family: str, attention: str) -> Any:
    model = build(family, layers=3)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} attention")
    return model


def _alone(model: Any, example: Example) -> Tensor:
    """The logits of an example that is all there is, without any of our tensors."""
    logits: Tensor = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", _FAMILIES)
@torch.no_grad()
def test_packed_examples_do_not_see_each_other(family: str, attention: str) -> None:
    """Nor padding; also where examples are longer than a window. What it takes is found out."""
    model = _model(family, attention)
    isolation = find_isolation(model)
    assert _OTHERWISE.get(family, "positions") == isolation
    examples = _examples()
    packs = [[0, 1, 2], [3, 4]] if isolation != "rows" else [[index] for index in range(5)]
    batch = collate(packs, examples)
    logits = model(**model_inputs(batch, isolation)).logits
    for row, members in enumerate(packs):
        for number, index in enumerate(members):
            expected = _alone(model, examples[index])
            assert_close(expected, logits[row][batch.segments[row] == number])


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_packed_gradients_are_those_of_the_examples(family: str) -> None:
    """In training mode."""
    model, examples = build(family, layers=3), _examples()
    isolation = find_isolation(model)
    losses = [
        cross_entropy(_alone(model, e)[:-1], torch.tensor(e.ids[1:]), reduction="sum")
        for e in examples
    ]
    expected = torch.autograd.grad(
        torch.stack(losses).sum(), list(model.parameters()), allow_unused=True
    )
    for module in model.modules():  # OPT drops with a probability of its own
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train()
    batch = collate([[0, 1, 2], [3, 4]], examples)
    logits = model(**model_inputs(batch, isolation)).logits.flatten(0, 1)
    packed = cross_entropy(logits, batch.labels.flatten(), reduction="sum", ignore_index=IGNORED)
    actual = torch.autograd.grad(packed, list(model.parameters()), allow_unused=True)
    assert any(gradient is not None for gradient in expected)
    for one, other in zip(expected, actual, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_close(one, other)


@torch.no_grad()
def test_a_mask_serves_under_autocast() -> None:
    """Whose queries are bf16 where the mask is not."""
    model, examples = _model("opt", "sdpa"), _examples()
    batch = collate([[0, 1, 2], [3, 4]], examples)
    expected = model(**model_inputs(batch, "mask")).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**model_inputs(batch, "mask")).logits
    assert (expected - rounded).abs().max() <= 0.1 * expected.abs().max()


def test_finding_out_leaves_the_model_as_it_was() -> None:
    model = build("opt", layers=2).train()
    before = torch.random.get_rng_state()
    find_isolation(model)
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_examples_in_a_row_need_something_that_keeps_them_apart() -> None:
    batch = collate([[0, 1]], _examples())
    with pytest.raises(ValueError, match="would see each other"):
        model_inputs(batch, "rows")
