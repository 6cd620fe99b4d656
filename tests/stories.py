"""The real 260K-parameter story model and its tokenizer, read from llama2.c files where present."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_HEADER = struct.Struct("<7i")
_SCORE_AND_LENGTH = struct.Struct("<fi")
_BYTE_PIECE = re.compile(rb"<0x([0-9A-F]{2})>")
_FIRST_BYTE_ID = 3  # after unknown, begin and end come the 256 bytes


def data_dir() -> Path | None:
    """The folder of shared data: OFFRAMP_DATA, or beside the checkout. None where there is none."""
    named = os.environ.get("OFFRAMP_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(named) if named else beside
    return folder if folder.is_dir() else None


def load_stories() -> tuple[LlamaForCausalLM, StoriesTokenizer]:
    """The model, in fp32 and ready to run, and its tokenizer of 512 pieces."""
    weights, pieces = _file("stories260K.bin"), _file("tok512.bin")
    return _read_model(weights.read_bytes()), StoriesTokenizer.read(pieces.read_bytes())


def _file(name: str) -> Path:
    folder = data_dir()
    path = folder and folder / "stories260k_model" / name
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The story model's {name} is not here: set OFFRAMP_DATA to the folder that holds"
            " stories260k_model, or put it in shared/data beside the checkout."
        )
    return path


class _Weights:
    """Takes tensors one after another from the floats that follow the header."""

    def __init__(self, content: bytes) -> None:
        self._floats = torch.frombuffer(bytearray(content[_HEADER.size :]), dtype=torch.float32)
        self._taken = 0

    def take(self, *shape: int) -> Tensor:
        start = self._taken
        self._taken += torch.Size(shape).numel()
        return self._floats[start : self._taken].view(shape)

    @property
    def left(self) -> int:
        return len(self._floats) - self._taken


def _read_model(content: bytes) -> LlamaForCausalLM:
    width, inner, layers, heads, kv_heads, vocabulary, positions = _HEADER.unpack_from(content)
    config = LlamaConfig(
        vocab_size=abs(vocabulary),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,  # a negative size marks a head of its own
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,  # trained on stories that follow each other: the next one's start ends it
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_state(config, _Weights(content)))
    model.train(mode=False)
    return model


def _state(config: LlamaConfig, weights: _Weights) -> dict[str, Tensor]:
    """The tensors by their Hugging Face names. The file keeps each kind for all layers at once."""
    layers, heads, kv_heads = (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
    )
    width, inner, size = config.hidden_size, config.intermediate_size, config.hidden_size // heads
    embeddings = weights.take(config.vocab_size, width)
    stacked = {
        "input_layernorm": weights.take(layers, width),
        "self_attn.q_proj": _halved(weights.take(layers, heads, size, width)),
        "self_attn.k_proj": _halved(weights.take(layers, kv_heads, size, width)),
        "self_attn.v_proj": weights.take(layers, kv_heads * size, width),
        "self_attn.o_proj": weights.take(layers, width, heads * size),
        "post_attention_layernorm": weights.take(layers, width),
        "mlp.gate_proj": weights.take(layers, inner, width),
        "mlp.down_proj": weights.take(layers, width, inner),
        "mlp.up_proj": weights.take(layers, inner, width),
    }
    norm = weights.take(width)
    weights.take(2, config.max_position_embeddings, size // 2)  # rotary tables, made anew by Llama
    head = embeddings if config.tie_word_embeddings else weights.take(config.vocab_size, width)
    assert weights.left == 0, f"{weights.left} floats left over: not a llama2.c version-0 file"
    return {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": norm,
        "lm_head.weight": head,
        **{
            f"model.layers.{layer}.{name}.weight": of_all[layer]
            for name, of_all in stacked.items()
            for layer in range(layers)
        },
    }


def _halved(rows: Tensor) -> Tensor:
    """Rotary pairs lie side by side in llama2.c; Llama has the first of each, then the second."""
    layers, heads, size, width = rows.shape
    pairs = rows.view(layers, heads, size // 2, 2, width)
    return pairs.transpose(2, 3).reshape(layers, heads * size, width)


@dataclass(frozen=True)
class StoriesTokenizer:
    """Byte-pair encoding by the score of the merged piece, as llama2.c does it."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    bos_token_id: int = 1
    eos_token_id: int = 1

    @classmethod
    def read(cls, content: bytes) -> StoriesTokenizer:
        """From the longest piece's length, then score, length and bytes of each piece."""
        pieces, scores, place = [], [], 4
        while place < len(content):
            score, length = _SCORE_AND_LENGTH.unpack_from(content, place)
            place += _SCORE_AND_LENGTH.size + length
            pieces.append(content[place - length : place])
            scores.append(score)
        return cls(tuple(pieces), tuple(scores))

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: index for index, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, which starts with a space of its own as it did in training."""
        ids = [index for letter in f" {text}" for index in self._letter(letter)] if text else []
        while (best := self._best_merge(ids)) is not None:
            place, merged = best
            ids[place : place + 2] = [merged]
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, without the space that encoding put before it."""
        kept = [int(i) for i in ids if not (skip_special_tokens and i < _FIRST_BYTE_ID)]
        content = b"".join(self._bytes(self.pieces[index]) for index in kept)
        return content.decode("utf-8", errors="replace").removeprefix(" ")

    def _letter(self, letter: str) -> list[int]:
        content = letter.encode()
        known = self._ids.get(content)
        return [byte + _FIRST_BYTE_ID for byte in content] if known is None else [known]

    def _best_merge(self, ids: list[int]) -> tuple[int, int] | None:
        merges = [
            (place, self._ids[pair])
            for place, (one, two) in enumerate(pairwise(ids))
            if (pair := self.pieces[one] + self.pieces[two]) in self._ids
        ]
        return max(merges, key=lambda merge: self.scores[merge[1]], default=None)

    @staticmethod
    def _bytes(piece: bytes) -> bytes:
        named = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(named[1], 16)]) if named else piece
