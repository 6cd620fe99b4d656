"""LITE on a model that is there: agreement by exit, confidence exits, and what they really save.

    offramp tune --recipe lite --exits 12,18,24 --data data/alpaca_52k/alpaca_data_52k.jsonl.gz \
        --skip-bad --tokens 2000000 --learning-rate 1e-4 --out runs/lite
    python experiments/lite.py runs/lite --data data --similarity --out results/lite.json

MODEL is a tuned folder, a hub id, or "default": the default model as it is, whose exits nobody
taught. DATA is the folder that holds lite_test_sets. The model answers the prompts of the four test
sets at full depth; its own answers are traced (agreement, confidence); then it answers again at
each operating point: the paper's thresholds with keys and values copied (CALM's way, and by all
accounts LITE's) and exact, one threshold for all exits (--sweep), and plans of one's own (--plan).
Times are taken at the end, alone and in turns. --limit 3 --max-new-tokens 32 --rounds 1 tries it.

Answers and traces are kept in a folder beside the results (.answers): a second run goes on there.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept import Kept, answered, traced
from lite_figures import SETS, by_exit, comparison, curve
from narrow_arms import Arm, race, shown
from papers import (
    LITE_7B,
    layers_saved,
    operations_saved,
    saved_at,
    shown_rows,
)
from quality import Similarity, minilm, quality

import offramp
from offramp.bench.own import describe
from offramp.cli.options import parse_depths
from offramp.cli.output import environment, finish
from offramp.fast.pack import BYTES
from offramp.plan import check_of, read_plan
from offramp.text import encode, with_input

DEVIATIONS = (
    "the model, its size and its tuning: the paper's are LLaMA-2 7B and 13B",
    "exits at the depths this model was taught, else at the paper's shares of the depth; its "
    "thresholds taken from its nearest exit, and known to us from others' accounts only",
    "the prompt runs at full depth, so the first token of each answer leaves nowhere; figures "
    "are of the tokens after it",
    "no judge: answers are compared with the model's own at full depth",
    "answers end at --max-new-tokens",
)


def main() -> None:
    """Answer, trace, compare, time, print, and write the record."""
    options = _options()
    model = offramp.load(
        None if options.model == "default" else options.model, weights=options.weights
    )
    num_layers = model.backbone.shape.num_layers
    exits = parse_depths(options.exits) or (model.card.exits if model.card else ())
    exits = exits or LITE_7B.exits(num_layers)
    full = Arm("full depth", model, offramp.Plan())
    arms = [full, *_points(model, exits, options)]
    similarity = minilm() if options.similarity else None
    prompts = _prompts(model, options)
    folder = options.out.with_suffix(".answers")
    answers = {
        arm.name: {
            name: answered(arm, ids, options.max_new_tokens, options.batch_size, folder)
            for name, ids in prompts.items()
        }
        for arm in arms
    }
    own = [
        (prompt + new, len(prompt))
        for kept in answers[full.name].values()
        for prompt, new in zip(kept.prompts, kept.written, strict=True)
    ]
    trace = traced(model.backbone, own, exits, options.batch_size, folder)
    points = [_point(arm, answers[arm.name], answers[full.name], similarity) for arm in arms[1:]]
    for point, clock in zip(points, _times(arms, prompts, options), strict=True):
        point["clock"] = clock
    record = {
        "command": f"python experiments/lite.py {shlex.join(map(shown, sys.argv[1:]))}",
        "model": shown(model.name),
        "fingerprint": model.backbone.fingerprint,
        "recipe": model.card.recipe.name if model.card else None,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        "num_layers": num_layers,
        "seed": options.seed,
        **environment(),
        "deviations": DEVIATIONS,
        "prompts": {name: len(ids) for name, ids in prompts.items()},
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "timed_prompts": min(options.prompts, sum(map(len, prompts.values()))),
        "full": {
            name: quality(kept, kept, model.tokenizer) for name, kept in _sets(answers[full.name])
        },
        "exits": by_exit(trace),
        "curve": curve(trace),
        "points": points,
        "last_layer": _last_layer(Path(options.model)),
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help='tuned folder, hub id, or "default"')
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=list(BYTES), default="int8")
    parser.add_argument(
        "--exits", help="depths, as 12,18,24; those the model was taught by default"
    )
    parser.add_argument("--sweep", type=float, nargs="*", default=[0.8, 0.95], help="thresholds")
    parser.add_argument(
        "--plan", type=Path, action="append", default=[], help="a plan of one's own"
    )
    parser.add_argument("--similarity", action="store_true", help="compare meaning, too")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument("--limit", type=int, help="prompts of each set, drawn by the seed")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16, help="for quality; times are of one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prompts", type=int, default=12, help="prompts to time, drawn by the seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _points(model: offramp.Model, exits: tuple[int, ...], options: argparse.Namespace) -> list[Arm]:
    """Return the operating points, each a plan that fits the model."""
    own = LITE_7B.at(exits, model.backbone.shape.num_layers)
    made = [
        ("paper's thresholds", offramp.Exit(signal="max_prob", thresholds=own, kv="copy")),
        ("paper's thresholds, exact", offramp.Exit(signal="max_prob", thresholds=own)),
    ]
    for value in options.sweep:
        same = dict.fromkeys(exits, value)
        made.append((f"{value:g}", offramp.Exit(signal="max_prob", thresholds=same, kv="copy")))
    plans = [(name, offramp.Plan(run=run)) for name, run in made]
    plans += [(path.stem, read_plan(path)) for path in options.plan]
    if len({name for name, _ in plans}) < len(plans):
        raise offramp.UsageError("two operating points have one name: rename a --plan file")
    for _, plan in plans:
        plan.check(model.backbone)
    return [Arm(name, model, plan) for name, plan in plans]


def _prompts(model: offramp.Model, options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Return the prompts of each set as token ids."""
    path = options.data / "lite_test_sets" / "all_730.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {}
    for name in SETS:
        asked = [with_input(r["instruction"], r["input"]) for r in rows if r["set"] == name]
        if options.limit and options.limit < len(asked):
            asked = random.Random(options.seed).sample(asked, options.limit)
        found[name] = [encode(model.tokenizer, prompt, raw=options.raw) for prompt in asked]
    return found


