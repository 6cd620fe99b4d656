"""The first layers as a checkpoint: plain transformers loads the model's exit, or nothing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import offramp
from offramp.batch import Text
from offramp.card import read_card, write_card
from offramp.errors import UnsupportedModelError
from offramp.hf import export as exporting
from offramp.hf.cut import cut
from offramp.hf.export import export
from offramp.hf.load import load_checkpoint, quiet
from offramp.hf.tuned import load_tuned
from offramp.plan import write_plan
from offramp.step import step
from tests.conftest import byte_tokenizer, save_tiny
from tests.test_cli import Shell, shell
from tests.tools import TEN, generic
from tests.tuned import IDS, said, save_tuned

__all__ = ["shell"]  # a fixture

DEPTH = 3


def plain(folder: Path) -> Any:
    """Return what transformers alone makes of a checkpoint, and hold that it misses nothing."""
    with quiet():
        untyped: Any = AutoModelForCausalLM
        model, info = untyped.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("family", [*TEN, "gemma3_text"])
def test_an_exported_path_is_the_sub_model(
    tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """To the last bit in fp32; drafting for the full model, it leaves the greedy text as it is."""
    backbone, out = generic(family), tmp_path / "out"
    made = export(backbone, byte_tokenizer(), layers, out)
    small, ids = plain(out), IDS[0].tolist()
    assert small.config.get_text_config().num_hidden_layers == len(made.layers) == DEPTH
    assert made.parameters == sum(p.numel() for p in small.parameters())
    assert made.bytes == (out / "model.safetensors").stat().st_size
    text = Text(ids, backbone.open())
    expected = step(backbone, [text], layers=layers, tails=[len(ids)]).logits
    assert torch.equal(said(small)[0], expected)

    mask = torch.ones_like(IDS)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    with quiet():
        alone = backbone.model.generate(IDS, **options)
        drafted = backbone.model.generate(IDS, assistant_model=small, **options)
    assert torch.equal(alone, drafted)


def test_the_command_says_what_it_wrote(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Every depth, one line of text or one of JSON, and the tokenizer goes along."""
    record = shell.json("export", checkpoint, "--depth", 2, "--out", tmp_path / "two")
    assert (record["depth"], record["num_layers"], record["weights"]) == (2, 6, "fp32")
    status, out, _ = shell("export", checkpoint, "--depth", 6, "--out", tmp_path / "six")
    assert status == 0
    assert "6 of 6 layers" in out
    assert out.count("\n") == 1
    assert torch.equal(said(plain(tmp_path / "six")), said(plain(checkpoint)))
    kept = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert kept.chat_template == byte_tokenizer().chat_template
    assert kept("hé")["input_ids"] == byte_tokenizer()("hé")["input_ids"]
    answer = offramp.load(str(tmp_path / "two"), backbone="hf").generate("hi", max_new_tokens=8)
    plan = offramp.Plan(run=offramp.Path(layers=(0, 1)))
    early = offramp.load(str(checkpoint), backbone="hf").generate("hi", plan=plan, max_new_tokens=8)
    assert answer.outputs[0].token_ids == early.outputs[0].token_ids


