"""Does leaving out attention or MLP alone beat leaving out whole layers? Searched, and timed.

    python experiments/sublayers.py --data wikitext2_test.txt.gz --out results/sublayers.json

Two greedy searches by loss take parts out until the weights of --keep layers are left: whole
layers, and halves (`offramp search --by loss --halves`). A third of the texts had no say and judges
every step. Then the paths with --timed layers' weights or more decode, beside all layers, in turns,
behind a short text and behind a long one, where keys and values are much of what attention costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command import command
from skip_exit import cut
from tqdm import tqdm

import offramp
from offramp.backbone import Backbone
from offramp.batch import Span, Text
from offramp.cli.output import environment, finish
from offramp.cost import worth
from offramp.paths import named
from offramp.search.subsets import Step, search
from offramp.step import step

CONTEXTS = (256, 4096)
_TOKENS = 8
"""Decoded at once when timed."""


def main() -> None:
    """Search both ways, time what was found, print a line for each, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="plain text, perhaps gzipped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--length", type=int, default=96, help="tokens of a text")
    parser.add_argument("--keep", type=int, default=25, help="layers whose weights are left")
    parser.add_argument("--timed", type=int, default=27, help="layers whose weights are timed")
    parser.add_argument("--weights", choices=("int8", "int4"), default="int8", help="when timed")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = offramp.load()
    texts = list(cut(model, options.data, options.length, options.texts))
    shape = model.backbone.shape
    steps: dict[str, list[Step]] = {}
    for name, halves in (("layers", False), ("halves", True)):
        with tqdm(total=100, desc=name, leave=False) as bar:
            told = lambda share, bar=bar: bar.update(round(100 * share) - bar.n)  # noqa: E731
            steps[name] = search(model.backbone, texts, options.keep, "loss", told, halves=halves)
    paths = {"full": tuple(range(shape.num_layers))}
    for name, found in steps.items():
        timed = [one.layers for one in found if worth(one.layers, shape) >= options.timed - 0.01]
        paths[name] = timed[-1]
    other = offramp.load(weights=options.weights)
    clock = {str(n): race(other.backbone, paths, n, options.rounds) for n in CONTEXTS}
    record = {
        "command": command(),
        "model": model.name,
        **environment(),
        "data": options.data.name,
        "tokens": sum(len(ids) - 1 for ids, _ in texts[2::3]),
        "rows": {
            name: [row(one, model.backbone) for one in found] for name, found in steps.items()
        },
        "timed_weights": options.weights,
        "rounds": options.rounds,
        "paths": {name: [*map(named, path)] for name, path in paths.items()},
        "clock": clock,
    }
    print(clock)
    finish(record, as_json=False, out=options.out)


def row(found: Step, backbone: Backbone) -> dict[str, Any]:
    """Return what a path weighs, in layers, and what it loses on texts that had no say."""
    weighs = worth(found.layers, backbone.shape)
    removed = None if found.removed is None else named(found.removed)
    made = {"layers": weighs, "removed": removed, **dataclasses.asdict(found.held_out)}
    print(made, flush=True)
    return made


def race(
    backbone: Backbone, paths: Mapping[str, Sequence[int]], context: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Return each path's time to that of all layers, decoding behind so many tokens, in turns."""
    ids = [7919 * i % backbone.shape.vocab_size for i in range(context)]
    texts = {}
    for name in paths:
        texts[name] = Text(list(ids), backbone.open())
        span = (Span(texts[name], 0, context),)
        backbone.fill(paths["full"], backbone.embed(span), span)  # any keys will do
    took: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            texts[name].done = context
            texts[name].ids = list(ids)
            begin = time.perf_counter()
            for _ in range(_TOKENS):
                texts[name].ids.append(7)
                step(backbone, [texts[name]], layers=path)
            if turn:  # the first warms up
                took[name].append(time.perf_counter() - begin)
            backbone.trim(texts[name].slot, context)
    ratios = {
        name: sorted(one / whole for one, whole in zip(times, took["full"], strict=True))
        for name, times in took.items()
    }
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(found, n=4), strict=True))
        for name, found in ratios.items()
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
