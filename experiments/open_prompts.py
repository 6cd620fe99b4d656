"""Writes prompts that anyone may train on, for exits taught on the default model's own answers.

    python experiments/open_prompts.py --data data --out prompts.jsonl
    python experiments/open_prompts.py --own 3000 --out own.jsonl
    offramp tune --recipe heads --readout block --exits 18,24 --answers self --data prompts.jsonl \
        --data own.jsonl --out exits

DATA is the folder that holds the sets below, whose licences let what was trained on them be
shipped. Only prompts are taken, never answers; of the two with a test split, the training split.
Those are some five thousand; a chat model asks itself as many more as one likes, if it is let begin
with the user's turn (Xu et al. 2024, *Magpie*).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import offramp
from offramp.decode import decode
from offramp.files import write_text
from offramp.request import Request
from offramp.sample import Sampling

LONGEST = 600
"""Characters of a prompt: longer ones are left out, as their answers would teach less per token."""
SHORTEST, MOST_TOKENS, TOP_K = 8, 64, 200
"""Characters and tokens of a prompt of the model's own, and the tokens each is drawn from."""


def _instruction(row: dict[str, Any]) -> str:
    given = row.get("input", "")
    return row["instruction"] if given in ("", "<noinput>") else f"{row['instruction']}\n\n{given}"


def _seed(row: dict[str, Any]) -> str:
    return _instruction({**row, "input": row["instances"][0]["input"]})


def _choices(row: dict[str, Any]) -> str:
    asked = row["question"]
    listed = "\n".join(f"{choice['label']}. {choice['text']}" for choice in asked["choices"])
    return f"{asked['stem']}\n{listed}"


SETS: dict[str, tuple[int, Callable[[dict[str, Any]], str]]] = {
    "alpaca_libre/alpaca_libre_v1-3_ok.jsonl.gz": (2000, _instruction),
    "alpagasus_subsets/dolly_3k.json.gz": (1500, _instruction),
    "llms_from_scratch_instruct/instruction-data.json": (1000, _instruction),
    "self_instruct_seed/seed_tasks.jsonl": (175, _seed),
    "gsm8k/gsm8k_train.jsonl.gz": (400, lambda row: str(row["question"])),
    "commonsense_qa/train_rand_split.jsonl.gz": (250, _choices),
}
"""Most prompts of each file, and how a row asks."""


def main() -> None:
    """Write the prompts, mixed, and print how many are from where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--own", type=int, default=0, help="prompts that the model asks itself")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.data or options.own):
        parser.error("prompts of the sets in --data, or --own prompts of the model, or both")
    drawn = random.Random(options.seed)
    prompts: list[str] = []
    for name, (most, asks) in SETS.items() if options.data else ():
        asked = dict.fromkeys(asks(row).strip() for row in _rows(options.data / name))
        short = [prompt for prompt in asked if len(prompt) <= LONGEST]
        prompts += drawn.sample(short, min(most, len(short)))
        print(f"{name}: {min(most, len(short))} of {len(short)}")
    if options.own:
        own = list(_own(options.own, options.seed))
        prompts += own
        print(f"asked by the model itself: {len(own)} of {options.own}")
    drawn.shuffle(prompts)
    lines = [json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in dict.fromkeys(prompts)]
    write_text(options.out, "".join(lines))


def _own(count: int, seed: int) -> Iterator[str]:
    """Yield what the default model asks as a user, without what it did not end or hardly began."""
    model = offramp.load(weights="int8")
    there = "what is asked"
    turn = [{"role": "user", "content": there}]
    opening = model.tokenizer.apply_chat_template(turn, tokenize=False).partition(there)[0]
    ids = model.tokenizer(opening, add_special_tokens=False).input_ids
    draws = (Sampling(1.0, top_k=TOP_K, seed=seed + i).chooser() for i in range(count))
    requests = (Request(list(ids), MOST_TOKENS, eos=model.eos, choose=draw) for draw in draws)
    said: dict[int, list[int]] = defaultdict(list)
    with tqdm(total=count, desc="ask", unit="prompt") as bar:
        for token in decode(model.backbone, requests, batch_size=32):
            said[token.index].append(token.id)
            if token.finish is not None:
                bar.update()
                asked = model.tokenizer.decode(said.pop(token.index), skip_special_tokens=True)
                if token.id in model.eos and SHORTEST <= len(asked.strip()) <= LONGEST:
                    yield asked.strip()


def _rows(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return list(json.loads(text))


if __name__ == "__main__":
    main()
