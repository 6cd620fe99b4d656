"""What a step of LITE costs beside the naive way and beside plain fine-tuning: time and memory.

    python experiments/train_speed.py --data alpaca.jsonl.gz --out results/train_speed.json

All train the same examples, in turns, in one run: forward, losses and backward, without the
optimiser, which costs all the same. The naive way is what a first attempt looks like: one example
a row, padded to the longest; the hidden states of all layers; every position's logits at every
exit, in autocast. Peak memory is that of a process that does nothing else, over the one that has
only loaded the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import command
from torch import Tensor
from torch.nn import functional

from offramp.cli.output import environment
from offramp.files import write_text
from offramp.hf.load import load_checkpoint
from offramp.tune.data import Example, read_examples
from offramp.tune.gradients import Student
from offramp.tune.network import Net
from offramp.tune.packing import collate, pack
from offramp.tune.recipes import Moment
from offramp.tune.settings import Settings

ARMS = ("naive lite", "sft", "lite", "lite, one exit in turn")
ROWS = 4


def contestant(
    name: str, model: Any, examples: list[Example], exits: tuple[int, ...]
) -> Callable[[], int]:
    """Return a function that takes one step and returns the tokens it saw."""
    if name == "naive lite":
        return _naive(model, examples, exits)
    sft = name == "sft"
    settings = Settings(
        recipe="sft" if sft else "lite",
        exits=() if sft else exits,
        each_step="rotate" if "turn" in name else "all",
    )
    student = Student(Net(model, settings.exits), settings)
    packs = pack(examples, settings.length, 0, 0)
    turn = 0

    def step() -> int:
        nonlocal turn
        draw = torch.Generator().manual_seed(0)
        turn += 1
        seen = 0
        for start in range(0, len(packs), ROWS):
            batch = collate(packs[start : start + ROWS], examples)
            with torch.autocast("cpu", torch.bfloat16):
                loss = student(batch, Moment(turn, 100, settings, draw, draw))
            loss.backward()
            seen += batch.tokens
        return seen

    return step


def _naive(model: Any, examples: list[Example], exits: tuple[int, ...]) -> Callable[[], int]:
    def step() -> int:
        for start in range(0, len(examples), 8):
            part = examples[start : start + 8]
            batch = collate([[i] for i in range(len(part))], part)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(
                    input_ids=batch.ids,
                    attention_mask=(batch.segments >= 0).long(),
                    use_cache=False,
                    output_hidden_states=True,
                )
                losses = [_cross_entropy(out.logits, batch.labels)]
                for depth in exits:
                    logits = model.lm_head(model.model.norm(out.hidden_states[depth]))
                    losses.append(_cross_entropy(logits, batch.labels))
            torch.stack(losses).mean().backward()
        return sum(len(example.ids) for example in examples)

    return step


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def main() -> None:
    """Time all contestants in turns, then take the memory of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--exits", default="6,12,18,24")
    parser.add_argument("--tokens", type=int, default=4000, help="of one step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", help="run one contestant alone and print its peak in bytes")
    options = parser.parse_args()
    model, tokenizer, shown = load_checkpoint(options.model)
    model.train()
    data = read_examples([options.data], tokenizer, max_length=512, limit=400, skip_bad=True)
    examples: list[Example] = []
    for example in data.examples:
        if sum(len(e.ids) for e in examples) < options.tokens:
            examples.append(example)
    exits = tuple(int(depth) for depth in options.exits.split(","))
    if options.memory_of:
        step = contestant(options.memory_of, model, examples, exits)
        before = _forget_peak()
        step()
        print(_resident("VmHWM") - before)
        return
    steps = {name: contestant(name, model, examples, exits) for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(options.rounds + 1):
        for name, step in steps.items():
            model.zero_grad()
            start = time.perf_counter()
            seen = step()
            times[name].append(time.perf_counter() - start)
            rates[name].append(seen / times[name][-1])
    rows = [_row(name, times, rates, _memory(name)) for name in ARMS]
    result = {
        "command": command(),
        "model": shown,
        "exits": exits,
        "tokens": sum(len(e.ids) for e in examples),
        "learnt": sum(len(e.ids) - e.first for e in examples),
        "rounds": options.rounds,
        "seed": 0,
        **environment(),
        "rows": rows,
    }
    for row in rows:
        print(row)
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


def _row(
    name: str, times: dict[str, list[float]], rates: dict[str, list[float]], memory: int
) -> dict[str, Any]:
    """Return medians and quartiles of one contestant, its first round left out as a warm-up."""

    def ratios(other: str) -> list[float]:
        pairs = zip(times[name][1:], times[other][1:], strict=True)
        return _quartiles([mine / theirs for mine, theirs in pairs])

    return {
        "name": name,
        "tokens_per_second": _quartiles(rates[name][1:]),
        "time_to_sft": ratios("sft"),
        "time_to_naive": ratios("naive lite"),
        "peak_bytes": memory,
    }


def _quartiles(values: list[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def _memory(name: str) -> int:
    """Return what a step adds to the memory of a process that has loaded the model."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _forget_peak() -> int:
    """Let the process's peak of memory begin anew (loading was higher); return what it holds."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int:
    """Return a line of the process's status (Linux), in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in status if line.startswith(what + ":")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
