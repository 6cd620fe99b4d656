"""What a task of the harness asks of generation, and the refusal of what offramp does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from offramp.errors import UsageError
from offramp.sample import Sampling

_KNOWN = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
}
_IGNORED = {"num_beams": 1, "use_cache": True}
"""Options that change nothing as long as they have these values."""


@dataclass(frozen=True)
class Wanted:
    """The options of one request."""

    until: tuple[str, ...]
    """Stop strings, each once."""
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings that end an answer; an empty one would end it at once."""
        return tuple(stop for stop in self.until if stop)

    def sampling(self, seed: int) -> Sampling:
        """Return how tokens are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, seed)


def wanted(options: Mapping[str, Any], max_gen_toks: int) -> Wanted:
    """Return the generation options of a request, under the harness's names.

    Args:
        options: the task's ``generation_kwargs``.
        max_gen_toks: most new tokens, where they do not say.

    Raises:
        UsageError: an option that offramp does not have.
    """
    found = dict(normalize_gen_kwargs(dict(options), max_gen_toks))
    strange = sorted(
        name
        for name in found.keys() - _KNOWN
        if name not in _IGNORED or found[name] != _IGNORED[name]
    )
    if strange:
        raise UsageError(
            f"offramp has no generation option {', '.join(strange)}; a task's generation_kwargs "
            f"may name {', '.join(sorted(_KNOWN))}"
        )
    samples = bool(found["do_sample"])
    return Wanted(
        until=tuple(dict.fromkeys(found["until"])),
        max_new_tokens=found["max_gen_toks"],
        temperature=float(found.get("temperature", 1.0)) if samples else 0.0,
        top_k=int(found.get("top_k", 0)) if samples else 0,
        top_p=float(found.get("top_p", 1.0)) if samples else 1.0,
        repetition_penalty=float(found.get("repetition_penalty", 1.0)),
    )
