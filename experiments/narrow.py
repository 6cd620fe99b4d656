r"""Does depth pay on a narrow task? Quality and wall-clock of tuned models under plans.

    python experiments/narrow.py e2e --rows e2e/test.jsonl --weights int4 \
        --arm sft runs/sft full --arm full runs/lite full \
        --arm "lite 12" runs/lite 12:tokens:e2e/tokens.json \
        --arm exits runs/lite plans/exits.json --out results/narrow_e2e.json

ROWS are what narrow_data.py wrote. An arm is a name, a model (folder, hub id or "default"; its own
--weights behind an @: runs/lite@int4) and a plan: "full", a number of layers (with a head:
12:shortlist:4096, 30:tokens:FILE), or a plan file.
The first arm is the baseline, whose quality and time all others are compared with; an arm is also
timed against full depth of its own model, where that is an arm.

* e2e: greedy answers; ROUGE-L (see narrow_scores.py) with a paired bootstrap over meanings, the
  share of names, foods and places that are repeated, and tokens per answer, as a short answer is
  fast for nothing.
* sst2, ag_news: one token; right if the most probable of all the head reads is the label's. A head
  of the labels alone makes that easier: *of labels* compares as if every arm had one. Plans with
  "exit_prompt" leave during the prompt.

Answers are kept beside the results (.answers), so that a second run, or one with another arm, goes
on where the first stopped. Times are taken together, in turns, at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from narrow_arms import Answers, Arm, answer_all, open_arms, race, shown
from narrow_data import LABELS, read_rows
from narrow_scores import coverage

from offramp.bench.own import describe
from offramp.cli.output import environment, finish
from offramp.evaluate.intervals import paired
from offramp.evaluate.meanings import parse_prompt
from offramp.evaluate.overlap import rouge_l
from offramp.fast.pack import BYTES
from offramp.files import write_text
from offramp.machine import versions
from offramp.plan import check_of
from offramp.text import encode


@dataclass(frozen=True)
class Texts:
    """What all arms answer."""

    task: str
    prompts: list[str]
    references: list[list[str]]
    count: int
    """Most new tokens."""

    def ids(self, arm: Arm) -> list[list[int]]:
        """Return the prompts by the arm's tokenizer."""
        return [encode(arm.model.tokenizer, prompt, raw=True) for prompt in self.prompts]

    def labels(self, arm: Arm) -> list[int]:
        """Return the first tokens of the labels; none for a task that writes text."""
        found = [arm.model.tokenizer(label)["input_ids"][0] for label in LABELS.get(self.task, ())]
        assert len(set(found)) == len(found), "labels that begin alike"
        return found


