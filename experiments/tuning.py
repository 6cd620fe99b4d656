"""Tunes the default model for real, arm by arm, and gathers what each depth learnt.

    python experiments/tuning.py e2e --data data --runs runs --out results/tuning_e2e.json

TASK is one of

* general: instruction following on Alpaca (non-commercial licence: the weights stay where they are
  made), and what becomes of the last layer. Plain fine-tuning, once and twice; SoFT (whose loss
  is LITE's where a step trains every exit); and from the plain model on: a head per exit, LITE with
  that model as teacher, a block per exit, all weights after the blocks; and the first layers of the
  default model, cut out and tuned alone. About a quarter of an hour each on a core that multiplies
  bf16.
* skip: gates that skip layers, on the hidden state and on a fixed input, at three prices of a
  layer, and plain fine-tuning for as long.
* exits: ways of teaching the default model's exits on its own answers to prompts that anyone may
  train on (`open_prompts.py`): a block per exit or an affine map, the model left alone; more of it
  in smaller steps; the exit at 24 alone, on prompts of the model's own, too; adapters; all weights
  after the blocks, the model as it was being the teacher.
  `ship_exits.py` makes of blocks what comes with offramp.
* e2e: data to text. Plain fine-tuning first; then LITE with half of each exit's loss the last
  layer's, on that model's own answers to training and synthetic prompts; then more of it on those
  answers with other names (`narrow_names.py` writes them once the second arm is done).
* sst2, ag_news: sentiment and topic in one token. Plain fine-tuning, and LITE with the same budget;
  then more of it, for AG News with the plain model as teacher of the exits and of the last layer.

Rows of the narrow tasks are those of ``narrow_data.py``, written to RUNS on the way. Every arm is
one `offramp tune`, resumable; a second run goes on with what is missing. `narrow.py` then compares
the narrow models under plans. --limit 8 --tokens 800 tries it: in a folder of its own, for what is
there is not tuned again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from command import command

import offramp
from offramp.cli.output import environment
from offramp.files import write_text
from offramp.tune.answers import ANSWERS

WATCHED = 120
"""Of LITE's prompts, whose answers the exits are judged on, too."""


ASKED = 3000
"""Prompts that the default model is let ask itself."""


@dataclass(frozen=True)
class Arm:
    """One `offramp tune`: `{data}` and `{runs}` in its options are the folders."""

    name: str
    options: str
    start: str | None = None
    """The arm whose model this one tunes; the default model otherwise."""
    cut: int | None = None
    """How many of the default model's first layers it tunes, cut out; all of them otherwise."""
    of: str | None = None
    """The arm whose answers it learns, too: all are the default model's, to the same prompts."""


HELD = range(51_500, 51_700)
"""Lines of Alpaca that the general arms are judged on; they learn from the first 51,000 rows."""
_ALPACA = (
    "--data {data}/alpaca_52k/alpaca_data_52k.jsonl.gz --skip-bad --limit 51000 --length 256 "
    "--held-out 0 --watch {runs}/data/{task}/held.jsonl --save-every 20 "
)
_GENERAL = _ALPACA + "--tokens 100000 --rows 4 --rows-at-once 4 "
_SKIP = (
    _ALPACA.replace("--length 256 ", "")
    + "--tokens 24000 --rows 4 --rows-at-once 4 --learning-rate 1e-4 "
)


def _own(rows: int, rate: str) -> str:
    """Learn from the model's own answers to open prompts, so many rows of them in a step."""
    return (
        "--answers self --answer-tokens 128 --data {runs}/data/{task}/prompts.jsonl --length 256 "
        "--held-out 100 --watch {runs}/data/{task}/lite.jsonl --save-every 50 "
        f"--rows {rows} --rows-at-once {rows} --learning-rate {rate} "
    )


_BLOCKS = "--recipe heads --readout block "
_ASKED = "--data {runs}/data/{task}/own.jsonl "
_NARROW = (
    "--data {runs}/data/{task}/train.jsonl --raw --rows 16 --rows-at-once 16 --length 128 "
    "--held-out 60 --watch {runs}/data/{task}/dev.jsonl --save-every 20 "
)
_CLASSES = _NARROW + "--learning-rate 1e-4 "

