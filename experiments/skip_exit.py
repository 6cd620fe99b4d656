"""Is skipping layers gentler than exiting? At equal numbers of layers, the last norm on every arm.

    python experiments/skip_exit.py --data wikitext2_test.txt.gz --out results/skip_exit.json

The first experiment of *Dynamic layer selection* (Glavas et al. 2024), redone. There the exiting
arm was compared before the last norm with the full model behind it; "cosine_no_norm" repeats that,
to show what it does. Nothing is fine-tuned. Greedy paths are searched on texts of their own; every
arm is judged, teacher-forced, on the others.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from command import command
from narrow_arms import shown
from papers import shown_rows
from selection_figures import skip_or_exit as comparison
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import offramp
from offramp.cli.output import environment, finish
from offramp.paths import prefix, unified_skip
from offramp.search.passes import Passes, opened
from offramp.search.scores import mean_cosine
from offramp.search.subsets import By, Shrinking

CHUNK = 256
DEVIATIONS = (
    "the model: the paper's is OPT-IML 1.3B, first fine-tuned on Alpaca; this one is as it came",
    "WikiText-2, and every token skips; the paper's are answers, whose prompts run all layers",
    "layers chosen at random, and the mean cosine of all layers, are left out",
    "layers chosen by cosine and by loss are ours",
)


def main() -> None:
    """Search, judge every arm, print a line for each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="plain text, perhaps gzipped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 12, 18, 24])
    parser.add_argument("--loss-keep", type=int, default=24, help="fewest layers searched by loss")
    parser.add_argument("--limit", type=int, default=8, help="texts judged, of 128 tokens")
    options = parser.parse_args()
    model = offramp.load(options.model, backbone="hf")  # faster where many rows run at once
    length, searched = 128, 4
    texts = list(cut(model, options.data, length, options.limit + searched))
    short = [(ids[:64], 1) for ids, _ in texts[:searched]]
    depth = model.backbone.shape.num_layers
    paths = {("exit", n): prefix(n, depth) for n in options.keep}
    paths |= {("uls", n): unified_skip(n, depth) for n in options.keep}
    with opened(model.backbone, short) as passes:
        paths |= greedy(passes, "cosine", options.keep)
        paths |= greedy(passes, "loss", [n for n in options.keep if n >= options.loss_keep])
    rows = []
    with opened(model.backbone, texts[searched:]) as passes:
        full = passes.counted(passes.run(range(depth), passes.inputs))
        for (arm, _), path in sorted(paths.items(), key=lambda item: (len(item[1]), item[0])):
            rows.append(
                {"arm": arm, "layers": len(path), "path": path} | judged(model, passes, path, full)
            )
            print(rows[-1], flush=True)
        tokens, whole = passes.tokens, judged(model, passes, range(depth), full)
    record = {
        "command": command(),
        "model": shown(model.name),
        "seed": None,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        **environment(),
        "deviations": DEVIATIONS,
        "num_layers": depth,
        "data": options.data.name,
        "tokens": tokens,
        "tokens_searched": 63 * searched,
        "full": whole,
        "rows": rows,
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def cut(
    model: offramp.Model, data: Path, length: int, count: int
) -> Iterator[tuple[list[int], int]]:
    """Yield texts of so many tokens, evenly taken from the file."""
    raw = data.read_bytes()
    text = (gzip.decompress(raw) if data.suffix == ".gz" else raw).decode()
    ids = model.tokenizer(text[:2_000_000])["input_ids"]
    for start in range(0, len(ids) - length, len(ids) // count)[:count]:
        yield ids[start : start + length], 1


def greedy(passes: Passes, by: By, keep: list[int]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Return the paths of a greedy search with so many layers."""
    shrinking, begin = Shrinking(passes), time.perf_counter()
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    while keep and len(shrinking.path) > min(keep):
        find = shrinking.most_alike if by == "cosine" else shrinking.least_missed
        removed, _ = find(lambda _share: None)
        shrinking.remove(removed)
        print(f"{by}: {removed} out, {time.perf_counter() - begin:.0f} s", flush=True)
        if len(shrinking.path) in keep:
            found[by, len(shrinking.path)] = tuple(shrinking.path)
    return found


@torch.no_grad()
def judged(model: offramp.Model, passes: Passes, path: Any, full: Tensor) -> dict[str, float]:
    """Return what an arm makes of the texts, against the full model's end states ``[T, D]``."""
    end = passes.run(path, passes.inputs)
    own, judgement = passes.counted(end), passes.judge(path, end)
    norm = model.backbone.model.model.norm  # type: ignore[attr-defined]
    return {
        "loss": judgement.loss,
        "agreement": judgement.agreement,
        "kl": divergence(model, own, full),
        "cosine": mean_cosine(norm(own), norm(full)),
        "cosine_no_norm": mean_cosine(own, norm(full)),
    }


def divergence(model: offramp.Model, own: Tensor, full: Tensor) -> float:
    """Return the mean KL divergence of an arm's predictions from the full model's, in nats."""
    depth, total = model.backbone.shape.num_layers, 0.0
    for states, aim in zip(own.split(CHUNK), full.split(CHUNK), strict=True):
        predicted = log_softmax(model.backbone.readout(states, depth).float(), -1)
        expected = log_softmax(model.backbone.readout(aim, depth).float(), -1)
        total += kl_div(predicted, expected, reduction="sum", log_target=True).item()
    return total / len(own)


if __name__ == "__main__":
    main()
