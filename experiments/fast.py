"""How fast is the fast backbone on the default model? Interleaved steps, medians, all slow-downs.

    python experiments/fast.py --out results/fast.json

Every round times one step of every contestant in turn (A B C A B C ...); ratios are medians of
ratios within a round, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import offramp
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.cli.output import environment, finish
from offramp.fast.open import open_fast
from offramp.fast.pack import BYTES
from offramp.hf.backbone import HFBackbone
from offramp.policy import FULL, Policy, fixed
from offramp.step import step
from offramp.text import encode

_PASSAGE = (
    "The history of the steam engine begins in antiquity, but it was the eighteenth century that "
    "made it useful: mines flooded, coal was cheap where it was dug, and nobody minded waste. "
)
_CONTEXT = 96


class Contestant:
    """One kind of step of one backbone, repeatable: what it added is trimmed after each time."""

    def __init__(
        self, backbone: Backbone, ids: list[int], *, texts: int = 1, rows: int = 1, depth: int = 30
    ) -> None:
        self.backbone, self.ids, self.rows, self.depth = backbone, ids, rows, depth
        self.texts = [Text(ids[:_CONTEXT], backbone.open()) for _ in range(texts)]
        self.policy: Policy = FULL
        self.stay: list[bool] | None = None
        step(backbone, self.texts)

    def leaving(self, depth: int) -> Contestant:
        """Let the first half of the texts leave at this depth."""
        self.policy = fixed(depth)
        half = len(self.texts) // 2
        self.stay = [False] * half + [True] * (len(self.texts) - half)
        return self

    def seconds(self) -> float:
        """Time one step."""
        for text in self.texts:
            text.ids += self.ids[_CONTEXT : _CONTEXT + self.rows]
        start = time.perf_counter()
        layers = range(self.depth)
        step(self.backbone, self.texts, self.policy, layers=layers, stay=self.stay)
        taken = time.perf_counter() - start
        for text in self.texts:
            text.trim(_CONTEXT)
            self.backbone.trim(text.slot, _CONTEXT)
        return taken


def main() -> None:
    """Measure, print a line per contestant, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--formats", nargs="+", choices=list(BYTES), default=list(BYTES))
    options = parser.parse_args()
    model = offramp.load(backbone="hf")
    generic = model.backbone
    assert isinstance(generic, HFBackbone)
    ids = encode(model.tokenizer, _PASSAGE * 6, raw=True)
    backbones: dict[str, Backbone] = {"hf": generic}
    opened = {}
    for form in options.formats:
        start = time.perf_counter()
        backbones[form] = open_fast(generic, form)
        opened[form] = time.perf_counter() - start
    record = {
        "opened_seconds": opened,
        "agreement": _agreement(backbones, ids[:400]),
        "milliseconds": _measured(_contestants(backbones, ids), options.rounds),
    }
    finish(record | environment(), as_json=True, out=options.out)


def _contestants(backbones: dict[str, Backbone], ids: list[int]) -> dict[str, Contestant]:
    made = {}
    for name, backbone in backbones.items():
        for depth in (30, 18, 12):
            made[f"{name} depth {depth}"] = Contestant(backbone, ids, depth=depth)
        if name != "hf":
            made[f"{name} 5 rows"] = Contestant(backbone, ids, rows=5)
            made[f"{name} 16 texts"] = Contestant(backbone, ids, texts=16)
            made[f"{name} 16 texts, half leave at 12"] = Contestant(
                backbone, ids, texts=16
            ).leaving(12)
    return made


def _measured(contestants: dict[str, Contestant], rounds: int) -> dict[str, float]:
    """Time all in turns; print medians and the ratio to their backbone's full depth."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, contestant in contestants.items():
            taken = contestant.seconds()
            if round_:  # the first warms up
                times[name].append(taken)
    against: dict[str, Callable[[str], str]] = {
        "hf": lambda name: f"hf depth {name.split()[2]}" if "depth" in name else "hf depth 30",
        "own depth 30": lambda name: f"{name.split()[0]} depth 30",
    }
    for name, own in times.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(own, times[other(name)], strict=True)):.3f}"
            f" of {label}"
            for label, other in against.items()
        ]
        print(
            f"{name:36} {statistics.median(own) * 1e3:8.2f} ms (least {min(own) * 1e3:.2f})  "
            + ", ".join(ratios)
        )
    return {name: statistics.median(own) * 1e3 for name, own in times.items()}


@torch.no_grad()
def _agreement(backbones: dict[str, Backbone], ids: list[int]) -> dict[str, float]:
    """Return the share of positions where each format's greedy choice is fp32's, teacher-forced."""
    chosen = {
        name: step(backbone, [Text(list(ids), backbone.open())], tails=[len(ids)]).logits.argmax(-1)
        for name, backbone in backbones.items()
    }
    return {name: (tokens == chosen["hf"]).float().mean().item() for name, tokens in chosen.items()}


if __name__ == "__main__":
    main()
