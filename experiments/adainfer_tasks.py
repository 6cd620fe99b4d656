"""Few-shot tasks with answers of one word, as AdaInfer was tried on; the readers are evaluate's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from offramp.evaluate import shots
from offramp.evaluate.items import Item, Read, few_shot, json_lines

SHOTS, LONG_SHOTS = 4, 2
LONG = ("commonsense_qa", "mmlu")
"""Tasks of long questions, which get fewer demonstrations."""
RULES = ("antonym", "country-capital", "present-past", "singular-plural")


def items(name: str, data: Path, limit: int, seed: int = 0) -> list[Item]:
    """Return some items of a task, all with the same demonstrations, drawn by the seed.

    Of the answer, the only reference, the first token counts.
    """
    read, file = TASKS[name]
    count = LONG_SHOTS if name in LONG else SHOTS
    return few_shot(read(data / file), count, random.Random(f"{seed} {name}"))[:limit]


def _short_mmlu(path: Path) -> Iterator[Item]:
    """Yield the short questions of MMLU's validation set, of all subjects alike."""
    for row in json_lines(path):
        if len(row["question"]) + sum(map(len, row["choices"])) < 250:
            yield shots.lettered(row)


TASKS: dict[str, tuple[Read, str]] = {
    "sst2": (shots.sst2, "sst2_and_small_cls/stsa.binary.dev"),
    "ag_news": (shots.ag_news, "ag_news/test.csv.gz"),
    "commonsense_qa": (shots.commonsense, "commonsense_qa/dev_rand_split.jsonl"),
    "mmlu": (_short_mmlu, "mmlu/mmlu_val.jsonl.gz"),
    **{name: (shots.rule, f"function_vectors/abstractive/{name}.json") for name in RULES},
}
