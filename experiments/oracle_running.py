r"""What could a depth per text save, by what each depth writes: the paper's own construction.

    python experiments/oracle_running.py MODEL --data held_out.jsonl --depths 12 18 24 \
        --out results/oracle_running.json

MODEL is a tuned folder, or "default"; DATA holds prompts with answers, several of one prompt being
its references. Every depth answers every prompt; an answer's score is its best ROUGE-L. Once
greedily, and once drawn at --temperature, where the full model is let draw as many times as there
are depths, with other seeds: what an oracle gains on those is luck, for no depth is in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from command import command
from narrow_arms import shown
from papers import shown_rows
from selection_figures import of_oracle as comparison
from tqdm import tqdm

import offramp
from offramp.allocate.report import default_budgets, report
from offramp.allocate.score import by_running, features_of
from offramp.allocate.table import must_be_enough
from offramp.cli.output import environment, finish
from offramp.cli.scoring import as_record, check_depths, fitted_router
from offramp.evaluate.overlap import rouge_l
from offramp.paths import prefix
from offramp.runs import Full
from offramp.runs import Path as SubModel
from offramp.sample import Sampling
from offramp.text import Prompt, encode
from offramp.tune.rows import read_rows

BATCH = 16
DEVIATIONS = (
    "the model: the paper's is OPT-IML 1.3B",
    "depths are the first layers of one model, tuned for them all at once; the paper's are evenly "
    "spread layers, each number a checkpoint tuned for it",
    "the shallowest depth offered is the first of --depths, the paper's 4 of 24 layers",
    "--limit prompts, the paper's are 7,801 of Alpaca",
)


def main() -> None:
    """Let every depth answer, greedily and by chance; print what comes of it, write the record."""
    options = _options()
    model = offramp.load(
        None if options.model == "default" else options.model, weights=options.weights
    )
    depths = tuple(sorted(set(options.depths)))
    check_depths(model, depths, (options.look,))
    asked = _asked(options.data, options.limit)
    must_be_enough(len(asked))
    arms = [_arm(model, asked, depths, sampling, options) for sampling in _samplings(options)]
    record = {
        "command": command(),
        "model": shown(model.name),
        "plan": None,
        "seed": options.seed,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        **environment(),
        "deviations": DEVIATIONS,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "arms": arms,
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='folder, hub id or "default"')
    parser.add_argument(
        "--data", type=Path, required=True, help="prompts with answers (JSON lines)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", required=True)
    parser.add_argument("--look", type=int, default=6, help="where a router looks at the prompt")
    parser.add_argument("--weights", default="int8", choices=("fp32", "bf16", "int8", "int4"))
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--limit", type=int, default=200, help="20 or more; 50 for a router")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _asked(data: Path, limit: int) -> list[tuple[Prompt, list[str]]]:
    """Return prompts, each once, with their references."""
    found: dict[str, tuple[Prompt, list[str]]] = {}
    for row in read_rows([str(data)]).rows:
        found.setdefault(repr(row.prompt), (row.prompt, []))[1].append(row.answer or "")
    return list(found.values())[:limit]


def _samplings(options: argparse.Namespace) -> tuple[Sampling | None, Sampling]:
    return None, Sampling(temperature=options.temperature, seed=options.seed)


def _arm(
    model: offramp.Model,
    asked: list[tuple[Prompt, list[str]]],
    depths: tuple[int, ...],
    sampling: Sampling | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return what the oracle, its null and a router make of one way of choosing tokens."""
    prompts, last = [prompt for prompt, _ in asked], model.backbone.shape.num_layers
    name = "greedy" if sampling is None else f"drawn at {options.temperature:g}"
    ways: list[Full | offramp.Exit | SubModel] = [
        *(SubModel(layers=prefix(depth, last)) for depth in depths),
        Full(),
    ]
    answers = len(asked) * len(ways) * (1 if sampling is None else 2)  # the null's among them
    with tqdm(total=answers, desc=name, unit="answer") as bar:

        def judge(i: int, output: offramp.Output) -> float:
            bar.update()
            return rouge_l(output.text, asked[i][1])

        table = by_running(
            model,
            prompts,
            ways,
            judge,
            name="rouge_l",
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            raw=options.raw,
            batch_size=BATCH,
        )
    ids = [encode(model.tokenizer, prompt, raw=options.raw) for prompt in prompts]
    looks = (options.look,)
    table = table.with_features(features_of(model.backbone, ids, looks), looks)
    router, predicted = fitted_router(table, seed=options.seed, needed=False)
    done = report(table, default_budgets(table.costs), predicted, seed=options.seed)
    print(name, f"full {done.full:.4f}, oracle equals it at {done.smallest:.2f}", done.constant)
    return {"text": name, **as_record(table, done, router)}


if __name__ == "__main__":
    main()
