"""Gives a model's own answers other names, so that what is taught is copying, not remembering.

    python experiments/narrow_names.py runs/e2e-lite --prompts e2e/prompts.jsonl --out named.jsonl

Reads the answers that `offramp tune --answers` kept in a folder. Wherever a name, or the place it
is near, stands in the answer as it stands in the prompt, both become an invented one: half of them
words put together, half syllables that no vocabulary has whole. Answers that do not repeat the
name are left out.
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
    parser.add_argument("--copies", type=int, default=2, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tuned(options.folder).tokenizer
    prompts = [row["prompt"] for row in read_rows(options.prompts)]
    lines = (Path(options.folder) / ANSWERS).read_text(encoding="utf-8").splitlines()[1:]
    drawn = random.Random(options.seed)
    names = invented_names()
    rows = []
    for line in lines:
        answer = json.loads(line)
        said = tokenizer.decode(answer["ids"], skip_special_tokens=True)
        for _ in range(options.copies):
            row = _renamed(prompts[answer["prompt"]], said, names, drawn)
            if row is not None:
                rows.append(row)
    write_text(options.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{options.out.name}: {len(rows)} rows of {len(lines)} answers")


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
