"""How much could a depth per text save, how much of it is noise, how much does a router recover?

    python experiments/oracle.py --data all_730.jsonl --out results/oracle.json

Takes the prompts of the LITE test sets that have a reference (Self-Instruct's), and scores every
depth from 18 on, teacher-forced, on the reference and on the model's own greedy answers.

Answers and traces are kept in a folder beside the results (.answers): a second run goes on there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from command import command
from kept import answered, traced
from narrow_arms import Arm, shown
from papers import shown_rows
from selection_figures import of_oracle as comparison

import offramp
from offramp.allocate.report import default_budgets, report
from offramp.allocate.score import Score, features_of, from_trace
from offramp.allocate.table import must_be_enough
from offramp.cli.output import environment, finish
from offramp.cli.scoring import as_record, fitted_router
from offramp.cli.tracing import Texts
from offramp.text import encode, with_input

ARMS: tuple[tuple[str, Score], ...] = (
    ("reference", "match"),
    ("reference", "loss"),
    ("own", "agreement"),
)
DEVIATIONS = (
    "the model: the paper's is OPT-IML 1.3B",
    "depths are the first layers of one model, untaught; the paper's are evenly spread layers, "
    "each number a checkpoint tuned for it",
    "the shallowest depth offered is --first, the paper's 4 of 24 layers",
    "scores are of texts given, teacher-forced; the paper's are ROUGE-L of what each depth writes",
    "few prompts of Self-Instruct; the paper's are 7,801 of Alpaca",
)
AT_ONCE = 32
"""Texts that are answered, traced and kept together."""


def main() -> None:
    """Score, judge every arm, print a line per arm and budget, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--weights", default="fp32", choices=("fp32", "bf16", "int8", "int4"))
    parser.add_argument("--first", type=int, default=18, help="the shallowest depth")
    parser.add_argument("--look", type=int, default=18, help="where a router looks at the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, default=300, help="20 or more; 50 for a router")
    options = parser.parse_args()
    asked = with_reference(options.data)[: options.limit]
    must_be_enough(len(asked))
    model = offramp.load(options.model, weights=options.weights)
    folder = options.out.with_suffix(".answers")
    texts = {
        "reference": references(model, asked, options.max_new_tokens),
        "own": own_answers(model, asked, options.max_new_tokens, folder),
    }
    # A text's scores are compared between its halves.
    texts = {
        name: [one for one in some if len(one[0]) - one[1] >= 2] for name, some in texts.items()
    }
    exits = tuple(range(options.first, model.backbone.shape.num_layers))
    looks = (options.look,)
    traces, features = {}, {}
    for name, some in texts.items():
        traces[name] = traced(model.backbone, some, exits, AT_ONCE, folder)
        given = [ids[:start] for ids, start in some]
        features[name] = features_of(model.backbone, given, looks)
    arms: list[dict[str, Any]] = []
    for name, score in ARMS:
        table = from_trace(traces[name], model.id, score).with_features(features[name], looks)
        router, predicted = fitted_router(table, seed=0, needed=False)
        done = report(table, default_budgets(table.costs), predicted)
        arms.append({"text": name, **as_record(table, done, router)})
        print(name, score, f"full {done.full:.4f}, oracle equals it at {done.smallest:.2f}")
        for row in done.rows:
            print(row)
    record = {
        "command": command(),
        "model": shown(model.name),
        "plan": None,
        "seed": 0,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        **environment(),
        "deviations": DEVIATIONS,
        "max_new_tokens": options.max_new_tokens,
        "arms": arms,
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def with_reference(data: Path) -> list[tuple[str, str]]:
    """Return (prompt, reference) of the rows that have one."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [
        (with_input(row["instruction"], row["input"]), row["reference"])
        for row in rows
        if row["reference"]
    ]


def references(model: offramp.Model, asked: list[tuple[str, str]], count: int) -> Texts:
    """Return prompts with the first tokens of their references."""
    texts: Texts = []
    for prompt, reference in asked:
        ids = encode(model.tokenizer, prompt)
        answer = model.tokenizer(reference, add_special_tokens=False)["input_ids"][:count]
        texts.append((ids + answer, len(ids)))
    return texts


def own_answers(
    model: offramp.Model, asked: list[tuple[str, str]], count: int, folder: Path
) -> Texts:
    """Return prompts with the model's own greedy answers, those kept in ``folder`` first."""
    prompts = [encode(model.tokenizer, prompt) for prompt, _ in asked]
    own = answered(Arm("own answers", model, offramp.Plan()), prompts, count, AT_ONCE, folder)
    return [(ids + new, len(ids)) for ids, new in zip(prompts, own.written, strict=True)]


if __name__ == "__main__":
    main()
