r"""Every way of leaving early at equal risk: what does each save, counted, predicted and timed?

    python experiments/policies.py MODEL --prompts all_730.jsonl --alpha 0.1 0.3 \
        --out results/policies.json

MODEL is a tuned folder, or "default". It answers the prompts greedily; one pass over that text is
the trace. On every second text each policy is fitted and its cheapest operating point is taken
whose risk (tokens that are not the full model's choice) is at most alpha there; the other texts
judge. No certificate is asked for, so that policies are compared and not bounds. Then all are run
on held-out prompts in turns, on the fast backbone: operations with every check, and seconds,
against full depth in the same round. The oracle and its null peek, and cannot be run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from command import command
from policies_points import Found, Judge, found_by_text, found_by_token
from tqdm import tqdm

import offramp
from offramp.allocate.score import features_of
from offramp.bench.figures import spread
from offramp.checks import parse_check, parse_head
from offramp.cli.output import environment, finish
from offramp.cli.tracing import Texts, own_answers
from offramp.cost import flops, full_depth
from offramp.plan import Plan, cheap_weights, execute
from offramp.request import Request
from offramp.runs import Full
from offramp.text import read_prompts
from offramp.timing import constants


def main() -> None:
    """Trace, choose, judge, run in turns, print a line per policy, and write the record."""
    options = _options()
    model = offramp.load(None if options.model == "default" else options.model, weights="int8")
    exits = tuple(options.exits or (model.card.exits if model.card else ()))
    prompts = list(read_prompts(options.prompts))
    prompts = random.Random(options.seed).sample(prompts, min(options.limit, len(prompts)))
    texts = own_answers(
        model, prompts, raw=options.raw, max_new_tokens=options.max_new_tokens, batch_size=16
    )
    texts = [(ids, first) for ids, first in texts if len(ids) - first >= 2]
    look = max(exits[0] // 2, 1)
    judge = Judge(
        model=model,
        check=parse_check(options.check),
        head=parse_head(options.head),
        trace=_trace(model, texts, exits, options),
        texts=texts,
        features=features_of(model.backbone, [ids[:first] for ids, first in texts], (look,)),
        look=look,
        constants=constants(model.backbone),
        alpha=options.alpha[0],
        folder=options.out.with_suffix(".parts"),
    )
    found: dict[tuple[float, str], Found] = {}
    for alpha in options.alpha:
        asked = replace(judge, alpha=alpha, folder=judge.folder / f"{alpha:g}")
        asked.folder.mkdir(parents=True, exist_ok=True)
        for one in _all_found(asked):
            print(alpha, one.facts(), flush=True)
            found[alpha, one.name] = one
    timed = _timed(model, found, judge.held_out_prompts(options.timed), options)
    rows = [{"alpha": key[0], **one.facts(), **timed.get(key, {})} for key, one in found.items()]
    record = {
        "command": command(),
        "model": Path(model.name).name,
        "card": None if model.card is None else model.card.recipe.model_dump(mode="json"),
        "weights": "int8",
        "check": options.check,
        "head": options.head,
        "exits": exits,
        "seed": options.seed,
        "texts": len(texts),
        "tokens": sum(judge.trace.rows),
        "agreement": dict(zip(exits, judge.trace.agrees.float().mean(0).tolist(), strict=True)),
        "rounds": options.rounds,
        **environment(),
        "rows": rows,
    }
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='folder, hub id or "default"')
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1], help="risks, a table each")
    parser.add_argument("--exits", type=int, nargs="+", help="the model's own by default")
    parser.add_argument("--check", default="shortlist:4096", help="what exits look through")
    parser.add_argument("--head", default="full", help="what chooses the tokens that leave")
    parser.add_argument("--limit", type=int, default=240, help="prompts, drawn by the seed")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--timed", type=int, default=8, help="held-out prompts to run in turns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _trace(
    model: offramp.Model, texts: Texts, exits: tuple[int, ...], options: argparse.Namespace
) -> offramp.Trace:
    bar = tqdm(texts, desc="trace", unit="text")
    return offramp.record(
        model.backbone,
        bar,
        exits,
        keep_hidden=True,
        check=parse_check(options.check),
        head=parse_head(options.head),
        ends=model.eos,
    )


def _all_found(judge: Judge) -> Iterator[Found]:
    yield from found_by_token(judge)
    yield from found_by_text(judge)


def _timed(
    model: offramp.Model,
    found: dict[tuple[float, str], Found],
    ids: list[list[int]],
    options: argparse.Namespace,
) -> dict[tuple[float, str], dict[str, Any]]:
    """Run every policy and full depth in turns; return what each took of full depth."""
    backbone, shape, whole = model.backbone, model.backbone.shape, (0.0, "full")
    plans = {key: Plan(run=one.run) for key, one in found.items() if one.run is not None}
    plans[whole] = Plan(run=Full())
    ratios: dict[tuple[float, str], list[float]] = {name: [] for name in plans}
    known: dict[tuple[float, str], dict[str, Any]] = {}
    for turn in range(options.rounds):
        order = list(plans)
        random.Random(turn).shuffle(order)
        took: dict[tuple[float, str], float] = {}
        for name in order:
            requests = [Request(list(one), options.max_new_tokens, eos=model.eos) for one in ids]
            before, start = backbone.meter.copy(), time.perf_counter()
            tokens = list(execute(backbone, requests, plans[name].run, batch_size=1))
            seconds, work = time.perf_counter() - start, backbone.meter - before
            took[name] = seconds / len(tokens)  # a policy may end sooner or later
            sizes = [
                (len(one), sum(token.index == i for token in tokens)) for i, one in enumerate(ids)
            ]
            plain = full_depth(sizes, shape, 1, batched=backbone.batched, ragged=backbone.ragged)
            known[name] = {
                "flops_ratio": flops(work, shape, cheap_weights(plans[name], shape))
                / flops(plain, shape),
                "own_mean_depth": sum(token.depth for token in tokens) / len(tokens),
            }
        for name, seconds in took.items():
            ratios[name].append(seconds / took[whole])
        print(f"round {turn + 1}: {took}", flush=True)
    for name, values in ratios.items():
        middle, (low, high) = spread(values)
        known[name] |= {"time_ratio": middle, "time_ratio_quartiles": [low, high]}
    return known


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