def test_the_command_takes_the_path_of_a_plan(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """As search writes it; it answers as the plan does. Other plans are no models."""
    plan = offramp.Plan(run=offramp.Path(layers=(0, 2, 5)))
    write_plan(tmp_path / "path.json", plan)
    run = ("export", checkpoint, "--plan", tmp_path / "path.json", "--out", tmp_path / "out")
    shell.refused(2, "give --depth N or --plan FILE", *run, "--depth", 3)
    shell.refused(2, "give --depth N or --plan FILE", "export", checkpoint, *run[-2:])
    assert shell.json(*run)["layers"] == [0, 2, 5]
    small = offramp.load(str(tmp_path / "out"), backbone="hf").generate("hi", max_new_tokens=8)
    own = offramp.load(str(checkpoint), backbone="hf").generate("hi", plan=plan, max_new_tokens=8)
    assert small.outputs[0].token_ids == own.outputs[0].token_ids
    write_plan(tmp_path / "path.json", offramp.Plan())
    shell.refused(2, "only a path is a model", *run[:-1], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_generation_settings_go_along(tmp_path: Path) -> None:
    """Those of the model, not those that its configuration would give."""
    backbone = generic("llama")
    usual = backbone.model.generation_config
    try:
        backbone.model.generation_config = GenerationConfig(repetition_penalty=1.3, eos_token_id=7)
        export(backbone, byte_tokenizer(), range(DEPTH), tmp_path / "out")
    finally:
        backbone.model.generation_config = usual
    kept = plain(tmp_path / "out").generation_config
    assert (kept.repetition_penalty, kept.eos_token_id) == (1.3, 7)


def test_what_cannot_be_exported_writes_nothing(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """Depths that are none, a place that is taken or not there."""
    run, out = ("export", checkpoint, "--depth"), tmp_path / "out"
    shell.refused(2, "1 layer or more", *run, 0, "--out", out)
    shell.refused(2, "depth 7 is outside 1 to 6", *run, 7, "--out", out)
    shell.refused(1, "cannot write", *run, 2, "--out", tmp_path / "no" / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    shell.refused(2, "not empty", *run, 2, "--out", tmp_path)
    before = ("export", "no-such-model", "--depth", 2, "--out", tmp_path)
    shell.refused(2, "not empty", *before)  # said before anything is loaded
    shell.refused(2, "not empty", *run, 2, "--out", tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
    out.mkdir()
    assert shell.json(*run, 2, "--out", out)["depth"] == 2


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_export_leaves_nothing(
    shell: Shell,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    """Ctrl-C or a full disk with the weights written and the tokenizer not."""

    def stop(*_args: object, **_options: object) -> None:
        assert list(tmp_path.rglob("model.safetensors"))
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", stop)
    status, out, err = shell("export", checkpoint, "--depth", 2, "--out", tmp_path / "out")
    assert (status, out) == ((1, "") if isinstance(error, OSError) else (130, ""))
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_not_the_exit_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: here one norm was changed a little on the way."""
    backbone = generic("llama")

    def spoilt(*args: Any) -> Any:
        small = cut(*args)
        state = {key: value.clone() for key, value in small.state_dict().items()}
        state["model.norm.weight"][0] += 1e-2
        small.load_state_dict(state, assign=True)
        return small

    monkeypatch.setattr(exporting, "cut", spoilt)
    with pytest.raises(UnsupportedModelError, match="cut to 3 layers does not say"):
        export(backbone, byte_tokenizer(), range(DEPTH), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_family_that_depends_on_its_depth_is_refused(tmp_path: Path) -> None:
    """MiniCPM3 scales its layers by their number; the last layer of this NeoX has a bias more."""
    for family in ("minicpm3", "gpt_neox_japanese"):
        with pytest.raises(UnsupportedModelError, match="cut to 3 layers "):
            export(generic(family), byte_tokenizer(), range(DEPTH), tmp_path / family)
    assert not list(tmp_path.iterdir())


def test_precision_and_ties_are_kept(shell: Shell, tmp_path: Path) -> None:
    """A bf16 checkpoint is exported in bf16, and a shared embedding is stored once."""
    base = save_tiny(tmp_path / "base")
    model, _, _ = load_checkpoint(str(base), weights="bf16")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    record = shell.json("export", base, "--depth", DEPTH, "--out", tmp_path / "out")
    assert record["weights"] == "bf16"
    small = plain(tmp_path / "out")
    assert small.dtype == torch.bfloat16
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert record["bytes"] < 2 * record["parameters"] + 4096


def test_an_adapter_is_exported_merged(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """With all its layers it is the whole tuned model, for engines that know no adapters."""
    folder = save_tuned(checkpoint, tmp_path / "adapter", "adapter")
    shell.json("export", folder, "--depth", 6, "--out", tmp_path / "whole")
    assert torch.equal(said(plain(tmp_path / "whole")), said(load_tuned(str(folder)).model))


@pytest.mark.parametrize("kind", ["affine", "head", "block"])
def test_an_exit_with_a_readout_of_its_own_is_refused(
    checkpoint: Path, tmp_path: Path, kind: Any
) -> None:
    """The model's own norm and head would say something else there; other depths are exported."""
    folder = save_tuned(checkpoint, tmp_path / "tuned", "readouts")
    card = read_card(folder)
    assert card is not None
    write_card(folder, card.model_copy(update={"readouts": {DEPTH: kind}}))
    backbone, card = generic("llama"), read_card(folder)
    with pytest.raises(UnsupportedModelError, match=f"exit 3 is read out by a {kind}"):
        export(backbone, byte_tokenizer(), range(DEPTH), tmp_path / "out", card=card)
    assert not (tmp_path / "out").exists()
    assert export(backbone, byte_tokenizer(), range(2), tmp_path / "out", card=card).layers == (
        0,
        1,
    )
