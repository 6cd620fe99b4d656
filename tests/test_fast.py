"""The edges of the fast backbone: weight formats, what it refuses, life without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offramp
import offramp.fast.pack
from offramp.errors import UnsupportedModelError, UsageError
from offramp.fast.backbone import FastBackbone
from offramp.fast.build import UnavailableError, kernels
from offramp.fast.open import open_fast
from offramp.fast.pack import Format, dequantise, quantise
from offramp.hf.backbone import HFBackbone
from offramp.hf.check import probe_ids, read_at
from offramp.hf.open import open_model
from offramp.readouts import ExitReadout
from tests.families import build
from tests.tools import generic


def _grid(rows: int, codes: int, *, symmetric: bool) -> torch.Tensor:
    """Return weights as GGUF would hold them: half-precision steps, every code in use."""
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, codes, (rows, 4, 32), generator=generator).float()
    code[..., 0], code[..., 1] = 0, codes - 1
    step = (torch.rand(rows, 4, 1, generator=generator) * 0.01 + 1e-4).half().float()
    low = torch.randn(rows, 4, 1, generator=generator).mul(0.1).half().float()
    weight = step * (code - codes // 2) if symmetric else step * code + low
    return weight.flatten(1)


@pytest.mark.parametrize(
    ("form", "codes", "symmetric"),
    [("int4", 16, False), ("int4", 16, True), ("int8", 16, False), ("int8", 255, True)],
)
def test_weights_out_of_a_gguf_file_are_found_again(
    form: Format, codes: int, symmetric: bool
) -> None:
    """Q4_1, Q4_0 and Q8_0: de-quantised and packed again, they are what they were."""
    weight = _grid(40, codes, symmetric=symmetric)
    again = dequantise(*quantise(weight, form))
    assert (again - weight).abs().max().item() <= 1e-6


@pytest.mark.parametrize(("codes", "symmetric"), [(16, False), (16, True), (255, True)])
@pytest.mark.parametrize("size", [0.1, 0.2, 0.4])
def test_what_tuning_added_to_gguf_weights_is_not_rounded_away(
    codes: int, symmetric: bool, size: float
) -> None:
    """Less than half a step of int8: some weights take it, some do not, on average it is there."""
    weight = _grid(400, codes, symmetric=symmetric)
    groups = weight.view(400, 4, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 255
    draw = torch.randn(groups.shape, generator=torch.Generator().manual_seed(2)).sign()
    change = (size * step[..., None] * draw).flatten(1)
    kept = dequantise(*quantise(weight + change, "int8")) - weight
    share = (kept * change).sum() / change.square().sum()
    assert 0.85 <= share.item() <= 1.15


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.01), ("int4", 0.12)])
def test_any_weights_are_held_within_half_a_step(form: Format, bound: float) -> None:
    """Relative to their size, root mean square; zeros stay zeros."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    again = dequantise(*quantise(weight, form))
    assert (again - weight).square().mean().sqrt().item() <= bound
    assert not again[3].any()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_it_is_all_the_same_how_many_weights_are_quantised_at_once(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    once = quantise(weight, form)
    monkeypatch.setattr(offramp.fast.pack, "_AT_ONCE", 96 * 7)
    for part, whole in zip(quantise(weight, form), once, strict=True):
        assert torch.equal(part, whole)


def test_what_tuning_added_to_an_exits_block_is_held_beside_int4() -> None:
    """Layers on int4's own grid, a block a little off: it reads out as precisely as one on it."""
    model, draw = build("llama"), torch.Generator().manual_seed(3)
    base = open_model(model)
    for layer in base.adapter.layers:
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.data = dequantise(*quantise(parameter.data, "int4"))
    last = dict(base.adapter.layers[-1].named_parameters())

    def off(size: float) -> tuple[float, torch.Tensor]:
        """Return how far int4 is from fp32 with a block so far from the grid, and the logits."""
        block = {
            name: p.detach() + size * p.std(-1, keepdim=True) * torch.randn(p.shape, generator=draw)
            if p.ndim == 2
            else p.detach()
            for name, p in last.items()
        }
        backbone = open_model(model, {3: ExitReadout("block", block)})
        ids = probe_ids(backbone.shape.vocab_size)
        expected = read_at(backbone, 3, ids, first=7)
        found = read_at(open_fast(backbone, weights="int4"), 3, ids, first=7)
        return (found - expected).square().mean().sqrt().item(), expected

    (error, plain), (tuned_error, tuned) = off(0.0), off(0.1)
    assert (tuned - plain).square().mean().sqrt().item() > 2 * error, "it changes what is said"
    assert tuned_error <= 1.3 * error


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "cohere", "exaone4", "ministral3", "olmo"])
def test_a_model_with_other_parts_is_refused(family: str) -> None:
    """With a sentence that names it, not with a wrong token."""
    with pytest.raises(UnsupportedModelError, match=type(generic(family).model).__name__):
        open_fast(generic(family))


def test_a_model_that_turns_its_logits_around_is_refused() -> None:
    """What the kernels settle is the largest product, which would be the least logit."""
    model = build("granite")
    model.config.logits_scaling = model.logits_scaling = -0.8
    with pytest.raises(UnsupportedModelError, match=r"multiplies its logits by -1\.25"):
        open_fast(open_model(model))


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Forget the loaded library before and after."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@pytest.mark.usefixtures("no_kernels")
def test_without_a_compiler_the_generic_backbone_runs(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Auto says so in one line; asked for by name, the fast backbone is an error."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger="offramp"):
        model = offramp.load(str(checkpoint))
    assert isinstance(model.backbone, HFBackbone)
    assert ["no-such-compiler cannot be run" in record.message for record in caplog.records] == [
        True
    ]
    with pytest.raises(UnavailableError, match="no-such-compiler"):
        offramp.load(str(checkpoint), backbone="fast")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_kernels")
def test_an_unwritable_cache_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the folder and the remedy."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("OFFRAMP_CACHE", str(blocked))
    with pytest.raises(UnavailableError, match="set OFFRAMP_CACHE"):
        kernels()


def test_the_door_chooses_the_backbone(checkpoint: Path) -> None:
    """Fast by default for a Llama; the same greedy text from either; formats need the fast one."""
    fast, slow = offramp.load(str(checkpoint)), offramp.load(str(checkpoint), backbone="hf")
    assert isinstance(fast.backbone, FastBackbone)
    assert fast.id == slow.id
    options = {"max_new_tokens": 12, "batch_size": 2}
    prompts = ["hello", "a longer one", "x"]
    answers = [model.generate(prompts, **options) for model in (fast, slow)]
    assert answers[0].outputs == answers[1].outputs
    assert answers[0].figures.work == answers[0].figures.baseline
    with pytest.raises(UsageError, match="int4"):
        offramp.load(str(checkpoint), backbone="hf", weights="int4")


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_default_model_is_held_exactly(smol: offramp.Model) -> None:
    """Its Q4_1 layers in int4 and its Q8_0 head in int8, without a second rounding."""
    model = smol.backbone.model  # type: ignore[attr-defined]
    worst = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            form: Format = "int8" if name == "lm_head" else "int4"
            weight = module.weight.detach()
            again = dequantise(*quantise(weight, form))
            worst = max(worst, (again - weight).abs().max().item())
    assert worst <= 1e-7
