"""Does skipped depth show on the clock? Single steps of the fast backbone, in turns.

    python experiments/clock.py --out results/clock.json

Every round times one step of every contestant in turn (A B C ... A B C ...), after a look that
brings its weights where a step finds them, and every part that steps are predicted from; ratios are
medians of ratios within a round, so that a busy machine changes them little. What one exit check
costs is a few per cent of a step, so checks are timed apart: on one text, step by step, in an order
drawn anew for every round.
``offramp bench`` times whole answers, and other engines.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command
from tqdm import tqdm

import offramp
from offramp import cost
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.bench.figures import spread
from offramp.bench.own import ceiling_meter, make_case
from offramp.checks import FULL_HEAD, Check, LowRank, Refined, Shortlist
from offramp.cli.output import environment, finish
from offramp.fast.open import open_fast
from offramp.fast.pack import BYTES, Format
from offramp.gate import Gate, fit_gate
from offramp.hf.backbone import HFBackbone
from offramp.meter import Meter
from offramp.policy import Policy, Threshold, fixed
from offramp.probe import Readout
from offramp.step import step
from offramp.timing import Constants, Stand
from offramp.trace import record

EXIT = 12
PAIRS = 600
"""Rounds for what an exit check costs."""
RESAMPLES = 2000
SHORT = 8192
"""Entries of the head of a sub-model."""


@dataclass
class Contestant:
    """One kind of step, repeatable: what it added is trimmed after each look."""

    name: str
    backbone: Backbone
    texts: list[Text]
    rows: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    check: Check = FULL_HEAD
    seconds: list[float] = field(default_factory=list)
    work: Meter = field(default_factory=Meter)
    """Of one step."""

    def predicted(self, known: Constants) -> float:
        """Return the seconds that the cost model says a step takes, from what it does."""
        shape = self.backbone.shape
        return cost.seconds(self.work, known, shape, self.check.weights(shape))

    def look(self) -> float:
        """Time one step."""
        lengths = [len(text.ids) for text in self.texts]
        for text in self.texts:
            text.ids += text.ids[: self.rows]
        before = self.backbone.meter.copy()
        start = time.perf_counter()
        out = step(self.backbone, self.texts, tails=[self.rows] * len(self.texts), **self.options)
        for rows in out.rows:
            rows.numpy().argmax(-1)  # as greedy decoding chooses
        taken = time.perf_counter() - start
        self.work = self.backbone.meter - before
        for text, length in zip(self.texts, lengths, strict=True):
            text.trim(length)
            self.backbone.trim(text.slot, length)
        return taken


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--weights", choices=list(BYTES), default="int4")
    options = parser.parse_args()
    model = offramp.load(backbone="hf")
    generic = model.backbone
    assert isinstance(generic, HFBackbone)
    [prompt] = make_case(model.tokenizer, 1, 4600, 2).prompts
    backbone = open_fast(generic, options.weights)
    contestants = _contestants(backbone, prompt)
    with closing(Stand(backbone)) as stand:
        ceilings = _race(list(contestants.values()), stand, options.rounds)
        known = stand.constants()
    figures = _figures(contestants, backbone, ceilings, known)
    checks = _checks(backbone, prompt, known)
    for name, figure in {**figures, **checks}.items():
        print(f"{name:62} {figure}")
    finish(
        {
            "command": command(),
            "model": model.name,
            "weights": options.weights,
            "rounds": options.rounds,
            "seed": 0,
            **environment(),
            "figures": figures,
            "pairs": PAIRS,
            "checks": checks,
            "milliseconds": {
                name: {
                    "median": 1e3 * statistics.median(one.seconds),
                    "quartiles": [1e3 * edge for edge in spread(one.seconds)[1]],
                    "predicted": 1e3 * one.predicted(known),
                }
                for name, one in contestants.items()
            },
            "agreement": _agreement(generic, prompt[:1024]),
            "second_start_seconds": _second_start(options.weights),
        },
        as_json=True,
        out=options.out,
    )


def _contestants(backbone: Backbone, ids: list[int]) -> dict[str, Contestant]:
    made: dict[str, Contestant] = {}

    def add(name: str, context: int = 256, batch: int = 1, **facts: Any) -> None:
        texts = [Text(ids[i : i + context], backbone.open()) for i in range(batch)]
        step(backbone, texts)
        known = {"rows", "check"}
        given = {key: facts.pop(key) for key in known & facts.keys()}
        made[name] = Contestant(name, backbone, texts, options=facts, **given)

    short, refined = Shortlist(size=SHORT), Refined()
    first = range(EXIT)
    add("full")
    add("first 12", layers=first)
    add("first 12, short head", layers=first, head=short.look(backbone), check=short)
    add("full, refined head", head=refined.look(backbone), check=refined)
    add("first 12, refined head", layers=first, head=refined.look(backbone), check=refined)
    add("five rows", rows=5)
    add("context 4096", context=4096)
    add("context 4096, first 12", context=4096, layers=first)
    add("leave at 12, copied", policy=fixed(EXIT), kv="copy")
    add("sixteen", context=96, batch=16)
    half = [i % 2 == 0 for i in range(16)]
    leaving: dict[str, Any] = {"context": 96, "batch": 16, "policy": fixed(EXIT), "stay": half}
    add("sixteen, half leave at 12", **leaving)
    add("sixteen, short head", **leaving, exit_head=short.look(backbone), check=short)
    return made


def _never(backbone: Backbone, ids: list[int]) -> list[tuple[str, Check, Policy]]:
    """Return checks at one exit whose threshold nothing reaches: only the asking costs."""
    gates = fit_gate(record(backbone, [(ids[:256], 1)], [EXIT], keep_hidden=True))
    asked = Threshold("max_prob", ((EXIT, math.inf),))
    heads: list[Check] = [
        FULL_HEAD,
        *(Shortlist(size=size) for size in (1024, 2048, 4096)),
        LowRank(rank=32),
    ]
    return [
        *((str(check), check, asked) for check in heads),
        ("gate", FULL_HEAD, Gate(gates, ((EXIT, math.inf),))),
    ]


def _checks(
    backbone: Backbone, ids: list[int], known: Constants
) -> dict[str, dict[str, float | None]]:
    """Return what one exit that nobody takes adds to a step, in layers, each with its interval."""
    texts = [Text(ids[:256], backbone.open())]
    step(backbone, texts)
    first = Contestant("first", backbone, texts, options={"layers": range(EXIT)})
    without = Contestant("without", backbone, texts)
    asked = [
        Contestant(
            name, backbone, texts, 1, {"policy": policy, "look": check.look(backbone)}, check
        )
        for name, check, policy in _never(backbone, ids)
    ]
    order, draw = [first, without, *asked], random.Random(0)
    for _ in tqdm(range(PAIRS), unit="round", leave=False):
        for one in draw.sample(order, len(order)):
            one.seconds.append(one.look())
    depth, full = backbone.shape.num_layers - EXIT, np.array(without.seconds)
    layer = (full - np.array(first.seconds)) / depth
    expected = without.predicted(known), without.predicted(known) - first.predicted(known)
    return {
        f"one check {one.name}, in layers": _paired(
            np.array(one.seconds) - full,
            layer,
            (one.predicted(known) - expected[0]) / (expected[1] / depth),
        )
        for one in asked
    }


def _paired(added: np.ndarray, layer: np.ndarray, predicted: float) -> dict[str, float | None]:
    """Return the ratio of the medians, and the 95% interval of it over resampled rounds."""
    chosen = np.random.default_rng(0).integers(len(added), size=(RESAMPLES, len(added)))
    drawn = np.median(added[chosen], 1) / np.median(layer[chosen], 1)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    middle = float(np.median(added) / np.median(layer))
    return {"median": middle, "low": low, "high": high, "predicted": predicted}


def _race(contestants: Sequence[Contestant], stand: Stand, rounds: int) -> list[float]:
    """Time all in turns; return the bytes per second that memory gave in each round."""
    meter, ceilings = ceiling_meter(), []
    for turn in tqdm(range(rounds + 2), unit="round", leave=False):
        for one in contestants:
            time.sleep(0.02)  # threads of what came before stop spinning
            one.look()
            taken = statistics.median(one.look() for _ in range(3))
            if turn >= 2:
                one.seconds.append(taken)
        if turn >= 2:
            ceilings.append(meter().bytes_per_second)
            for point in stand.points():  # what is predicted from, in the same minutes
                stand.look(point)
    return ceilings


def _figures(
    all_: dict[str, Contestant], backbone: Backbone, ceilings: Sequence[float], known: Constants
) -> dict[str, dict[str, float | None]]:
    """Return what the steps say, each with its quartiles and the cost model's word."""
    shape = backbone.shape
    full, deep = all_["full"], shape.num_layers
    read = shape.layer_weights * deep * shape.bytes_per_weight
    read += shape.head_weights * shape.head_bytes_per_weight
    read += 256 * deep * shape.kv_weights / shape.hidden_size * shape.kv_bytes

    def ratio(over: str, under: str) -> dict[str, float | None]:
        a, b = all_[over], all_[under]
        return _told(
            [x / y for x, y in zip(a.seconds, b.seconds, strict=True)],
            a.predicted(known) / b.predicted(known),
        )

    return {
        "full depth / first 12 of 30": ratio("full", "first 12"),
        "full depth / first 12 of 30, short head": ratio("full", "first 12, short head"),
        "the same at 4,096 tokens of context": ratio("context 4096", "context 4096, first 12"),
        "full depth / first 12 of 30, refined head": ratio("full", "first 12, refined head"),
        "full depth / the same, refined head": ratio("full", "full, refined head"),
        "full depth / first 12 of 30, both by a refined head": ratio(
            "full, refined head", "first 12, refined head"
        ),
        "five rows / one": ratio("five rows", "full"),
        "256 / 4,096 tokens of context": ratio("full", "context 4096"),
        "sixteen texts, half leave at 12 / all to 30": ratio(
            "sixteen, half leave at 12", "sixteen"
        ),
        "the same, by a short head / all to 30": ratio("sixteen, short head", "sixteen"),
        "leave at 12, states copied / full depth": ratio("leave at 12, copied", "full"),
        "share of the memory ceiling at full depth": _told(
            [read / s / c for s, c in zip(full.seconds, ceilings, strict=True)], None
        ),
    }


def _told(values: Sequence[float], predicted: float | None) -> dict[str, float | None]:
    middle, (low, high) = spread(values)
    return {"median": middle, "low": low, "high": high, "predicted": predicted}


@torch.no_grad()
def _agreement(generic: HFBackbone, ids: list[int]) -> dict[str, float]:
    """Return the share of positions where each format's greedy choice is fp32's, teacher-forced."""

    def choices(backbone: Backbone, head: Readout | None = None) -> torch.Tensor:
        text = Text(list(ids), backbone.open())
        return step(backbone, [text], tails=[len(ids)], head=head).logits.argmax(-1)

    expected = choices(generic)
    forms: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
    agreed = {}
    for form in forms:
        backbone = open_fast(generic, form)
        agreed[form] = (choices(backbone) == expected).float().mean().item()
    refined = choices(backbone, backbone.refined())
    return agreed | {f"{form}, refined head": (refined == expected).float().mean().item()}


def _second_start(weights: str) -> float:
    """Return the seconds from starting Python to a first token, all caches being there."""
    line = f"offramp.load(weights={weights!r}, backbone='fast').generate('Hi', max_new_tokens=1)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import offramp; {line}"], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
