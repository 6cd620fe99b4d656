"""Examples side by side in rows, without cross-talk: which go together, and as what tensors.

Positions that restart tell most models where an example ends; ``find_isolation`` finds out, for a
given one, what does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offramp.errors import UsageError
from offramp.tune.data import Example

IGNORED = -100
"""The label of a position that nothing is learnt at; PyTorch's own default."""

_OPEN_ROWS = 32

Pack = list[int]
"""Indices of the examples in one row, in order."""

Isolation = Literal["positions", "mask", "rows"]
"""What keeps packed examples apart: restarting positions, a mask, or a row for each."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed examples, padded on the right. All tensors are ``[B, T]`` int64."""

    ids: Tensor
    """Token ids; 0 in padding."""
    positions: Tensor
    """Within each example, from 0; 0 in padding."""
    segments: Tensor
    """Which example of its row a token is of; -1 in padding."""
    labels: Tensor
    """The token that follows, where that is one to learn of the same example; else -100."""

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segments >= 0).sum())

    def to(self, device: Any) -> Batch:
        """Return the batch on a device."""
        parts = (self.ids, self.positions, self.segments, self.labels)
        return Batch(*(part.to(device) for part in parts))


def pack(
    examples: Sequence[Example], length: int, seed: int, epoch: int, *, alone: bool = False
) -> list[Pack]:
    """Shuffle the examples and put whole ones together in rows; the same for the same numbers.

    Each goes into the fullest of the last 32 rows that has room for it.

    Args:
        examples: each at most ``length`` tokens.
        length: most tokens of a row.
        seed: of the run.
        epoch: each has an order of its own.
        alone: one example a row, for models whose examples nothing else keeps apart.

    Raises:
        UsageError: an example is longer than a row.
    """
    longest = max((len(example.ids) for example in examples), default=0)
    if longest > length:
        raise UsageError(f"an example of {longest} tokens does not fit into a row of {length}")
    order = list(range(len(examples)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    if alone:
        return [[index] for index in order]
    rows: list[Pack] = []
    room: list[int] = []
    for index in order:
        size = len(examples[index].ids)
        fitting = [row for row in range(len(rows))[-_OPEN_ROWS:] if room[row] >= size]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(length)
        fullest = min(fitting, key=room.__getitem__)
        rows[fullest].append(index)
        room[fullest] -= size
    return rows


def efficiency(packs: Sequence[Pack], examples: Sequence[Example], length: int) -> float:
    """Return the share of real tokens if every row were padded to ``length``."""
    real = sum(len(examples[index].ids) for members in packs for index in members)
    return real / max(len(packs) * length, 1)


def collate(packs: Sequence[Pack], examples: Sequence[Example]) -> Batch:
    """Return the tensors of some rows, padded to the longest of them."""
    rows = [_row([examples[index] for index in members]) for members in packs]
    padded = [
        nn.utils.rnn.pad_sequence([row[part] for row in rows], True, padding)
        for part, padding in enumerate((0, 0, -1, IGNORED))
    ]
    return Batch(*padded)


def _row(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    labels: list[int] = []
    for number, example in enumerate(examples):
        size, first = len(example.ids), example.first
        ids += example.ids
        positions += range(size)
        segments += [number] * size
        labels += [*[IGNORED] * (first - 1), *example.ids[first:], IGNORED]
    made = [torch.tensor(part) for part in (ids, positions, segments, labels)]
    return made[0], made[1], made[2], made[3]


def block_mask(segments: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what is added to attention scores, ``[B, 1, T, T]``: 0 back in time in an example.

    Windows are not in it. Padding sees padding, so no row of the softmax is empty.
    """
    size = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    seen = same & torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


def model_inputs(
    batch: Batch, isolation: Isolation, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return the keywords that a model is called with; its cache stays off.

    With ``positions``, transformers builds block-diagonal masks from positions that restart, but
    only without a mask and without a cache. With ``rows``, padding comes last and nobody sees it.

    Raises:
        ValueError: ``rows``, but there are several examples in one.
    """
    if isolation == "rows" and bool((batch.segments > 0).any()):
        raise ValueError("examples in one row would see each other: pack them alone")
    inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    if isolation != "rows":
        inputs["position_ids"] = batch.positions
    if isolation == "mask":
        inputs["attention_mask"] = block_mask(batch.segments, dtype)
    return inputs


@torch.no_grad()
def find_isolation(model: Any) -> Isolation:
    """Try what keeps packed examples apart in this model: three short ones, packed and alone.

    Of the families that open, 89 heed positions. BioGPT, MPT, OPT and XGLM need the mask; AFMoE,
    BLOOM and GPT-OSS a row for each example.

    Args:
        model: a causal LM of transformers; its mode is left as it was.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    examples = [
        Example(torch.randint(vocabulary, (size,), generator=generator).tolist(), 1)
        for size in (5, 7, 4)
    ]
    packed = collate([[0, 1, 2]], examples)
    ways: list[Isolation] = ["positions"] if _windowed(model.config) else ["positions", "mask"]
    with _evaluating(model):
        alone = [_logits(model, collate([[index]], examples), "rows") for index in range(3)]
        expected = torch.cat(alone, 1)
        for way in ways:
            try:
                found = _logits(model, packed, way)
            except (ValueError, RuntimeError, TypeError, IndexError):
                continue  # it takes no such mask
            if _equal(expected, found, model.dtype):
                return way
    return "rows"


def _windowed(config: Any) -> bool:
    """Whether some layers see less than all: one mask cannot be right for every layer then."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))


def _logits(model: Any, batch: Batch, isolation: Isolation) -> Tensor:
    device, dtype = model.device, model.dtype
    inputs = model_inputs(batch, isolation, dtype)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    logits: Tensor = model(**moved).logits
    return logits.float()


def _equal(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Cross-talk moves logits by about as much as they are; rounding in bf16 by a few percent."""
    share = 1e-3 if dtype == torch.float32 else 0.05
    return bool((expected - found).abs().max() <= share * expected.abs().max())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
