"""How near answers are to the full model's own: words, meaning, length, and its loss on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from kept import Kept

from offramp.evaluate.overlap import rouge_l
from offramp.evaluate.similarity import open_embedder, similarities

Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Cosines of the embeddings of texts, pair by pair, -1 to 1."""


def minilm() -> Similarity:
    """Return the similarity by all-MiniLM-L6-v2 (256 word pieces of each text), offline.

    Raises:
        OfframpError: the embedder is not installed.
    """
    return partial(similarities, open_embedder())


def nearness(own: str, full: str) -> float:
    """Return ROUGE-L against the full model's answer; 1 for the same text, an empty one too."""
    return 1.0 if own == full else rouge_l(own, [full])


def quality(
    own: Kept, full: Kept, tokenizer: Any, similarity: Similarity | None = None
) -> dict[str, float | None]:
    """Return means over texts against the full model's answers to the same prompts.

    ``same_text``: share of answers that are the full model's token for token. ``rouge_l``: of words
    (:mod:`narrow_scores`). ``similarity``: cosine of meaning; None without an embedder.
    ``length_ratio``: tokens of all answers, of the full model's. ``loss``: nats per token under the
    model's own full depth; ``full_loss``: the same of its own answers.
    """
    said, meant = (
        [tokenizer.decode(new, skip_special_tokens=True) for new in kept.written]
        for kept in (own, full)
    )
    pairs = list(zip(own.written, full.written, strict=True))
    tokens, full_tokens = (sum(map(len, kept.written)) for kept in (own, full))
    return {
        "same_text": fmean(a == b for a, b in pairs),
        "rouge_l": fmean(map(nearness, said, meant)),
        "similarity": fmean(similarity(said, meant)) if similarity else None,
        "tokens": tokens,
        "length_ratio": tokens / full_tokens,
        "loss": sum(own.loss) / tokens,
        "full_loss": sum(full.loss) / full_tokens,
    }
