"""What a task asks: items of prompt and right answers; demonstrations; files and their readers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.text import Prompt


@dataclass(frozen=True, order=True)
class Item:
    """One thing that is asked."""

    prompt: Prompt
    """Of a text to be read, the text itself."""
    references: tuple[str, ...] = ()
    """Right answers; none where the full model's own answer is what others are compared with."""


Make = Callable[[Sequence[Path], random.Random], list[Item]]
"""From a task's files to its items, in an order that the generator draws."""
Read = Callable[[Path], Iterable[Item]]


def drawn(read: Read) -> Make:
    """Return the items of one file, in a drawn order."""

    return lambda paths, draw: shuffled(read(paths[0]), draw)


def shuffled(items: Iterable[Item], draw: random.Random) -> list[Item]:
    """Return the items in a drawn order."""
    order = list(items)
    draw.shuffle(order)
    return order


def few_shot(items: Iterable[Item], shots: int, draw: random.Random) -> list[Item]:
    """Return items that begin with the same demonstrations, drawn from among them and left out.

    A demonstration is a prompt with its first reference and an empty line (Brown et al. 2020).
    """
    order = sorted(set(items))
    draw.shuffle(order)
    shown = demonstrations(order[:shots])
    return [Item(f"{shown}{item.prompt}", item.references) for item in order[shots:]]


def demonstrations(items: Iterable[Item]) -> str:
    """Return prompts with their first references, as what comes before a prompt."""
    return "".join(f"{item.prompt}{item.references[0]}\n\n" for item in items)


def shown(read: Read, shots: int) -> Make:
    """Return the items of one file with so many demonstrations, in a drawn order."""
    return lambda paths, draw: few_shot(read(paths[0]), shots, draw)


def choice(question: str, choices: Sequence[str]) -> str:
    """Return a question with lettered choices, as a prompt that a letter answers."""
    listed = "".join(f"{chr(65 + i)}. {text}\n" for i, text in enumerate(choices))
    return f"Question: {question}\n{listed}Answer:"


def text_of(path: Path) -> str:
    """Return the text of a file, unpacked if its name ends in .gz."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()


def json_lines(path: Path) -> list[Any]:
    """Return the JSON values of a file, one per line."""
    return [json.loads(line) for line in text_of(path).split("\n") if line.strip()]


def csv_rows(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file, its head as well if it has one."""
    return list(csv.reader(io.StringIO(text_of(path), newline="")))
