"""Readers of few-shot tasks: what a question looks like, and what answers it."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offramp.evaluate.items import Item, choice, csv_rows, demonstrations, json_lines, text_of

TOPICS = ("World", "Sports", "Business", "Technology")
_MMLU_SHOTS = 5


def sst2(path: Path) -> Iterator[Item]:
    """Yield the sentences of Kim's SST-2, ``label text`` per line."""
    for line in text_of(path).splitlines():
        right = {"1": " positive", "0": " negative"}[line[0]]
        yield Item(f"Review: {line[2:]}\nSentiment:", (right,))


def ag_news(path: Path) -> Iterator[Item]:
    """Yield the titles of AG News, with their topics."""
    for number, title, _ in csv_rows(path):
        yield Item(f"News: {title}\nTopic:", (f" {TOPICS[int(number) - 1]}",))


def commonsense(path: Path) -> Iterator[Item]:
    """Yield the questions of CommonsenseQA, answered by a letter."""
    for row in json_lines(path):
        choices = [one["text"] for one in row["question"]["choices"]]
        yield Item(choice(row["question"]["stem"], choices), (f" {row['answerKey']}",))


def mmlu(paths: Sequence[Path], draw: random.Random) -> list[Item]:
    """Return the test questions of MMLU behind their subject's five of the development set.

    As in Hendrycks et al. (2021), section 4, but for the sentence that names the subject.
    """
    tests, shots = (json_lines(path) for path in paths)
    by_subject: dict[str, list[Item]] = defaultdict(list)
    for row in shots:
        by_subject[row["subject"]].append(lettered(row))
    before = {name: demonstrations(items[:_MMLU_SHOTS]) for name, items in by_subject.items()}
    draw.shuffle(tests)
    asked = ((before[row["subject"]], lettered(row)) for row in tests)
    return [Item(f"{told}{item.prompt}", item.references) for told, item in asked]


def lettered(row: dict[str, Any]) -> Item:
    """Return a question of MMLU, answered by a letter."""
    return Item(choice(row["question"], row["choices"]), (f" {row['answer']}",))


def squad(path: Path) -> Iterator[Item]:
    """Yield the questions of SQuAD v1.1 behind their paragraphs, with all answers given."""
    for article in json.loads(text_of(path))["data"]:
        for paragraph in article["paragraphs"]:
            for row in paragraph["qas"]:
                rights = dict.fromkeys(f" {answer['text']}" for answer in row["answers"])
                asked = f"{paragraph['context']}\nQuestion: {row['question']}\nAnswer:"
                yield Item(asked, tuple(rights))


def trivia(path: Path) -> Iterator[Item]:
    """Yield the questions of TriviaQA, without any text that answers them."""
    for row in json_lines(path):
        question = row["question"].strip().strip('"').replace('""', '"')
        yield Item(f"Q: {question}\nA:", tuple(f" {right}" for right in row["golden_answers"]))


def rule(path: Path) -> Iterator[Item]:
    """Yield the pairs of a task of *Function vectors* (Todd et al. 2024)."""
    for row in json.loads(text_of(path)):
        yield Item(f"Q: {row['input']}\nA:", (f" {row['output']}",))
