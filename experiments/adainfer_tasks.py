"""Few-shot tasks with answers of one word, as AdaInfer was tried on; read from local files."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SHOTS, LONG_SHOTS = 4, 2
LONG = ("commonsense_qa", "mmlu")
"""Tasks of long questions, which get fewer demonstrations."""
TOPICS = ("World", "Sports", "Business", "Technology")


@dataclass(frozen=True)
class Item:
    """A prompt with its demonstrations, and the answer, of which the first token counts."""

    prompt: str
    answer: str


Pairs = Callable[[Path], list[tuple[str, str]]]
"""From the data folder to (question, answer) pairs."""


def items(name: str, data: Path, limit: int, seed: int = 0) -> list[Item]:
    """Return some items of a task, all with the same demonstrations, drawn by the seed."""
    draw = random.Random(f"{seed} {name}")
    pairs = sorted(set(TASKS[name](data)))
    draw.shuffle(pairs)
    shots = LONG_SHOTS if name in LONG else SHOTS
    shown = "".join(f"{question}{answer}\n\n" for question, answer in pairs[:shots])
    return [Item(shown + question, answer) for question, answer in pairs[shots : shots + limit]]


def _sst2(data: Path) -> list[tuple[str, str]]:
    lines = (data / "sst2_and_small_cls" / "stsa.binary.dev").read_text("utf-8").splitlines()
    return [
        (f"Review: {line[2:]}\nSentiment:", " positive" if line[0] == "1" else " negative")
        for line in lines
    ]


def _ag_news(data: Path) -> list[tuple[str, str]]:
    with gzip.open(data / "ag_news" / "test.csv.gz", "rt", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    return [(f"News: {title}\nTopic:", f" {TOPICS[int(number) - 1]}") for number, title, _ in rows]


def _commonsense(data: Path) -> list[tuple[str, str]]:
    lines = (data / "commonsense_qa" / "dev_rand_split.jsonl").read_text("utf-8").splitlines()
    pairs = []
    for row in map(json.loads, lines):
        choices = [choice["text"] for choice in row["question"]["choices"]]
        pairs.append((_choice(row["question"]["stem"], choices), f" {row['answerKey']}"))
    return pairs


def _mmlu(data: Path) -> list[tuple[str, str]]:
    rows = _json_lines(data / "mmlu" / "mmlu_val.jsonl.gz")
    return [
        (_choice(row["question"], row["choices"]), f" {row['answer']}")
        for row in rows
        if len(row["question"]) + sum(map(len, row["choices"])) < 250
    ]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _choice(question: str, choices: list[str]) -> str:
    listed = "".join(f"{chr(65 + i)}. {choice}\n" for i, choice in enumerate(choices))
    return f"Question: {question}\n{listed}Answer:"


def _rule(name: str, data: Path) -> list[tuple[str, str]]:
    """A task of *Function vectors* (Todd et al. 2024)."""
    text = (data / "function_vectors" / "abstractive" / f"{name}.json").read_text("utf-8")
    return [(f"Q: {row['input']}\nA:", f" {row['output']}") for row in json.loads(text)]


RULES = ("antonym", "country-capital", "present-past", "singular-plural")
TASKS: dict[str, Pairs] = {
    "sst2": _sst2,
    "ag_news": _ag_news,
    "commonsense_qa": _commonsense,
    "mmlu": _mmlu,
    **{name: partial(_rule, name) for name in RULES},
}
