"""Asks a language model behind an OpenAI-compatible endpoint which of two answers is better.

Pairwise, in both orders: judges prefer a place (Zheng et al. 2023, "Judging LLM-as-a-Judge",
section 3.4), so that a preference counts only where it survives the swap; all else is a tie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
from pydantic import ValidationError

from offramp.errors import OfframpError
from offramp.evaluate.endpoint import WORDING, Choice, Endpoint
from offramp.records import Record

Outcome = Literal["win", "tie", "loss", "failed"]

_MOST_FILE_BYTES = 2**28
_WORTH: dict[Outcome, float | None] = {"win": 1.0, "tie": 0.5, "loss": 0.0, "failed": None}


class Pair(Record):
    """Two answers to one prompt."""

    prompt: str
    ours: str
    theirs: str


class _Said(Record):
    """One line of the file of verdicts: what the judge said to one question."""

    key: str
    """Digest of all that was asked, order and judge included."""
    choice: Choice
    retried: int


@dataclass(frozen=True)
class Verdicts:
    """What became of all pairs."""

    outcomes: tuple[Outcome, ...]
    """Of each pair, in the order given, from the side of ``ours``."""
    retried: int
    """Attempts beyond the first of each question, those of earlier runs included."""

    @property
    def wins(self) -> int:
        """Return the pairs where ours was better in both orders."""
        return self.outcomes.count("win")

    @property
    def ties(self) -> int:
        """Return the pairs where it was not clear, and those whose answers are the same."""
        return self.outcomes.count("tie")

    @property
    def losses(self) -> int:
        """Return the pairs where theirs was better in both orders."""
        return self.outcomes.count("loss")

    @property
    def failed(self) -> int:
        """Return the pairs that the judge could not be brought to judge."""
        return self.outcomes.count("failed")


def judge_pairs(
    pairs: Sequence[Pair],
    endpoint: Endpoint,
    kept: Path,
    *,
    progress: Callable[[int], object] = lambda pairs: None,
) -> Verdicts:
    """Ask the judge about every pair in both orders; equal answers are a tie without asking.

    After time-outs, refusals for load (429), errors of the server (5xx) and replies that hold no
    verdict it is asked again, with growing waits; a pair whose question is given up counts as
    failed, and the run goes on. Answers of the judge are added to a file as they come: the same
    call goes on where it was interrupted, and asks again what had failed.

    Args:
        pairs: what to judge.
        endpoint: the judge.
        kept: JSON lines of what it said.
        progress: told 1 after every pair.

    Raises:
        UsageError: the key is not in the environment.
        OfframpError: the judge refuses this key or this model (401, 403, 404); the file cannot be
            read or written, or holds something else.
    """
    known = _read(kept)
    outcomes: list[Outcome] = []
    retried = 0
    try:
        with (
            kept.open("a", encoding="utf-8") as file,
            endpoint.client() as client,
        ):
            judge = _Judge(client, endpoint, known, lambda said: _add(file, said))
            for pair in pairs:
                outcomes.append(judge.rule(pair))
                progress(1)
            retried = judge.retried
    except OSError as error:
        raise OfframpError(f"cannot write the verdicts {kept}: {error.strerror}") from error
    return Verdicts(tuple(outcomes), retried)


@dataclass
class Preference:
    """Judges answers for ``evaluate``, and counts what went wrong."""

    endpoint: Endpoint
    kept: Path
    failed: int = 0
    retried: int = 0

    def __call__(self, texts: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """Return what ``(prompt, ours, theirs)`` is worth: 1, 0.5 or 0; None without a verdict."""
        from tqdm import tqdm

        pairs = [Pair(prompt=asked, ours=ours, theirs=theirs) for asked, ours, theirs in texts]
        with tqdm(total=len(pairs), desc="judge", unit="pair", leave=False) as bar:
            found = judge_pairs(pairs, self.endpoint, self.kept, progress=bar.update)
        self.failed += found.failed
        self.retried += found.retried
        return [_WORTH[outcome] for outcome in found.outcomes]


class _Judge:
    """Puts questions that have no answer yet."""

    def __init__(
        self,
        client: httpx2.Client,
        endpoint: Endpoint,
        known: dict[str, _Said],
        keep: Callable[[_Said], None],
    ) -> None:
        self._client, self._endpoint, self._known, self._keep = client, endpoint, known, keep
        self.retried = 0

    def rule(self, pair: Pair) -> Outcome:
        """Return what becomes of a pair."""
        if pair.ours == pair.theirs:
            return "tie"
        ahead = self._ask(pair.prompt, pair.ours, pair.theirs)
        behind = ahead and self._ask(pair.prompt, pair.theirs, pair.ours)
        match ahead, behind:
            case None, _:
                return "failed"
            case _, None:
                return "failed"
            case "first", "second":
                return "win"
            case "second", "first":
                return "loss"
            case _:
                return "tie"

    def _ask(self, prompt: str, first: str, second: str) -> Choice | None:
        """Return the judge's choice, or None where it made none in so many attempts."""
        asked = [WORDING, self._endpoint.url, self._endpoint.model, prompt, first, second]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if key not in self._known:
            choice, retried = self._endpoint.ask(self._client, prompt, first, second)
            if choice is None:
                self.retried += retried
                return None
            self._known[key] = _Said(key=key, choice=choice, retried=retried)
            self._keep(self._known[key])
        self.retried += self._known[key].retried
        return self._known[key].choice


def _read(path: Path) -> dict[str, _Said]:
    """Return what was said, by question; a line that was cut off while it was written is removed.

    Raises:
        OfframpError: the file cannot be read, is too large or holds something else.
    """
    try:
        if not path.exists():
            return {}
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise OfframpError(f"{path} is too large for a file of verdicts")
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        said = [_Said.model_validate_json(line) for line in whole.splitlines()]
        if whole != content:
            os.truncate(path, len(whole))
    except OSError as error:
        raise OfframpError(f"cannot read the verdicts {path}: {error.strerror}") from error
    except ValidationError as error:
        raise OfframpError(f"{path} is no file of verdicts; name another file") from error
    return {one.key: one for one in said}


def _add(file: Any, said: _Said) -> None:
    """Write a line so that it is there if the next thing that happens is a power cut."""
    file.write(said.model_dump_json() + "\n")
    file.flush()
    os.fsync(file.fileno())
