"""Readers of tasks that ask for free text, and of text that is only read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from offramp.evaluate.items import Item, csv_rows, json_lines, text_of
from offramp.evaluate.meanings import as_prompt, parse_meaning
from offramp.text import with_input

_HELD_OUT = 50
"""One in so many rows of Alpaca is held out."""
_PASSAGE = 1000
"""Fewest characters of a passage that is read; it ends with a line."""


def vicuna(path: Path) -> Iterator[Item]:
    """Yield the 80 questions of Vicuna, first turns only."""
    for row in json_lines(path):
        yield Item(row["turns"][0])


def koala(path: Path) -> Iterator[Item]:
    """Yield the 180 prompts of Koala's test set."""
    for row in json_lines(path):
        yield Item(row["prompt"])


def wizardlm(path: Path) -> Iterator[Item]:
    """Yield the 218 instructions of WizardLM's test set."""
    for row in json_lines(path):
        yield Item(row["Instruction"])


def self_instruct(path: Path) -> Iterator[Item]:
    """Yield the 252 instructions for users of Self-Instruct, with the answers written for them."""
    for row in json_lines(path):
        one = row["instances"][0]
        yield Item(with_input(row["instruction"], one["input"]), (one["output"],))


def instructions(path: Path) -> Iterator[Item]:
    """Yield instructions with their inputs, such as PandaLM's."""
    for row in json_lines(path):
        yield Item(with_input(row["instruction"], row["input"]))


def alpaca(path: Path) -> Iterator[Item]:
    """Yield the one row in fifty of Alpaca that is held out: where SHA-256 of what it asks says so.

    It depends on nothing but the row: whoever trains on Alpaca leaves out what :func:`held_out`
    says.
    """
    for row in json_lines(path):
        if row["output"].strip() and held_out(row["instruction"], row["input"]):
            yield Item(with_input(row["instruction"], row["input"]), (row["output"],))


def held_out(instruction: str, given: str) -> bool:
    """Return whether a row of Alpaca is for tests alone."""
    digest = hashlib.sha256(f"{instruction}\n{given}".encode()).digest()
    return int.from_bytes(digest[:8]) % _HELD_OUT == 0


def e2e(path: Path) -> Iterator[Item]:
    """Yield the meanings of E2E's test set, each with all its references."""
    rows: dict[str, list[str]] = {}
    for meaning, text in csv_rows(path)[1:]:
        rows.setdefault(meaning, []).append(" ".join(text.split()))
    for meaning, texts in rows.items():
        yield Item(as_prompt(parse_meaning(meaning)), tuple(texts))


def passages(path: Path) -> Iterator[Item]:
    """Yield a text in passages of whole lines."""
    lines: list[str] = []
    for line in text_of(path).splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= _PASSAGE:
            yield Item("".join(lines))
            lines = []
    if "".join(lines).strip():
        yield Item("".join(lines))
