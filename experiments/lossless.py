"""Is self-speculation lossless? Compares it token by token with Hugging Face ``generate``.

    python experiments/lossless.py --data all_730.jsonl --rotate --out results/lossless.json

Takes every draft depth and length in mixed batches, and alone (with --rotate each prompt takes one
setting there, in turn: all of them took hours on two cores). Resumable: each finished setting is
written at once, and a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import command
from tqdm import tqdm

from offramp.hf.load import load_checkpoint
from offramp.hf.open import open_model
from offramp.request import Request
from offramp.speculate import Draft, speculate
from offramp.text import encode, read_prompts


def main() -> None:
    """Run all settings and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".jsonl or .txt of prompts")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--limit", type=int, default=100, help="prompts, evenly taken")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 18, 24])
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument(
        "--rotate", action="store_true", help="alone, each prompt takes one setting, in turn"
    )
    options = parser.parse_args()
    model, tokenizer, name = load_checkpoint(options.model)
    prompts = read_prompts(options.data)
    prompts = prompts[:: max(len(prompts) // options.limit, 1)][: options.limit]
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    record = _load(options.out) or {
        "command": command(),
        "model": name,
        "torch": torch.__version__,
        "prompts": len(ids),
        "max_new_tokens": options.max_new_tokens,
        "settings": {},
    }
    texts = options.out.with_suffix(".reference")  # kept apart: results hold no text
    reference = _load(texts) or _reference(model, ids, options.max_new_tokens)
    _save(texts, reference)
    runs = Runs(options.out, record, open_model(model), ids, reference)
    drafts = [Draft(tuple(range(d)), k) for d in options.depths for k in options.draft_tokens]
    for batch_size in options.batch_sizes:
        if batch_size == 1 and options.rotate:
            runs.once("alone, settings in turn", drafts, 1)
            continue
        for draft in drafts:
            key = f"batch {batch_size}, depth {len(draft.layers)}, k {draft.tokens}"
            runs.once(key, [draft], batch_size)
    wrong = sum(setting["mismatched_tokens"] for setting in record["settings"].values())
    print(f"mismatched tokens in all: {wrong}")


def _reference(model: Any, ids: list[list[int]], count: int) -> list[list[int]]:
    """Return what Hugging Face generates for each prompt alone, greedily."""
    texts = []
    for prompt in tqdm(ids, desc="generate"):
        batch = torch.tensor([prompt])
        out = model.generate(batch, max_new_tokens=count, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@dataclass(frozen=True)
class Runs:
    """What all settings share."""

    out: Path
    record: dict[str, Any]
    backbone: Any
    ids: list[list[int]]
    reference: list[list[int]]

    def once(self, key: str, drafts: list[Draft], batch_size: int) -> None:
        """Run one setting unless the record has it, and write the record."""
        settings = self.record["settings"]
        if key not in settings:
            settings[key] = self.compare(drafts, batch_size, key)
            _save(self.out, self.record)
        print(f"{key}: {settings[key]}", flush=True)

    def compare(self, drafts: list[Draft], batch_size: int, key: str) -> dict[str, Any]:
        """Speculate on every prompt; prompt i uses draft i, in turn."""
        eos = frozenset([self.backbone.model.generation_config.eos_token_id])
        texts: list[list[int]] = [[] for _ in self.ids]
        before, start = self.backbone.meter.copy(), time.perf_counter()
        with tqdm(total=sum(map(len, self.reference)), desc=key) as bar:
            for turn, draft in enumerate(drafts):
                mine = range(turn, len(self.ids), len(drafts))
                requests = [
                    Request(self.ids[i], self.record["max_new_tokens"], eos=eos) for i in mine
                ]
                for token in speculate(self.backbone, requests, draft, batch_size=batch_size):
                    texts[mine[token.index]].append(token.id)
                    bar.update()
        work = self.backbone.meter - before
        pairs = list(zip(texts, self.reference, strict=True))
        return {
            "tokens": sum(map(len, texts)),
            "mismatched_tokens": sum(map(_differences, texts, self.reference)),
            "mismatched_texts": sum(a != b for a, b in pairs),
            "distinct_tokens": len({token for text in self.reference for token in text}),
            "acceptance": round(work.accepted / work.drafted, 4),
            "seconds": round(time.perf_counter() - start, 1),
        }


def _differences(ours: list[int], theirs: list[int]) -> int:
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return max(len(ours), len(theirs)) - same


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _save(path: Path, record: Any) -> None:
    """Write beside and rename, so that an interruption leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1))
    beside.replace(path)


if __name__ == "__main__":
    main()
