"""Sketches of prompts: a few hashes, by which one tells later whether others were among them.

Of up to ``MOST`` prompts every hash is kept, of more the smallest ones (a bottom-k sketch, Broder
1997). A prompt whose hash is not above the largest kept one is among those kept or was not there,
and the others are not judged: of many prompts a known share is watched, evenly drawn, and a hit is
as good as a fact, for 64 bits hardly ever meet by chance.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

MOST = 8192
"""Hashes that are kept: 87 kB of a card. Of the 52,000 prompts of Alpaca a sixth are watched, so
twenty shared ones escape one time in thirty."""


def keys(prompts: Iterable[str | Sequence[Mapping[str, str]]]) -> tuple[int, ...]:
    """Return a hash of 64 bits of what each prompt says, whatever form it is written in.

    Case, white space and the width of letters (NFKC) do not count, nor the roles of chat messages,
    nor what the system is told: that stands in front of many.
    """
    return tuple(_key(prompt) for prompt in prompts)


def _key(prompt: str | Sequence[Mapping[str, str]]) -> int:
    if not isinstance(prompt, str):
        prompt = "\n".join(said["content"] for said in prompt if said["role"] != "system")
    plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def sketched(hashes: Iterable[int]) -> str:
    """Return the sketch of prompts by their hashes, in base64."""
    kept = sorted(set(hashes))[:MOST]
    return base64.b64encode(struct.pack(f"<{len(kept)}Q", *kept)).decode()


def unpacked(sketch: str) -> list[int]:
    """Return the hashes in a sketch, ascending.

    Raises:
        ValueError: it is none.
    """
    raw = base64.b64decode(sketch, validate=True)
    if len(raw) % 8 or len(raw) > 8 * MOST:
        raise ValueError("no sketch of prompts")
    kept = list(struct.unpack(f"<{len(raw) // 8}Q", raw))
    if kept != sorted(set(kept)):
        raise ValueError("no sketch of prompts: its hashes do not ascend")
    return kept


def among(hashes: Iterable[int], sketch: str) -> tuple[int, int]:
    """Return how many prompts are among those of a sketch, and of how many that can be told."""
    kept = unpacked(sketch)
    known, last = set(kept), kept[-1] if len(kept) == MOST else 2**64
    watched = [one for one in hashes if one <= last]
    return sum(one in known for one in watched), len(watched)