def _sets(answers: dict[str, Kept]) -> list[tuple[str, Kept]]:
    """Return the answers set by set, and all of them."""
    return [*answers.items(), ("all", sum(answers.values(), Kept()))]


def _point(
    arm: Arm, answers: dict[str, Kept], full: dict[str, Kept], similarity: Similarity | None
) -> dict[str, Any]:
    """Return what an operating point saved and kept, set by set."""
    sets = {
        name: _saved(arm, kept) | quality(kept, base, arm.model.tokenizer, similarity)
        for (name, kept), (_, base) in zip(_sets(answers), _sets(full), strict=True)
    }
    depths = Counter(depth for kept in answers.values() for depth in kept.later)
    return {
        "name": arm.name,
        "plan": describe(arm.plan.run),
        "run": arm.plan.run.model_dump(mode="json"),
        "histogram": {str(depth): count for depth, count in sorted(depths.items())},
        "sets": sets,
    }


def _saved(arm: Arm, kept: Kept) -> dict[str, float | None]:
    """Return the shares saved, by every way of counting."""
    backbone, run = arm.model.backbone, arm.plan.run
    shape = backbone.shape
    saved = operations_saved(kept.work, kept.sizes, shape, check_of(arm.plan).weights(shape))
    exits = run.policy.exits if isinstance(run, offramp.Exit) else ()
    priced = saved_at(kept.later, exits, shape.num_layers, LITE_7B.head, LITE_7B.fill)
    return {
        "layers_saved": layers_saved(kept.later, shape.num_layers),
        "operations_saved": saved.generated,
        "operations_saved_with_prompt": saved.whole,
        "saved_at_7b_prices": priced,
    }


def _times(
    arms: Sequence[Arm], prompts: dict[str, list[list[int]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the time of each point relative to its own full depth, alone and in turns."""
    every = [ids for some in prompts.values() for ids in some]
    drawn = random.Random(options.seed).sample(every, min(options.prompts, len(every)))
    clock = race(arms, [drawn for _ in arms], options.max_new_tokens, options.rounds)
    return [clock.against(i, 0) for i in range(1, len(arms))]


def _last_layer(folder: Path) -> dict[str, float] | None:
    """Return the last layer's loss before and after tuning, where the tuning told.

    On rows kept out of what it learnt from or, where there are none, on the first text it watched.
    """
    path = folder / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    texts = report["after"]
    if not texts:
        return None
    text = "held out" if "held out" in texts else next(iter(texts))
    return {when: report[when][text][-1]["loss"] for when in ("before", "after")}


if __name__ == "__main__":
    main()
