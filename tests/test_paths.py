"""Paths: sub-models by depth and by even spreading, and paths that no model has."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.paths import check_path, prefix, unified_skip

DEEPEST = 48


@pytest.mark.parametrize("num_layers", range(1, DEEPEST + 1))
def test_unified_skip_is_its_closed_form(num_layers: int) -> None:
    """Layer i of a budget b is ceil(i L / b), in integers, at every budget."""
    budgets = range(1, num_layers + 1)
    expected = [tuple(-(-i * num_layers // b) for i in range(b)) for b in budgets]
    assert expected == [unified_skip(b, num_layers) for b in budgets]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (12, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22)),
        (8, (0, 3, 6, 9, 12, 15, 18, 21)),
        (6, (0, 4, 8, 12, 16, 20)),
        (4, (0, 6, 12, 18)),
    ],
)
def test_unified_skip_keeps_the_published_layers(budget: int, expected: tuple[int, ...]) -> None:
    """For 24 layers the sets are those of Glavas et al. 2024."""
    assert expected == unified_skip(budget, 24)


@given(st.integers(1, 200).flatmap(lambda b: st.tuples(st.just(b), st.integers(b, 400))))
def test_unified_skip_spreads_its_budget_evenly(sizes: tuple[int, int]) -> None:
    """It is a path of as many layers as asked for, from layer 0 on, with gaps of two sizes."""
    budget, num_layers = sizes
    layers = unified_skip(budget, num_layers)
    check_path(layers, num_layers)
    assert (budget, 0) == (len(layers), layers[0])
    gaps = {b - a for a, b in zip(layers, [*layers[1:], num_layers], strict=True)}
    assert gaps <= {math.floor(num_layers / budget), math.ceil(num_layers / budget)}


@pytest.mark.parametrize("num_layers", range(1, DEEPEST + 1))
def test_a_prefix_is_the_first_layers(num_layers: int) -> None:
    """Every depth up to the whole model is a path of the model."""
    for depth in range(1, num_layers + 1):
        layers = prefix(depth, num_layers)
        check_path(layers, num_layers)
        assert list(range(depth)) == list(layers)


@pytest.mark.parametrize("make", [prefix, unified_skip])
@pytest.mark.parametrize(("layers", "num_layers"), [(0, 6), (-1, 6), (7, 6), (2, 1)])
def test_more_layers_than_there_are_or_none_are_refused(
    make: type[object], layers: int, num_layers: int
) -> None:
    """The message names what was asked for and what there is."""
    with pytest.raises(UsageError, match=f"{layers}.* 1 to {num_layers}$"):
        make(layers, num_layers)  # type: ignore[call-arg]


@given(st.sets(st.integers(0, 9), min_size=1), st.permutations(range(3)))
def test_any_ascending_layers_are_a_path(layers: set[int], order: list[int]) -> None:
    """Every set of the model's layers is accepted in ascending order, and in no other."""
    path = sorted(layers)
    check_path(path, 10)
    if order != sorted(order):
        with pytest.raises(UsageError, match="ascending"):
            check_path(order, 10)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([], "one or more"),
        ([0, 0], "ascending"),
        ([0, 2, 2], "ascending"),
        ([2, 1], "ascending"),
        ([-1, 0], "0 to 5"),
        ([0, 6], "0 to 5"),
        ([6], "0 to 5"),
    ],
)
def test_a_path_the_model_lacks_is_refused(layers: list[int], complaint: str) -> None:
    """Empty, repeated, descending and foreign layers are refused, and the path is named."""
    with pytest.raises(UsageError, match=complaint) as refusal:
        check_path(layers, 6)
    assert str(layers) in str(refusal.value)