TASKS: dict[str, list[Arm]] = {
    "general": [
        Arm("sft", "--recipe sft --exits 12,18,24 --learning-rate 1e-4 " + _GENERAL),
        Arm(
            "longer",
            "--recipe sft --exits 12,18,24 --learning-rate 1e-4 --seed 1 " + _GENERAL,
            start="sft",
        ),
        Arm("sorted", "--recipe sorted --exits 12,18,24 --learning-rate 1e-4 " + _GENERAL),
        Arm(
            "ict",
            "--recipe heads --readout head --exits 12,18,24 --learning-rate 2e-4 " + _GENERAL,
            start="sft",
        ),
        Arm(
            "taught",
            "--recipe lite --exits 12,18,24 --learning-rate 1e-4 --seed 1 "
            "--teacher {runs}/general-sft --distill 0.7 " + _GENERAL,
            start="sft",
        ),
        Arm(
            "blocks",
            _BLOCKS + "--exits 12,18,24 --learning-rate 4e-4 --tokens 250000 --rows 2 "
            "--rows-at-once 2 " + _ALPACA,
            start="sft",
        ),
        Arm(
            "whole",
            "--recipe lite --readout block --exits 12,18,24 --learning-rate 3e-5 --seed 1 "
            "--teacher {runs}/general-sft --distill 0.7 " + _GENERAL,
            start="blocks",
        ),
        *(
            Arm(f"extracted-{depth}", "--recipe sft --learning-rate 1e-4 " + _GENERAL, cut=depth)
            for depth in (12, 18, 24)
        ),
    ],
    "skip": [
        Arm("sft", "--recipe sft " + _SKIP),
        *(
            Arm(f"{seen}-{alpha}", f"--recipe skip --alpha {alpha} --gate-input {seen} " + _SKIP)
            for seen in ("hidden", "fixed")
            for alpha in ("0.3", "1", "3")
        ),
    ],
    "exits": [
        Arm("blocks", _BLOCKS + "--exits 12,18,24 --tokens 250000 " + _own(8, "5e-4")),
        Arm(
            "more",
            _BLOCKS + "--exits 12,18,24 --tokens 520000 " + _own(2, "4e-4"),
            start="blocks",
            of="blocks",
        ),
        Arm(
            "late",
            _BLOCKS + "--exits 24 --tokens 760000 " + _own(3, "3e-4") + _ASKED,
            start="more",
        ),
        Arm(
            "affine",
            "--recipe heads --readout affine --exits 12,18,24 --tokens 250000 " + _own(2, "4e-4"),
            of="blocks",
        ),
        Arm(
            "lora",
            "--recipe lite --lora 32 --exits 12,18,24 --teacher base --distill 1 "
            "--tokens 120000 " + _own(8, "5e-4"),
            of="blocks",
        ),
        Arm(
            "whole",
            "--recipe lite --readout block --exits 12,18,24 --teacher base --distill 1 "
            "--each-step rotate --tokens 150000 " + _own(8, "2e-4"),
            start="more",
            of="blocks",
        ),
    ],
    "e2e": [
        Arm("sft", "--recipe sft --epochs 2 --learning-rate 1e-4 " + _NARROW),
        Arm(
            "lite",
            "--recipe lite --exits 12,18 --distill 0.5 --learning-rate 2e-4 --answers self "
            "--answer-tokens 90 --tokens 350000 " + _NARROW.replace("train", "prompts"),
            start="sft",
        ),
        Arm(
            "named",
            "--recipe lite --exits 12,18 --distill 0.5 --learning-rate 1.5e-4 --tokens 800000 "
            + _NARROW.replace("train", "named"),
            start="lite",
        ),
    ],
    "sst2": [
        Arm("sft", "--recipe sft --tokens 110000 " + _CLASSES),
        Arm("lite", "--recipe lite --exits 6,10,14,18 --tokens 110000 " + _CLASSES),
        Arm("more", "--recipe lite --exits 14,16,17 --tokens 45000 " + _CLASSES, start="lite"),
    ],
    "ag_news": [
        Arm("sft", "--recipe sft --tokens 110000 " + _CLASSES),
        Arm("lite", "--recipe lite --exits 10,14,16,17 --tokens 110000 " + _CLASSES),
        Arm(
            "taught",
            "--recipe lite --exits 10,14 --teacher {runs}/ag_news-sft --distill 0.6 --seed 1 "
            "--tokens 60000 " + _CLASSES,
            start="lite",
        ),
    ],
}
FOLDERS = {"e2e": "e2e_nlg", "sst2": "sst2_and_small_cls", "ag_news": "ag_news"}


