r"""Sorted LLaMA on models that are there: sub-models by depth, self-speculation, dynamic inference.

    A="--data data/alpaca_52k/alpaca_data_52k.jsonl.gz --skip-bad --limit 51000 --rows 16"
    A="$A --learning-rate 1e-4 --tokens 2000000"
    offramp tune --recipe sorted --exits 12,18,24 $A --out runs/sorted
    offramp tune --recipe sft --exits 12,18,24 $A --out runs/sft
    offramp tune runs/sft --recipe heads --readout head --exits 12,18,24 $A --out runs/ict
    offramp export --depth 12 --out runs/cut-12
    offramp tune runs/cut-12 --recipe sft $A --out runs/extracted-12
    python experiments/sorted.py --sorted runs/sorted --sft runs/sft --ict runs/ict \
        --extracted runs/extracted-12 --data data --answers --out results/sorted.json

With --tokens 200000 each tune takes a tenth, and shows as much less. Only --sorted is needed; any
folder, hub id or "default" will do to try it, with --limit 4 --max-new-tokens 24 --rounds 1.

DATA is the folder that holds alpaca_52k and pandalm_test. Loss and agreement are of the Alpaca rows
after the 51,000 that tuning may see. --answers lets every sub-model answer PandaLM's prompts; the
sorted model at full depth then answers them plainly, by speculation (draft at each exit; chosen
while decoding) and with the paper's confidence thresholds. Speculation must write the very tokens
of plain decoding; in fp32 the run ends if it does not. What is answered is kept beside the results.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kept import Kept, answered, traced
from narrow_arms import Arm, race, shown
from papers import SOFT_13B, shown_rows
from quality import Similarity, minilm, quality
from sorted_figures import comparison, point, ways

import offramp
from offramp.cli.options import parse_depths
from offramp.cli.output import environment, finish
from offramp.fast.pack import BYTES
from offramp.paths import prefix
from offramp.text import encode, with_input
from offramp.tune.data import tokenise
from offramp.tune.rows import read_rows

SEEN = 51_000
"""Usable Alpaca rows that tuning may see (its --limit); those after them are held out."""
LENGTH = 512
"""Tokens of a held-out example, as tuning packs them."""
DEVIATIONS = (
    "the model, its size and its tuning budget: the paper's is LLaMA-2 13B, two epochs of Alpaca",
    "no judge: sub-models are compared by held-out loss, and answers with those of the fine-tuned "
    "model (or the sorted one) at full depth",
    "the paper's thresholds are taken from its nearest exit by share of the depth",
    "drafts have a fixed length, or one that is chosen by what pays; the paper's window is that of "
    "Hugging Face's assisted generation",
    "the prompt runs at full depth; keys and values of skipped layers are copied from the exit's "
    "state or, where it says exact, computed when they are needed: the paper does not tell its way",
    "TriviaQA is left out",
)


def main() -> None:
    """Judge sub-models, accelerate the sorted one, print, and write the record."""
    options = _options()
    models = _models(options)
    whole = models["sorted"][0]
    num_layers = whole.backbone.shape.num_layers
    given = parse_depths(options.exits) or (whole.card.exits if whole.card else ())
    exits = given or SOFT_13B.exits(num_layers)
    folder = options.out.with_suffix(".answers")
    depths = [row for name, some in models.items() for row in _depths(name, some, exits, options)]
    similarity = minilm() if options.similarity else None
    prompts = _prompts(whole, options)
    record = {
        "command": f"python experiments/sorted.py {shlex.join(map(shown, sys.argv[1:]))}",
        "model": shown(whole.name),
        "models": {name: [shown(one.name) for one in some] for name, some in models.items()},
        "recipe": whole.card.recipe.name if whole.card else None,
        "backbone": whole.backbone.name,
        "weights": whole.backbone.weights,
        "num_layers": num_layers,
        "seed": options.seed,
        **environment(),
        "deviations": DEVIATIONS,
        "held_out": options.held_out,
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "timed_prompts": min(options.prompts, len(prompts)),
        "depths": depths,
        "answers": list(_answers(models, exits, similarity, options)) if options.answers else [],
        "points": _points(whole, exits, prompts, similarity, folder, options),
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in (
        ("sorted", "tuned by sorted fine-tuning: what is accelerated"),
        ("sft", "tuned plainly"),
        ("ict", "the latter with a head per exit"),
    ):
        parser.add_argument(f"--{name}", help=what, required=name == "sorted")
    parser.add_argument("--extracted", action="append", default=[], help="cut, then tuned")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=list(BYTES), default="fp32")
    parser.add_argument("--exits", help="depths, as 12,18,24; those of --sorted by default")
    parser.add_argument("--held-out", type=int, default=200, help="rows to judge depths on")
    parser.add_argument("--answers", action="store_true", help="let every sub-model answer")
    parser.add_argument("--similarity", action="store_true", help="compare meaning, too")
    parser.add_argument("--limit", type=int, help="prompts to answer, drawn by the seed")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16, help="for quality; times are of one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prompts", type=int, default=12, help="prompts to time, drawn by the seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _models(options: argparse.Namespace) -> dict[str, list[offramp.Model]]:
    """Return the models by how they were made; of those cut there may be several."""
    named = {"sorted": [options.sorted], "sft": [options.sft], "ict": [options.ict]}
    named["extracted"] = options.extracted
    found = {
        name: [
            offramp.load(None if source == "default" else source, weights=options.weights)
            for source in sources
            if source
        ]
        for name, sources in named.items()
    }
    return {name: some for name, some in found.items() if some}


def _depths(
    name: str, models: Sequence[offramp.Model], exits: tuple[int, ...], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield loss and agreement of each depth on held-out rows, teacher-forced."""
    path = options.data / "alpaca_52k" / "alpaca_data_52k.jsonl.gz"
    for model in models:
        rows = read_rows([str(path)], skip_bad=True)
        unseen = rows.rows[SEEN:]
        rows.rows = random.Random(options.seed).sample(unseen, min(options.held_out, len(unseen)))
        examples = tokenise(rows, model.tokenizer, max_length=LENGTH).examples
        texts = [(one.ids, one.first) for one in examples]
        asked = () if name == "extracted" else exits
        folder = options.out.with_suffix(".answers")
        trace = traced(model.backbone, texts, asked, options.batch_size, folder)
        for k, depth in enumerate((*asked, trace.num_layers)):
            agreement = (trace.chosen[:, k] == trace.chosen[:, -1]).double().mean().item()
            loss = trace.loss[:, k].double().mean().item()
            yield {"model": name, "depth": depth, "loss": loss, "agreement": agreement}


