r"""Gives answers other names, so that what is taught is copying, not remembering.

    python experiments/narrow_names.py runs/e2e-lite --prompts e2e/prompts.jsonl \
        --rows e2e/train.jsonl --out named.jsonl

Reads the answers that `offramp tune --answers` kept in a folder, and rows that people wrote, one
copy of each. Wherever a name, or the place it is near, stands in the answer as it stands in the
prompt, both become an invented one: half of them words put together, half syllables that no
vocabulary has whole. Answers that do not repeat the name are left out. The rows are shuffled.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from narrow_data import invented_names, read_rows

from offramp.evaluate.meanings import as_prompt, parse_prompt
from offramp.files import write_text
from offramp.hf.tuned import load_tuned
from offramp.tune.answers import ANSWERS

_STARTS = ["b", "br", "c", "ch", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "qu", "r", "s"]
_STARTS += ["sh", "st", "t", "tr", "v", "w", "z"]
_MIDDLES = ["a", "e", "i", "o", "u", "ai", "ea", "oo", "ou"]
_ENDS = ["", "", "n", "r", "l", "s", "x", "th", "m", "ck"]


def main() -> None:
    """Write the rows, and print how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a tuned model with answers beside it")
    parser.add_argument("--prompts", type=Path, required=True, help="what was asked")
    parser.add_argument("--copies", type=int, default=2, help="of each of the model's answers")
    parser.add_argument("--rows", type=Path, help="rows of prompt and completion, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pairs = options.copies * own_answers(Path(options.folder), options.prompts)
    if options.rows:
        pairs += [(row["prompt"], row["completion"]) for row in read_rows(options.rows)]
    drawn = random.Random(options.seed)
    drawn.shuffle(pairs)
    names = invented_names()
    renamed = (_renamed(prompt, answer, names, drawn) for prompt, answer in pairs)
    rows = [row for row in renamed if row is not None]
    write_text(options.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{options.out.name}: {len(rows)} rows of {len(pairs)} answers")


def own_answers(folder: Path, prompts: Path) -> list[tuple[str, str]]:
    """Return what was asked and what the model of the folder answered."""
    tokenizer = load_tuned(str(folder)).tokenizer
    asked = [row["prompt"] for row in read_rows(prompts)]
    lines = (folder / ANSWERS).read_text(encoding="utf-8").splitlines()[1:]
    answers = map(json.loads, lines)
    return [
        (asked[answer["prompt"]], tokenizer.decode(answer["ids"], skip_special_tokens=True))
        for answer in answers
    ]


def _renamed(
    prompt: str, answer: str, names: list[str], drawn: random.Random
) -> dict[str, str] | None:
    """Return the row with other names, or None where the answer does not repeat the name."""
    meaning = list(parse_prompt(prompt))
    found = False
    for index, (key, value) in enumerate(meaning):
        if key not in ("name", "near") or value not in answer:
            continue
        new = drawn.choice(names) if drawn.random() < 0.5 else _syllables(drawn)
        meaning[index] = (key, new)
        answer = answer.replace(value, new)
        found |= key == "name"
    return {"prompt": as_prompt(tuple(meaning)), "completion": answer} if found else None


def _syllables(drawn: random.Random) -> str:
    """Return a name of one or two words that mean nothing."""
    words = []
    for _ in range(drawn.choice([1, 1, 2])):
        parts = [
            drawn.choice(_STARTS) + drawn.choice(_MIDDLES) + drawn.choice(_ENDS)
            for _ in range(drawn.choice([1, 2, 2, 3]))
        ]
        words.append("".join(parts).capitalize())
    return ("The " if drawn.random() < 0.3 else "") + " ".join(words)


if __name__ == "__main__":
    main()
