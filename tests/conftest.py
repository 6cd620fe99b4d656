"""Fixtures: a tiny checkpoint on disk with a real tokenizer, and the default model where it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import offramp
from offramp.errors import OfframpError
from offramp.hf.load import default_gguf

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may reach for a hub
# Tiny models gain nothing from threads, and beside other work threads that spin lose minutes.
torch.set_num_threads(1)

_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a browser where there is none; the summary counts them."""
    if CHROMIUM and importlib.util.find_spec("playwright"):
        return
    without = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if item not in without]
    config.hook.pytest_deselected(items=without)


def byte_tokenizer(*, template: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, with an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    if template:
        tokenizer.chat_template = _TEMPLATE
    return tokenizer


def save_tiny(folder: Path, *, layers: int = 6, seed: int = 0) -> Path:
    """Write a tiny random llama and its tokenizer as an ordinary checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=256,
            )
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint on disk; do not change it."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_timings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for measured times: a test neither finds the user's nor leaves any."""
    folder = tmp_path_factory.mktemp("timings")
    monkeypatch.setattr("offramp.timing.cache_dir", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> offramp.Model:
    """The tiny checkpoint, loaded."""
    return offramp.load(str(checkpoint), backbone="hf")


@pytest.fixture(scope="session")
def smol() -> offramp.Model:
    """SmolLM2-135M-Instruct, loaded once per session."""
    try:
        default_gguf()
    except OfframpError as error:
        pytest.skip(str(error))
    return offramp.load(backbone="hf")
