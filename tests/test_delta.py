"""A dense adapter of a bit per weight: what it keeps, on which layers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import offramp
from offramp.batch import Text
from offramp.card import Base, write_card
from offramp.errors import OfframpError
from offramp.hf.backbone import fingerprint
from offramp.hf.cut import cut
from offramp.hf.delta import DELTA, GROUP, with_delta, write_delta
from offramp.hf.load import load_checkpoint
from offramp.step import step
from tests.conftest import byte_tokenizer
from tests.test_cli import Shell, shell
from tests.tools import generic
from tests.tuned import card_of, said

__all__ = ["shell"]  # a fixture

LAYERS = (0, 2, 5)
Shape = tuple[int, ...]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose rows are as long as groups; do not change it."""
    return save_wide(tmp_path_factory.mktemp("base") / "model")


def save_wide(folder: Path, inner: int = 3 * GROUP) -> Path:
    """Write a random model of 6 layers, two groups wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=2 * GROUP,
        intermediate_size=inner,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tuned_on(base: Path, size: float = 0.02) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return some layers of the base, and the same with every weight changed."""
    small, changed = (cut(load_checkpoint(str(base))[0], LAYERS) for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    for parameter in changed.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=draw)
    return small, changed


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A tuned model of this form: to be opened, or spoilt."""
    small, changed = tuned_on(base)
    made = tmp_path / "tuned"
    made.mkdir()
    write_delta(made, small, changed)
    whole = fingerprint(load_checkpoint(str(base))[0])
    known = Base(name=str(base), fingerprint=whole, layers=LAYERS)
    write_card(made, card_of(base).model_copy(update={"base": known, "exits": ()}))
    return made


def test_signs_are_kept_and_scales_are_the_mean_of_their_group(base: Path, tmp_path: Path) -> None:
    """So no ``± scale`` is nearer in squares; what is no matrix is kept whole, in fp16."""
    small, changed = tuned_on(base)
    before = {name: weight.clone() for name, weight in small.named_parameters()}
    write_delta(tmp_path, small, changed)
    after = dict(with_delta(small, tmp_path).named_parameters())
    assert after.keys() == before.keys()
    for name, weight in changed.named_parameters():
        wanted, found = weight - before[name], after[name] - before[name]
        if weight.dim() < 2:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
            continue
        groups, kept = (part.unflatten(1, (-1, GROUP)) for part in (wanted, found))
        sure = groups.abs() > 1e-6
        assert torch.equal(groups.sign()[sure], kept.sign()[sure])
        mean = groups.abs().mean(2, keepdim=True).expand_as(kept)
        torch.testing.assert_close(kept.abs(), mean, rtol=1e-2, atol=1e-6)
    weights = sum(weight.numel() for weight in before.values())
    assert (tmp_path / DELTA).stat().st_size < weights / 8 * 1.25 + 2**14


@pytest.mark.parametrize("backbone", ["hf", "fast"])
def test_some_layers_of_a_base_open_with_the_change_in_them(
    base: Path, folder: Path, backbone: str
) -> None:
    """Whatever backbone runs it; and a second time it is the same model to the last bit."""
    small, _ = tuned_on(base)
    expected = said(with_delta(small, folder))
    model = offramp.load(str(folder), backbone=backbone)  # type: ignore[arg-type]
    held = model.backbone.model  # type: ignore[attr-defined]
    assert model.backbone.shape.num_layers == len(LAYERS)
    assert torch.equal(said(held), expected)
    assert not torch.equal(expected, said(tuned_on(base)[0]))
    assert len(model.generate("hello", max_new_tokens=4).outputs[0].token_ids) == 4
    assert model.card is not None
    assert model.card.base.layers == LAYERS
    again = offramp.load(str(folder), backbone="hf")
    assert again.backbone.fingerprint == model.backbone.fingerprint


def test_it_is_added_before_weights_are_rounded(base: Path, folder: Path) -> None:
    """In bf16 the parameters are those of the fp32 model, rounded once."""
    whole = dict(offramp.load(str(folder), backbone="hf").backbone.model.named_parameters())  # type: ignore[attr-defined]
    half = offramp.load(str(folder), backbone="hf", weights="bf16").backbone.model  # type: ignore[attr-defined]
    for name, weight in half.named_parameters():
        assert torch.equal(weight, whole[name].to(torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "phi3"])
def test_a_cut_model_says_what_its_layers_say(family: str) -> None:
    """It runs as it is, tables that no checkpoint holds included, and shares the weights."""
    backbone = generic(family)
    ids = list(range(40, 60))
    layers = [0, backbone.shape.num_layers - 1]
    text = Text(list(ids), backbone.open())
    expected = step(backbone, [text], layers=layers, tails=[len(ids)]).logits
    torch.testing.assert_close(said(cut(backbone.model, layers))[0], expected, rtol=1e-4, atol=1e-4)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return spoil


def _sign(tensors: dict[str, torch.Tensor], name: str, signs: Shape, scales: Shape) -> None:
    """Keep a bit per weight where all of it was kept."""
    del tensors[f"{name}.added"]
    tensors[f"{name}.sign"] = torch.zeros(signs, dtype=torch.uint8)
    tensors[f"{name}.scale"] = torch.zeros(scales, dtype=torch.float16)


NAME = "model.layers.1.mlp.up_proj.weight"
SPOILT: list[tuple[str, Callable[[Path], None]]] = [
    ("is no safetensors file", _truncated),
    ("holds a card, but no weights", lambda path: path.unlink()),
    ("no such weight", _edited(lambda t: t.update({"model.layers.9.x.added": torch.zeros(1)}))),
    ("no such weight", _edited(lambda t: t.update({f"{NAME}.other": torch.zeros(1)}))),
    ("does not fit", _edited(lambda t: t.pop(f"{NAME}.scale"))),
    ("does not fit", _edited(lambda t: t.pop(f"{NAME}.sign"))),
    ("does not fit", _edited(lambda t: t.update({f"{NAME}.sign": t[f"{NAME}.sign"].float()}))),
    ("does not fit", _edited(lambda t: t.update({f"{NAME}.sign": t[f"{NAME}.sign"][1:]}))),
    ("does not fit", _edited(lambda t: t.update({"model.norm.weight.sign": torch.zeros(8)}))),
    ("does not fit", _edited(lambda t: _sign(t, "model.norm.weight", (0, 0), (0, 0)))),
    ("does not fit", _edited(lambda t: _sign(t, "model.norm.weight", (2 * GROUP // 8,), (2,)))),
    ("finite", _edited(lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"] * torch.inf}))),
]


@pytest.mark.parametrize(("words", "spoil"), SPOILT)
def test_a_spoilt_file_is_refused(folder: Path, words: str, spoil: Callable[[Path], None]) -> None:
    """In one sentence that names the first thing wrong."""
    spoil(folder / DELTA)
    with pytest.raises(OfframpError, match=words):
        offramp.load(str(folder))


def test_bits_of_rows_that_are_no_groups_are_refused(tmp_path: Path) -> None:
    """Such a weight is kept whole; a file that says otherwise is spoilt."""
    small, changed = tuned_on(save_wide(tmp_path / "base", inner=100))
    write_delta(tmp_path, small, changed)
    name = "model.layers.1.mlp.down_proj.weight"
    _edited(lambda t: _sign(t, name, (2 * GROUP, 12), (2 * GROUP, 1)))(tmp_path / DELTA)
    with pytest.raises(OfframpError, match="does not fit"):
        with_delta(small, tmp_path)


def test_another_base_is_refused(shell: Shell, folder: Path, tmp_path: Path) -> None:
    """And layers that it does not have; other engines are told how to get a whole checkpoint."""
    card = (folder / "offramp.json").read_text()
    (folder / "offramp.json").write_text(card.replace('"fingerprint": "', '"fingerprint": "0'))
    shell.refused(1, "another base model", "generate", folder, "--prompt", "a")
    (folder / "offramp.json").write_text(card.replace("5\n    ]", "6\n    ]"))
    shell.refused(2, "layers 0 to 5", "generate", folder, "--prompt", "a")
    (folder / "offramp.json").write_text(card)
    ask = ("--prompt", "hello", "--max-new-tokens", 2, "--backbone", "hf")
    assert "from layers 0, 2, 5 of " in shell("inspect", folder, *ask)[1]
    shell.refused(2, "offramp export", "bench", folder, "--against", "hf")


def test_what_changed_nothing_or_elsewhere_is_not_written(base: Path, tmp_path: Path) -> None:
    """There is nothing to add, or no weight to add it to."""
    small, _ = tuned_on(base)
    with pytest.raises(OfframpError, match="nothing was changed"):
        write_delta(tmp_path, small, small)
    with pytest.raises(OfframpError, match=r"the base has no model\.layers\.1"):
        write_delta(tmp_path, cut(load_checkpoint(str(base))[0], [0]), small)
    assert not list(tmp_path.iterdir())