def main() -> None:
    """Let all arms answer, compare, time, print, and write the record."""
    options = _options()
    texts = _texts(options)
    arms = open_arms(options.arm, options.weights)
    answers = _answers(arms, texts, options)
    scores = [_scores(texts, arm, found) for arm, found in zip(arms, answers, strict=True)]
    rows = [
        {
            **_known(arm),
            **_shares(found),
            **{name: statistics.fmean(own) for name, own in each.items()},
            "differences": _differences(each, scores[0], options.seed),
        }
        for arm, found, each in zip(arms, answers, scores, strict=True)
    ]
    for row, times in zip(rows, _times(arms, texts, options), strict=True):
        row["clock"] = times
        print(json.dumps(row))
    record = {
        "command": f"python experiments/narrow.py {shlex.join(map(shown, sys.argv[1:]))}",
        "task": texts.task,
        "rows_sha256": hashlib.sha256(options.rows.read_bytes()).hexdigest(),
        "texts": len(texts.prompts),
        "max_new_tokens": texts.count,
        "weights": options.weights,
        "seed": options.seed,
        **environment(),
        "baseline": arms[0].name,
        "rounds": options.rounds,
        "timed_prompts": min(options.prompts, len(texts.prompts)),
        "arms": rows,
    }
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["e2e", *LABELS])
    parser.add_argument("--rows", type=Path, required=True, help="test.jsonl, or dev.jsonl")
    parser.add_argument(
        "--arm", nargs=3, action="append", required=True, metavar=("NAME", "MODEL", "PLAN")
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=list(BYTES), default="int4")
    parser.add_argument("--limit", type=int, help="texts, drawn by the seed; all by default")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="e2e; a label is one token")
    parser.add_argument("--batch-size", type=int, default=16, help="for quality; times are of one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=20, help="texts to time, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = [name for name, _, _ in options.arm]
    if len(set(names)) < len(names):
        parser.error("two arms have one name")
    return options


def _texts(options: argparse.Namespace) -> Texts:
    """Return the texts of the rows: those of one prompt are references of one text."""
    references: dict[str, list[str]] = {}
    for row in read_rows(options.rows):
        references.setdefault(row["prompt"], []).append(row["completion"])
    prompts = list(references)
    if options.limit and options.limit < len(prompts):
        prompts = random.Random(options.seed).sample(prompts, options.limit)
    count = 1 if options.task in LABELS else options.max_new_tokens
    return Texts(options.task, prompts, [references[prompt] for prompt in prompts], count)


def _answers(arms: Sequence[Arm], texts: Texts, options: argparse.Namespace) -> list[Answers]:
    """Return each arm's answers: those kept beside the results, or new ones, kept at once."""
    path = options.out.with_suffix(".answers")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for arm in arms:
        key = _key(arm, texts)
        if key not in kept:
            found = answer_all(
                arm, texts.ids(arm), texts.count, texts.labels(arm), options.batch_size
            )
            kept[key] = asdict(found)
            write_text(path, json.dumps(kept))
    return [Answers(**kept[_key(arm, texts)]) for arm in arms]


def _key(arm: Arm, texts: Texts) -> str:
    """Return a digest of everything that an arm's answers depend on, versions included."""
    backbone = arm.model.backbone
    facts = (
        versions(),
        *(backbone.fingerprint, backbone.name, backbone.weights, backbone.build),
        *(arm.plan.run.model_dump(mode="json"), texts.count, texts.prompts),
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _scores(texts: Texts, arm: Arm, found: Answers) -> dict[str, list[float]]:
    """Return the scores of each text, by name; the first is the one that counts."""
    if texts.task in LABELS:
        names = LABELS[texts.task]
        tokens = dict(zip(names, texts.labels(arm), strict=True))
        right = [tokens[references[0]] for references in texts.references]
        pairs = list(zip(right, found.written, found.labels, strict=True))
        return {
            "accuracy": [float(label == new[0]) for label, new, _ in pairs],
            "accuracy_of_labels": [float(label == best) for label, _, best in pairs],
        }
    written = [arm.model.tokenizer.decode(new, skip_special_tokens=True) for new in found.written]
    return {
        "rouge_l": [rouge_l(*pair) for pair in zip(written, texts.references, strict=True)],
        "coverage": [
            coverage(text, parse_prompt(prompt))
            for text, prompt in zip(written, texts.prompts, strict=True)
        ],
        "tokens": [float(len(new)) for new in found.written],
        "ended": [float(new[-1] in arm.model.eos) for new in found.written],
    }


def _differences(
    own: dict[str, list[float]], baseline: dict[str, list[float]], seed: int
) -> dict[str, dict[str, Any]]:
    """Return each score's difference to the baseline's, with its interval and verdict."""
    pairs = {name: paired(own[name], baseline[name], seed) for name in own}
    return {name: {**asdict(pair), "verdict": pair.verdict} for name, pair in pairs.items()}


def _known(arm: Arm) -> dict[str, Any]:
    """Return what an arm is; a list of tokens by its length and digest."""
    run = arm.plan.run.model_dump(mode="json")
    run |= {key: str(check_of(arm.plan)) for key in ("head", "check") if key in run}
    return {
        "name": arm.name,
        "model": shown(arm.model.name),
        "fingerprint": arm.model.backbone.fingerprint,
        "backbone": arm.model.backbone.name,
        "weights": arm.model.backbone.weights,
        "plan": describe(arm.plan.run),
        "run": run,
    }


def _shares(found: Answers) -> dict[str, float]:
    depths = [depth for text in found.depths for depth in text]
    return {
        "layers_saved": found.layers_saved,
        "operations": found.operations,
        "mean_depth": statistics.fmean(depths),
    }


def _times(arms: Sequence[Arm], texts: Texts, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each arm's times on the same few texts: its own, and relative to others'."""
    many = range(len(texts.prompts))
    drawn = random.Random(options.seed).sample(many, min(options.prompts, len(many)))
    ids = [[own[i] for i in drawn] for own in map(texts.ids, arms)]
    clock = race(arms, ids, texts.count, options.rounds)
    found = []
    for i, arm in enumerate(arms):
        full = [j for j, other in enumerate(arms) if other.full and other.model is arm.model]
        found.append(
            {
                "milliseconds": clock.milliseconds(i),
                "to_baseline": clock.against(i, 0),
                "to_own_full_depth": clock.against(i, full[0]) if full else None,
            }
        )
    return found


if __name__ == "__main__":
    main()
