"""Training through int4's rounding: what comes out lies on its steps, and is what was judged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import UsageError
from offramp.fast.pack import dequantise, quantise
from offramp.tune.data import read_examples
from offramp.tune.network import Net
from offramp.tune.report import judge
from offramp.tune.rounding import Rounded
from offramp.tune.run import hold_out, tune
from tests.test_tune_loop import rows, settings, weights  # noqa: F401
from tests.test_tune_place import interrupted, model, no_pictures  # noqa: F401


def on_steps(weight: Tensor) -> Tensor:
    """Return a matrix as int4 holds it."""
    return dequantise(*quantise(weight, "int4"))


def matrices(folder: Path) -> dict[str, Tensor]:
    """Return the matrices of the decoder layers."""
    return {n: w for n, w in weights(folder).items() if ".layers." in n and w.dim() == 2}


@pytest.mark.parametrize("recipe", ["sft", "lite", "sorted", "layerskip", "skip"])
def test_int4_holds_what_came_out_as_it_is(
    recipe: str,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No weight is rounded again, some were moved to another step, and nobody is warned."""
    chosen = settings(recipe, rounding="int4", learning_rate=2e-2)  # far, past the ends of steps
    out = tune(str(model), [str(rows)], chosen, tmp_path / "out").folder
    began, moved = matrices(model), 0
    for name, weight in matrices(out).items():
        torch.testing.assert_close(on_steps(weight), weight, rtol=1e-5, atol=1e-6)
        moved += int((weight - on_steps(began[name])).abs().gt(1e-3).sum())
    assert moved
    with caplog.at_level(logging.WARNING):
        offramp.load(str(out), weights="int4", backbone="fast")
    assert "int4" not in caplog.text


def test_the_figures_are_those_of_the_rounded_model(
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before and after: what is reported is what int4 will run."""
    chosen = settings(rounding="int4")
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    opened = offramp.load(str(tuned.folder), backbone="hf")
    read = read_examples([str(rows)], tokenizer=opened.tokenizer, raw=False, max_length=64)
    held = hold_out(read.examples, chosen)[1]
    net: Any = opened.backbone.model  # type: ignore[attr-defined]
    assert judge(Net(net, (2, 4)), held, 64, "cpu") == tuned.after["held out"]
    plain = tune(str(model), [str(rows)], settings(), tmp_path / "plain")
    assert plain.before != tuned.before


def test_a_rounded_run_goes_on_bit_for_bit(
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """After a kill, as any run."""
    chosen = settings(rounding="int4")
    whole = tune(str(model), [str(rows)], chosen, tmp_path / "whole").folder
    interrupted(model, rows, tmp_path / "killed", 4, chosen)
    again = tune(str(model), [str(rows)], chosen, tmp_path / "killed").folder
    kept = weights(whole)
    assert all(torch.equal(kept[name], weight) for name, weight in weights(again).items())


@pytest.mark.parametrize("inputs", [64, 40])
def test_gradients_pass_the_rounding(inputs: int) -> None:
    """As if it were not there, but at the ends of a group's steps, which must stay."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(48, inputs))
    grid = Rounded(weight)
    rounded = grid(weight)
    torch.testing.assert_close(
        rounded, on_steps(nn.functional.pad(weight, (0, -inputs % 32)))[:, :inputs]
    )
    upstream = torch.randn_like(rounded)
    rounded.backward(upstream)
    held = grid.ends.flatten(1)[:, :inputs]
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream.masked_fill(held, 0))
    assert 0 < held.float().mean() <= 2 / 32 + 0.03


@pytest.mark.parametrize(
    "changes", [{"lora": 2}, {"recipe": "heads", "readout": "affine"}, {"recipe": "gates"}]
)
def test_what_trains_no_weights_is_not_rounded(
    changes: dict[str, Any],
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Refused in one sentence."""
    with pytest.raises(UsageError, match="--rounding"):
        tune(str(model), [str(rows)], settings(**changes, rounding="int4"), tmp_path / "out")
