"""What does depth cost and save on the default model? Interleaved runs, medians, slow-downs shown.

    python experiments/costs.py --out results/costs.json

Runs Hugging Face ``generate`` and this library's plans in turns (A B C A B C ...) on the same
prompts and writes seconds relative to ``generate`` in the same round, with the counted work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command import command

import offramp
from offramp.cli.output import environment, finish
from offramp.inspection import PROMPTS
from offramp.runs import Run
from offramp.text import encode

PLANS: dict[str, Run] = {
    "plain, full depth": offramp.Full(),
    "lossless: draft at 24, 2 tokens": offramp.Speculate(draft=tuple(range(24)), tokens=2),
    "lossless: draft at 12, 4 tokens": offramp.Speculate(draft=tuple(range(12)), tokens=4),
    "lossy: leave at 24, tokens wait": offramp.Exit(signal="fixed", thresholds={24: 1.0}),
    "lossy: leave at 24, states copied": offramp.Exit(
        signal="fixed", thresholds={24: 1.0}, kv="copy"
    ),
    "lossy: first 12 of 30 layers": offramp.Path(layers=tuple(range(12))),
}


def main() -> None:
    """Measure, print a line per contestant, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()
    model = offramp.load(backbone="hf")  # the reference; experiments/fast.py times the other
    prompts = list(PROMPTS[: options.prompts])
    contestants: dict[str, Callable[[], Any]] = {
        "Hugging Face generate": partial(_generate, model, prompts, options.max_new_tokens)
    }
    for name, run in PLANS.items():
        plan = offramp.Plan(run=run)
        contestants[name] = partial(
            model.generate,
            prompts,
            plan=plan,
            max_new_tokens=options.max_new_tokens,
            batch_size=1,
        )
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    for turn in range(options.rounds + 1):  # the first round warms up
        for name, contestant in contestants.items():
            start = time.perf_counter()
            answers[name] = contestant()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    reference = answers.pop("Hugging Face generate")
    rows = [{"name": "Hugging Face generate", "time_ratio": 1.0, "same_tokens": 1.0}]
    rows += [_row(name, result, seconds, reference) for name, result in answers.items()]
    for row in rows:
        print(row)
    record = {
        "command": command(),
        "model": model.name,
        "seed": 0,
        **environment(),
        "rounds": options.rounds,
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "rows": rows,
    }
    finish(record, as_json=False, out=options.out)


def _generate(model: offramp.Model, prompts: list[str], count: int) -> list[list[int]]:
    """Return what Hugging Face generates, prompt by prompt as it is asked for here."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([encode(model.tokenizer, prompt)])
        out = model.backbone.model.generate(ids, max_new_tokens=count, do_sample=False)  # type: ignore[attr-defined]
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


def _row(
    name: str, result: Any, seconds: dict[str, list[float]], reference: list[list[int]]
) -> dict[str, Any]:
    base = seconds["Hugging Face generate"]
    ratios = [own / other for own, other in zip(seconds[name], base, strict=True)]
    figures = result.figures.as_dict()
    pairs = [
        (a, b)
        for output, other in zip(result.outputs, reference, strict=True)
        for a, b in zip(output.token_ids, other, strict=False)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "name": name,
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
        **{key: figures[key] for key in ("mean_depth", "flops_ratio", "bytes_ratio")},
        "drafted": figures["drafted"],
        "accepted": figures["accepted"],
    }


if __name__ == "__main__":
    main()
