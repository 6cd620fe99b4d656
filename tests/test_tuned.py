"""What comes out of tuning is opened as it is, whatever its form, and never trusted."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offramp
from offramp.card import CARD, Base, read_card, write_card
from offramp.errors import OfframpError
from offramp.hf import tuned
from offramp.hf.backbone import fingerprint
from offramp.hf.load import load_checkpoint
from offramp.hf.lora import ADAPTER, ADAPTER_CONFIG
from tests.conftest import save_tiny
from tests.test_cli import Shell, shell
from tests.tuned import IDS, card_of, said, save_adapter, save_tuned

__all__ = ["shell"]  # a fixture

FORMS = ("checkpoint", "adapter", "readouts")


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tuned model of each form; do not change them."""
    place = tmp_path_factory.mktemp("tuned")
    return {form: save_tuned(checkpoint, place / form, form) for form in FORMS}


@pytest.fixture
def adapter(folders: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter to be spoilt."""
    return Path(shutil.copytree(folders["adapter"], tmp_path / "adapter"))


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["hf", "fast"])
def test_every_form_opens_with_its_card(
    folders: dict[str, Path], checkpoint: Path, form: str, backbone: Any
) -> None:
    """And is the model that was tuned: its own weights, its base changed, or its base as it was."""
    model = offramp.load(str(folders[form]), backbone=backbone)
    assert model.card == read_card(folders[form])
    assert model.card is not None
    held = said(model.backbone.model)  # type: ignore[attr-defined]
    base = said(load_checkpoint(str(checkpoint))[0])
    assert torch.equal(held, base) == (form == "readouts")
    if form == "checkpoint":
        assert torch.equal(held, said(load_checkpoint(str(folders[form]))[0]))
    tokens = model.generate("hello", max_new_tokens=4).outputs[0].token_ids
    assert len(tokens) == 4
    assert offramp.load(str(checkpoint), backbone="hf").card is None


def test_what_other_programs_open_is_the_same_model_at_full_depth(
    folders: dict[str, Path], checkpoint: Path
) -> None:
    """A checkpoint itself, the base of readouts; nothing of an adapter, which changes its base."""
    assert tuned.at_full_depth(None) is tuned.at_full_depth("default-exits") is None
    for form in ("checkpoint", "readouts"):
        whole = tuned.at_full_depth(str(folders[form]))
        expected = said(tuned.load_tuned(str(folders[form])).model)
        assert torch.equal(said(load_checkpoint(whole)[0]), expected)
    with pytest.raises(OfframpError, match="offramp export"):
        tuned.at_full_depth(str(folders["adapter"]))


def test_every_verb_takes_an_adapter(
    shell: Shell, folders: dict[str, Path], checkpoint: Path
) -> None:
    """As it is; ``inspect`` says how it was tuned, and other engines are left out of a race."""
    folder, ask = folders["adapter"], ("--prompt", "hello", "--max-new-tokens", 4)
    run = (*ask, "--backbone", "hf")
    answers = [
        shell.json("generate", model, *run)["outputs"][0]["token_ids"]
        for model in (folder, checkpoint)
    ]
    assert answers[0] != answers[1]
    assert shell.json("trace", folder, *run)["model"] == str(folder)
    assert shell.json("inspect", folder, *run)["card"]["recipe"]["name"] == "lite"
    status, out, _ = shell("inspect", folder, *run)
    assert status == 0
    assert "Tuned by lite on 1,234 tokens of alpaca.jsonl, from " in out
    assert "2 (shared), 4 (shared)" in out
    race = ("bench", folder, "--backbone", "hf", "--weights", "fp32", "--context", 8)
    small = ("--tokens", 2, "--rounds", 1, "--batch-size", 1)
    assert {row["name"] for row in shell.json(*race, *small)["rows"]} == {"hf fp32 full"}
    shell.refused(2, "make one with offramp export", *race, "--against", "hf")


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "scaled": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "whole modules": {"modules_to_save": ["norm", "lm_head"]},
    "some layers": {"layers_to_transform": [1, 2]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [40, 41]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_is_the_adapted_model(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """The logits are those of peft's own model; nothing of peft is left in it."""
    expected = save_adapter(checkpoint, tmp_path, **ADAPTERS[kind])
    model = tuned.load_tuned(str(tmp_path)).model  # no card: the adapter names its base
    torch.testing.assert_close(said(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, said(load_checkpoint(str(checkpoint))[0]), atol=1e-2)
    assert type(model).__name__ == "LlamaForCausalLM"
    plain = {name for name, _ in load_checkpoint(str(checkpoint))[0].named_parameters()}
    assert {name for name, _ in model.named_parameters()} == plain


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["adapted", "saved whole"],
)
def test_an_adapter_of_a_tied_head_leaves_the_embedding_alone(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Merged into the matrix that both share, it would change both."""
    base = save_tiny(tmp_path / "base")
    tied = load_checkpoint(str(base))[0]
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(base)
    expected = save_adapter(base, tmp_path / "adapter", **settings)
    model = tuned.load_tuned(str(tmp_path / "adapter"), weights="own").model
    torch.testing.assert_close(said(model), expected, atol=1e-4, rtol=1e-4)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("size", [0.1, 2e-3])
def test_a_fingerprint_tells_a_merged_adapter_from_its_base(
    checkpoint: Path, tmp_path: Path, size: float
) -> None:
    """Even a slight one; and the model has the same one in every precision."""
    save_adapter(checkpoint, tmp_path, size=size, init_lora_weights="gaussian")
    found = {
        fingerprint(tuned.load_tuned(str(tmp_path), weights=kind).model)
        for kind in ("fp32", "bf16", "own")
    }
    assert len(found) == 1
    assert fingerprint(load_checkpoint(str(checkpoint))[0]) not in found


def test_an_adapter_is_merged_before_weights_are_rounded(
    folders: dict[str, Path], checkpoint: Path
) -> None:
    """In bf16 the parameters are those of the fp32 model, rounded once; tables stay precise."""
    full = tuned.load_tuned(str(folders["adapter"])).model
    half = tuned.load_tuned(str(folders["adapter"]), weights="bf16").model
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert half(IDS).logits.dtype == torch.bfloat16


def test_a_tuned_model_is_not_rounded_to_its_base_in_silence(
    folders: dict[str, Path], checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Int4 says what it does to one; int8 keeps it, and a base has nothing to lose.

    Nor have readouts over it: int4 does not touch them.
    """
    harmless = (folders["checkpoint"], "int8"), (checkpoint, "int4"), (folders["readouts"], "int4")
    with caplog.at_level(logging.WARNING, logger="offramp"):
        for folder, weights in harmless:
            offramp.load(str(folder), weights=weights)  # type: ignore[arg-type]
        assert not caplog.records
        offramp.load(str(folders["checkpoint"]), weights="int4")
    assert "int4 rounds away most of what tuning" in caplog.text


@pytest.mark.parametrize("form", ["adapter", "readouts"])
def test_another_base_is_refused_by_both_fingerprints(
    folders: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Same shapes, other weights: the folder the card names has changed."""
    folder = Path(shutil.copytree(folders[form], tmp_path / form))
    other = save_tiny(tmp_path / "other", seed=1)
    card = read_card(folder)
    assert card is not None
    write_card(folder, card.model_copy(update={"base": Base(name=str(other), fingerprint="0f")}))
    now = fingerprint(load_checkpoint(str(other))[0])
    with pytest.raises(OfframpError, match=f"fingerprint 0f, .* {now}: it is another base model"):
        offramp.load(str(folder))


def test_the_default_model_is_known_by_its_shown_name(
    folders: dict[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card names it as ``inspect`` shows it, and no hub is asked for it."""
    folder = Path(shutil.copytree(folders["adapter"], tmp_path / "default"))
    card = card_of(checkpoint)
    named = card.base.model_copy(update={"name": "SmolLM2-135M-Instruct"})
    write_card(folder, card.model_copy(update={"base": named}))
    asked: list[str | None] = []

    def load(name: str | None, **options: Any) -> Any:
        asked.append(name)
        return load_checkpoint(str(checkpoint), **options)

    monkeypatch.setattr(tuned, "load_checkpoint", load)
    tuned.load_tuned(str(folder))
    assert asked == [None]


def _pickled(folder: Path) -> None:
    (folder / ADAPTER).rename(folder / "adapter_model.bin")


def _absent(folder: Path) -> None:
    (folder / ADAPTER).unlink()


def _truncated(folder: Path) -> None:
    data = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(data[: len(data) // 2])


def _one_less(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    del tensors[min(tensors)]
    save_file(tensors, folder / ADAPTER)


def _one_more(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file(tensors | {"base_model.model.extra": torch.zeros(1)}, folder / ADAPTER)


def _wider(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file({key: torch.cat((t, t)) for key, t in tensors.items()}, folder / ADAPTER)


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file({key: t * float("nan") for key, t in tensors.items()}, folder / ADAPTER)


def _set(**facts: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / ADAPTER_CONFIG, **facts)


def _written(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / ADAPTER_CONFIG).write_text(text)


SPOILT: list[tuple[str, Callable[[Path], object]]] = [
    ("as pickle", _pickled),
    ("holds no adapter_model.safetensors", _absent),
    ("cannot be read", _truncated),
    ("has no counterpart", _one_less),
    ("has no counterpart", _one_more),
    ("does not fit its base model", _wider),
    ("cannot be merged", _not_finite),
    ("only LoRA adapters", _set(peft_type="IA3")),
    ("'megatron_config' is set", _set(megatron_config={"a": 1}, megatron_core="this")),
    ("'layer_replication' is set", _set(layer_replication=[[0, 2], [0, 2]])),
    ("'tomorrows_setting' is set", _set(tomorrows_setting=True)),
    ("'init_lora_weights' is set", _set(init_lora_weights="pissa")),
    ("does not fit its base model", _set(target_modules=["no_such_module"])),
    ("does not fit its base model", _set(r=10**9)),
    ("does not fit its base model", _set(r="four")),
    ("is no JSON", _written("{")),
    ("is no JSON", _written("[" * 10**5)),
    ("is no configuration", _written("[]")),
]


@pytest.mark.parametrize(("words", "spoil"), SPOILT)
def test_a_spoilt_adapter_is_refused(
    shell: Shell, adapter: Path, words: str, spoil: Callable[[Path], object]
) -> None:
    """In one sentence, and nothing runs."""
    spoil(adapter)
    shell.refused(1, words, "generate", adapter, "--prompt", "a")


def test_an_adapter_without_peft_says_what_to_install(
    shell: Shell, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an extra; everything else opens without."""
    monkeypatch.setitem(sys.modules, "peft", None)
    shell.refused(1, "pip install offramp[tune]", "generate", adapter, "--prompt", "a")


def test_a_base_is_no_more_trusted_than_a_model(
    shell: Shell, adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Its code is not run unasked, its pickles are not read, and an adapter in it is not loaded."""
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    card = card_of(base)
    write_card(adapter, card)
    run = ("generate", adapter, "--prompt", "a")

    edit(base / "config.json", model_type="own", auto_map={"AutoConfig": "code.Config"})
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shell.refused(1, "config.json", *run)
    (base / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    named = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    shutil.copy(base / "code.py", adapter)
    for folder in (base, adapter):
        facts = {"tokenizer_class": "Tokenizer", "auto_map": named}
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
        shell(*run)
    assert not (tmp_path / "ran").exists()
    (adapter / "tokenizer_config.json").unlink()

    shutil.copy(adapter / ADAPTER_CONFIG, base)
    (base / "adapter_model.bin").write_bytes(b"no pickle at all")
    shell.refused(1, "holds an adapter, where a whole checkpoint is needed", *run)

    (base / ADAPTER_CONFIG).unlink()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    shell.refused(1, "as pickle", *run)
    write_card(adapter, card.model_copy(update={"base": Base(name="", fingerprint="")}))
    shell.refused(1, "cannot open ''", *run)


def test_a_checkpoint_with_an_adapter_in_it_is_an_adapter(
    folders: dict[str, Path], checkpoint: Path, adapter: Path
) -> None:
    """transformers would load both in its own way; here the card names the base."""
    shutil.copy(checkpoint / "config.json", adapter)
    shutil.copy(checkpoint / "model.safetensors", adapter)
    expected = said(tuned.load_tuned(str(folders["adapter"])).model)
    assert torch.equal(said(tuned.load_tuned(str(adapter)).model), expected)


def test_a_card_must_be_of_this_model(
    shell: Shell, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Exits that it does not have, readouts that are not there, nothing beside the card."""
    folder = Path(shutil.copytree(folders["checkpoint"], tmp_path / "model"))
    run = ("generate", folder, "--prompt", "a")
    edit(folder / CARD, exits=[2, 7])
    shell.refused(1, "names exit 7 of a model of 6 layers", *run)
    edit(folder / CARD, exits=[2], readouts={"2": "affine"})
    shell.refused(1, "exit 2 has a readout of its own, but no readouts.safetensors", *run)
    (folder / "config.json").unlink()
    shell.refused(1, "holds a card, but no weights", *run)
    edit(folder / CARD, exits=[0])
    shell.refused(1, "is no card of a tuned model", *run)


def test_a_card_cannot_command_the_terminal(
    shell: Shell, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Control characters in names are shown, not sent."""
    folder = Path(shutil.copytree(folders["checkpoint"], tmp_path / "model"))
    edit(folder / CARD, recipe={"name": "\x1b[2J"})
    run = ("--prompt", "a", "--max-new-tokens", 2, "--backbone", "hf")
    status, out, _ = shell("inspect", folder, *run)
    assert status == 0
    assert "Tuned by \\x1b[2J" in out
    assert "\x1b" not in out
    shell.refused(1, "\\x1b[2J.gguf", "generate", "\x1b[2J.gguf", "--prompt", "a")


def test_the_tokenizer_of_the_tuned_model_goes_before_that_of_its_base(
    adapter: Path, checkpoint: Path
) -> None:
    """Tuning may have taught it a chat template."""
    base = tuned.load_tuned(str(adapter)).tokenizer
    base.chat_template = "{{ messages[0]['content'] }}!"
    base.save_pretrained(adapter)
    assert tuned.load_tuned(str(adapter)).tokenizer.chat_template == base.chat_template
    assert load_checkpoint(str(checkpoint))[1].chat_template != base.chat_template


def test_who_learnt_raw_prompts_is_asked_in_raw_prompts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Without a flag: the card says how it was tuned, and no template is put around a prompt.

    Readouts leave the model as it is, so it keeps its own.
    """
    for form in FORMS:
        folder = Path(shutil.copytree(folders[form], tmp_path / form))
        for raw in (True, False):
            edit(folder / CARD, recipe={"name": "lite", "settings": {"raw": raw}})
            template = offramp.load(str(folder), backbone="hf").tokenizer.chat_template
            assert (template is None) == (raw and form != "readouts")