def main() -> None:
    """Run what is missing of a task, and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--runs", type=Path, required=True, help="where models and states go")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="some arms; all by default")
    parser.add_argument("--limit", type=int, help="only the first N rows, to try it out")
    parser.add_argument("--tokens", type=int, help="end each arm after so many, likewise")
    parser.add_argument("--out", type=Path, help="results, JSON")
    options = parser.parse_args()
    names = [arm.name for arm in TASKS[options.task]]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no arm {', '.join(unknown)} of {options.task}: {', '.join(names)}")
    arms = [arm for arm in TASKS[options.task] if options.only is None or arm.name in options.only]
    _prepare(options.task, arms, options)
    for arm in arms:
        folder = options.runs / f"{options.task}-{arm.name}"
        if not (folder / "offramp.json").is_file():
            if arm.of is not None:
                _share_answers(options.runs / f"{options.task}-{arm.of}", folder)
            if arm.cut is not None:
                _cut(arm.cut, options.runs)
            tune = tune_command(arm, options.task, options.data, options.runs)
            given = {"--limit": options.limit, "--tokens": options.tokens}
            more = [word for name, n in given.items() if n for word in (name, str(n))]
            more += ["--held-out", "0"] if options.limit else []  # what is watched judges, too
            subprocess.run([*tune, *more, "--out", str(folder)], check=True)
    rows = {arm.name: _row(options.runs / f"{options.task}-{arm.name}") for arm in arms}
    result = {
        "command": command(),
        "arms": {arm.name: f"offramp tune {arm.options}" for arm in arms},
        **environment(),
        "rows": rows,
    }
    for name, row in rows.items():
        print(name, json.dumps(row))
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


def _prepare(task: str, arms: Sequence[Arm], options: argparse.Namespace) -> None:
    """Write the rows that an arm reads and the data sets do not hold as they are."""
    data, limit = options.data, options.limit
    out = options.runs / "data" / task
    if task in ("general", "skip"):
        out.mkdir(parents=True, exist_ok=True)
        held = HELD[:limit]
        with gzip.open(data / "alpaca_52k" / "alpaca_data_52k.jsonl.gz", "rt") as lines:
            write_text(out / "held.jsonl", "".join(islice(lines, held.start, held.stop)))
        return
    if task == "exits":
        script = Path(__file__).with_name("open_prompts.py")
        out.mkdir(parents=True, exist_ok=True)
        made = [sys.executable, str(script), "--data", str(data), "--out"]
        subprocess.run([*made, str(out / "prompts.jsonl")], check=True)
        own = out / "own.jsonl"
        if any(own.name in arm.options for arm in arms) and not own.is_file():
            count = str(min(ASKED, limit or ASKED))
            subprocess.run([sys.executable, str(script), "--own", count, "--out", own], check=True)
        if not (out / "lite.jsonl").is_file():
            watched = min(WATCHED, limit or WATCHED)
            _answer_lite(data / "lite_test_sets" / "all_730.jsonl", out / "lite.jsonl", watched)
        return
    if not (out / "test.jsonl").is_file():
        script = Path(__file__).with_name("narrow_data.py")
        made = [sys.executable, str(script), task, "--data", str(data / FOLDERS[task])]
        subprocess.run([*made, "--out", str(out)], check=True)


def _answer_lite(prompts: Path, out: Path, count: int) -> None:
    """Write what the default model says to some of LITE's prompts: text that no arm learns from."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    drawn = random.Random(0).sample(rows, count)
    asked = ["\n\n".join(filter(None, (row["instruction"], row["input"]))) for row in drawn]
    result = offramp.load(weights="int8").generate(asked, max_new_tokens=96, batch_size=16)
    pairs = zip(asked, result.outputs, strict=True)
    made = [{"prompt": prompt, "completion": output.text} for prompt, output in pairs]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))


def _share_answers(of: Path, folder: Path) -> None:
    """Let an arm learn from answers that another one had written: a card of them says whose."""
    folder.mkdir(exist_ok=True)
    if not (folder / ANSWERS).is_file():
        shutil.copy(of / ANSWERS, folder / ANSWERS)


def _cut(depth: int, runs: Path) -> None:
    """Write the first layers of the default model as a model of their own."""
    folder = runs / f"cut-{depth}"
    if not folder.is_dir():  # export leaves a whole one, or none
        words = ["export", "--depth", str(depth), "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "offramp.cli", *words], check=True)


def tune_command(arm: Arm, task: str, data: Path, runs: Path) -> list[str]:
    """Return the `offramp tune` of an arm."""
    start = [] if arm.start is None else [str(runs / f"{task}-{arm.start}")]
    if arm.cut is not None:
        start = [str(runs / f"cut-{arm.cut}")]
    filled = arm.options.format(data=data, runs=runs, task=task).split()
    return [sys.executable, "-m", "offramp.cli", "tune", *start, *filled]


def _row(folder: Path) -> dict[str, object]:
    """Return what a finished arm learnt, without the bins of its reliability curves."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    card = json.loads((folder / "offramp.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("depth", "loss", "agreement", "confidence", "calibration_error")
    figures = {
        moment: {
            name: [{key: round(row[key], 4) for key in keys} for row in rows]
            for name, rows in report[moment].items()
        }
        for moment in ("before", "after")
    }
    rates = [line["tokens_per_second"] for line in log]
    return {
        "tokens": card["data"]["tokens"],
        "steps": len(log),
        "tokens_per_second": round(statistics.median(rates), 1),
        **figures,
    }


if __name__ == "__main__":
    main()
