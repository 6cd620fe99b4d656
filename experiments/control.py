"""What does controlled speculation take, against plain decoding and a fixed draft?

    python experiments/control.py --out results/control.json

Two texts: ordinary requests, where the frozen default model's drafts gain nothing, and texts that
repeat themselves, where they are often right; with --model any other model. In each round all
contestants write the same answers at once, token by token in turns, so that whatever else the
machine does in a second falls on all of them; a ratio is taken within a round. The first answer of
a round is not measured: it warms the caches and the control, which goes on from text to text.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from command import command

import offramp
from offramp.cli.output import environment, finish
from offramp.inspection import PROMPTS
from offramp.plan import execute
from offramp.request import Request
from offramp.runs import Run
from offramp.text import encode
from offramp.timing import constants

RESAMPLES = 4000
"""Of the rounds, for the interval of the median."""
LINE = "The cat sat on the mat, and the dog lay on the rug. "
TEXTS = {
    "ordinary": [PROMPTS[1], PROMPTS[2], PROMPTS[5]],
    "repeating": [LINE * 9, LINE * 8, LINE[4:] * 8],
}


def main() -> None:
    """Measure, print a line per text and contestant, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 18])
    parser.add_argument("--fixed", type=int, default=12, help="depth of the fixed draft")
    parser.add_argument("--head", type=int, default=8192, help="entries of the drafts' head")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    model = offramp.load(options.model, weights=options.weights)
    constants(model.backbone)  # measured, if it never was: predictions begin there
    head = offramp.Shortlist(size=options.head)
    runs: dict[str, Run] = {
        "plain": offramp.Full(),
        "controlled": offramp.Adapt(
            drafts=tuple(tuple(range(depth)) for depth in options.depths), head=head
        ),
        f"fixed at {options.fixed}": offramp.Speculate(
            draft=tuple(range(options.fixed)), head=head
        ),
    }
    rows = [
        row
        for name, prompts in TEXTS.items()
        for row in raced(model, runs, name, prompts, options.rounds, options.tokens)
    ]
    record = {
        "command": command(),
        "model": model.name,
        "seed": None,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        **environment(),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "rows": rows,
    }
    finish(record, as_json=False, out=options.out)


def raced(
    model: offramp.Model,
    runs: dict[str, Run],
    name: str,
    prompts: list[str],
    rounds: int,
    count: int,
) -> list[dict[str, Any]]:
    """Return a row for each contestant but the plain one, on these prompts."""
    raw = name == "repeating"
    requests = [Request(encode(model.tokenizer, prompt, raw=raw), count) for prompt in prompts]
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for turn in range(rounds):
        order = [*list(runs)[turn % len(runs) :], *list(runs)[: turn % len(runs)]]
        answers = written(model, {one: runs[one] for one in order}, requests)
        assert all(found.ids == answers["plain"].ids for found in answers.values())  # lossless
        for one, found in answers.items():
            seconds[one].append(found.seconds)
        print(name, turn, {one: round(times[-1], 2) for one, times in seconds.items()}, flush=True)
    return [
        row(name, one, seconds[one], seconds["plain"], answers[one])
        for one in runs
        if one != "plain"
    ]


@dataclass
class Written:
    """What one contestant wrote in a round, and what that took."""

    ids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """Of all answers but the first."""
    drafted: int = 0
    accepted: int = 0


def written(
    model: offramp.Model, runs: dict[str, Run], requests: list[Request]
) -> dict[str, Written]:
    """Let all contestants write, a token of each in turn."""
    going = {one: execute(model.backbone, requests, run, batch_size=1) for one, run in runs.items()}
    answers = {one: Written() for one in runs}
    while going:
        for one, tokens in list(going.items()):
            found, before = answers[one], model.backbone.meter.copy()
            begin = time.perf_counter()
            token = next(tokens, None)
            took = time.perf_counter() - begin
            work = model.backbone.meter - before
            found.drafted += work.drafted
            found.accepted += work.accepted
            if token is None:
                del going[one]
                continue
            found.ids.append(token.id)
            found.seconds += took if token.index else 0.0
    return answers


def row(
    text: str, name: str, own: list[float], plain: list[float], last: Written
) -> dict[str, Any]:
    """Return the ratio to plain decoding within each round: median, quartiles, 95% interval."""
    ratios = [one / other for one, other in zip(own, plain, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    drawn = random.Random(0)
    medians = sorted(median(drawn.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    found = {
        "text": text,
        "name": name,
        "time_ratio": median(ratios),
        "time_ratio_quartiles": [low, high],
        "time_ratio_interval": [medians[RESAMPLES // 40], medians[-RESAMPLES // 40]],
        "ratios": ratios,
        "drafted": last.drafted,
        "accepted": last.accepted,
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
