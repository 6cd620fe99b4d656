"""Lists the tokens a narrow task's answers are made of, for --head tokens:FILE.

    python experiments/narrow_tokens.py MODEL --rows e2e/train.jsonl --out e2e/tokens.json

Counts the completions as the trainer tokenises them, apart from their prompts, and adds the tokens
that end a text. For E2E, --catalogue FILE adds the values of attributes in that file's prompts, as
an answer would write them: whoever serves such a task knows the names it will be asked about, and
a list made of training answers alone cannot write those that are new. References are never looked
at there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from narrow_data import read_rows

from offramp.evaluate.meanings import TEXT, parse_prompt
from offramp.files import write_text
from offramp.hf.load import load_checkpoint


def main() -> None:
    """Write the list, and print its length and how much of the dev or test answers it covers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub id or folder; 'default' for SmolLM2-135M")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="training rows")
    parser.add_argument("--catalogue", type=Path, help="prompts whose values must be possible")
    parser.add_argument("--against", type=Path, help="rows to say the coverage of")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    name = None if options.model == "default" else options.model
    model, tokenizer, _ = load_checkpoint(name)
    texts = [row["completion"] for path in options.rows for row in read_rows(path)]
    if options.catalogue:
        texts += values(row["prompt"] for row in read_rows(options.catalogue))
    ends = model.generation_config.eos_token_id
    tokens = counted(tokenizer, texts) | set(ends if isinstance(ends, list) else [ends])
    write_text(options.out, json.dumps(sorted(tokens)) + "\n")
    print(f"{options.out.name}: {len(tokens)} of {model.config.vocab_size} tokens")
    if options.against:
        answers = [row["completion"] for row in read_rows(options.against)]
        whole = sum(counted(tokenizer, [answer]) <= tokens for answer in answers)
        print(f"answers of {options.against.name} that it can write: {whole / len(answers):.1%}")


def values(prompts: Iterable[str]) -> list[str]:
    """Return each value in the prompts of E2E, behind a space as an answer has it."""
    asked = {p for p in prompts if p.endswith(TEXT)}
    return sorted({f" {value}" for p in asked for _, value in parse_prompt(p)})


def counted(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Return the tokens that occur in the texts, each tokenised alone."""
    return {token for text in texts for token in tokenizer(text)["input_ids"]}


if __name__ == "__main__":
    main()