def _prompts(model: offramp.Model, options: argparse.Namespace) -> list[list[int]]:
    path = options.data / "pandalm_test" / "prompts_unique.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = [with_input(row["instruction"], row["input"]).strip() for row in rows]
    asked = [prompt for prompt in whole if prompt]  # one instruction is empty, its input is not
    if options.limit and options.limit < len(asked):
        asked = random.Random(options.seed).sample(asked, options.limit)
    return [encode(model.tokenizer, prompt) for prompt in asked]


def _answers(
    models: dict[str, list[offramp.Model]],
    exits: tuple[int, ...],
    similarity: Similarity | None,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield how near each sub-model's answers are to those of plain fine-tuning at full depth."""
    first = models.get("sft", models["sorted"])[0]
    full = _written(Arm("full depth", first, offramp.Plan()), options)
    for name, some in models.items():
        for model in some:
            depth = model.backbone.shape.num_layers
            for stop in (depth,) if name == "extracted" else (*exits, depth):
                run = offramp.Full() if stop == depth else offramp.Path(layers=prefix(stop, depth))
                own = _written(Arm(f"{name} {stop}", model, offramp.Plan(run=run)), options)
                kept = quality(own, full, model.tokenizer, similarity)
                yield {"model": name, "depth": stop, **kept}


def _written(arm: Arm, options: argparse.Namespace) -> Kept:
    prompts = _prompts(arm.model, options)
    folder = options.out.with_suffix(".answers")
    return answered(arm, prompts, options.max_new_tokens, options.batch_size, folder)


def _points(
    model: offramp.Model,
    exits: tuple[int, ...],
    prompts: list[list[int]],
    similarity: Similarity | None,
    folder: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return speed and answers of every way to accelerate the model."""
    runs = ways(exits, model.backbone.shape.num_layers)
    arms = [Arm("plain", model, offramp.Plan())]
    arms += [Arm(name, model, plan) for name, plan in runs.items()]
    for arm in arms:
        arm.plan.check(model.backbone)
    full, *own = [
        answered(arm, prompts, options.max_new_tokens, options.batch_size, folder) for arm in arms
    ]
    drawn = random.Random(options.seed).sample(prompts, min(options.prompts, len(prompts)))
    clock = race(arms, [drawn for _ in arms], options.max_new_tokens, options.rounds)
    return [
        point(arm, kept, full, similarity) | {"clock": clock.against(i, 0)}
        for i, (arm, kept) in enumerate(zip(arms[1:], own, strict=True), 1)
    ]


if __name__ == "__main__":
    main()
