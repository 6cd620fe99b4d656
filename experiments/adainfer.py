"""AdaInfer on the default model or a tuned one: what it saves, with and without what looks cost.

    python experiments/adainfer.py --data data --out results/adainfer.json
    python experiments/adainfer.py runs/sorted --exits 12,18,24 --weights int8 --data data --out F

Few-shot answers of one token. Half of each task's items are fitted to, half judged: classifiers of
the task itself ("task"), of all other tasks ("cross") and of all ("all"), by the full head and by a
short list of tokens. Costs are counted operations of the whole prompt against full depth.

Traces are kept in a folder beside the results (.answers): a second run goes on there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adainfer_figures import comparison
from adainfer_tasks import TASKS, items
from command import command
from kept import traced
from narrow_arms import shown
from papers import shown_rows
from torch import Tensor

import offramp
from offramp.adainfer.fit import fit_classifier
from offramp.adainfer.judge import policy_of
from offramp.adainfer.labels import joined
from offramp.backbone import Backbone
from offramp.checks import FULL_HEAD, Check, Shortlist
from offramp.classifier import Classifier, Kind
from offramp.cli.options import parse_depths
from offramp.cli.output import environment, finish
from offramp.cost import flops
from offramp.meter import Meter
from offramp.plan import execute
from offramp.probe import Probe
from offramp.request import Request
from offramp.signals import score
from offramp.trace import Trace, replay

CHECKS: tuple[Check, ...] = (FULL_HEAD, Shortlist(size=4096))
Fit = Callable[[Trace], Classifier]
KINDS: tuple[Kind, ...] = ("svm", "logistic", "crf", "rule")
VARIANTS: dict[str, Fit] = {
    "every 3rd exit": fit_classifier,
    "a classifier per exit": partial(fit_classifier, pooled=False),
    "label gold": partial(fit_classifier, label="gold"),
    "label stable": partial(fit_classifier, label="stable"),
    "features and depth": partial(
        fit_classifier, features=("margin", "max_prob", "entropy", "depth")
    ),
    "crf, a classifier per exit": partial(fit_classifier, kind="crf", pooled=False),
}
SIGNALS = ("margin", "max_prob", "entropy")
DEVIATIONS = (
    "the model and its size: the paper's are Llama-2 7B and 13B, and OPT",
    "few items of eight tasks, half of them fitted to and half judged; no SQuAD; which rules the "
    "paper asks, and behind how many demonstrations, is not known to us: here four, or two",
    "right means the last layer's choice, the classifiers are linear: the paper's label, kernel "
    "and C are not known to us",
    "a tuned model is asked at its exits only, an untuned one at every layer, as in the paper",
)
TRACED = 10
"""Items of which a trace is kept at once."""


def main() -> None:
    """Trace every task once, then fit and judge on the traces; write the record."""
    options = _parser().parse_args()
    model = offramp.load(options.model, weights=options.weights)
    every = range(1, model.backbone.shape.num_layers)
    exits = parse_depths(options.exits) or tuple(every)
    folder = options.out.with_suffix(".answers")
    traces = {}
    for name in TASKS:
        start = time.perf_counter()
        texts = _texts(model, name, options)
        seen = traced(model.backbone, texts, exits, TRACED, folder, keep_hidden=True)
        traces[name] = {str(check): _through(seen, model.backbone, check) for check in CHECKS}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = list(_rows(traces, model.backbone))
    rows += list(_variants(traces, model.backbone))
    result = {
        "command": command(),
        "model": shown(model.name),
        "limit": options.limit,
        "deviations": DEVIATIONS,
        "seed": options.seed,
        **environment(),
        "tasks": {name: _facts(seen["full"]) for name, seen in traces.items()},
        "rows": rows,
        "means": _means(rows),
        "measured": list(_measured(model, traces)),
    }
    result["comparison"] = comparison(result)
    print(shown_rows(result["comparison"]))
    finish(result, as_json=False, out=options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="the default model, untuned, by default")
    parser.add_argument("--exits", help="depths with commas; every layer by default")
    # Of the default model, whose own weights are Q4_1, int4 layers are the very same numbers.
    parser.add_argument("--weights", default="int4", choices=("int4", "int8", "fp32"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="items per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _texts(
    model: offramp.Model, name: str, options: argparse.Namespace
) -> list[tuple[list[int], int]]:
    """Return prompt and first answer token of each item, the last one counted alone."""
    texts = []
    for item in items(name, options.data, options.limit, options.seed):
        ids = model.tokenizer.encode(item.prompt)
        gold = model.tokenizer.encode(item.references[0])[0]
        texts.append(([*ids, gold], len(ids)))
    return texts


def _through(trace: Trace, backbone: Backbone, check: Check) -> Trace:
    """Return the trace with the scores that a check sees, and without hidden states."""
    assert trace.hidden is not None
    look, scores = check.look(backbone), []
    for k, depth in enumerate(trace.exits):
        hidden = trace.hidden[:, k]
        probe = Probe(depth, trace.num_layers, hidden, backbone.readout, look=look)
        scores.append({name: score(probe, name).float() for name in SIGNALS})
    columns = {name: torch.stack([one[name] for one in scores], 1) for name in SIGNALS}
    return replace(trace, scores=columns, hidden=None, check=str(check))


def _halves(trace: Trace) -> tuple[Trace, Trace]:
    count = len(trace.lengths)
    return trace.part(range(0, count, 2)), trace.part(range(1, count, 2))


@dataclass(frozen=True)
class Scope:
    """What a classifier is fitted to, and what it is judged on."""

    name: str
    task: str
    train: Trace
    test: Trace


def _scopes(traces: dict[str, dict[str, Trace]], check: str) -> Iterator[Scope]:
    halves = {name: _halves(seen[check]) for name, seen in traces.items()}
    everything = joined([train for train, _ in halves.values()])
    for task, (train, test) in halves.items():
        others = joined([half for name, (half, _) in halves.items() if name != task])
        yield Scope("task", task, train, test)
        yield Scope("cross", task, others, test)
        yield Scope("all", task, everything, test)


def _rows(traces: dict[str, dict[str, Trace]], backbone: Backbone) -> Iterator[dict[str, Any]]:
    for check in CHECKS:
        for scope in _scopes(traces, str(check)):
            for kind in KINDS:
                fitted = _fitted(scope.train, partial(fit_classifier, kind=kind))
                yield _row(f"{kind}", fitted, scope, check, backbone)


def _variants(traces: dict[str, dict[str, Trace]], backbone: Backbone) -> Iterator[dict[str, Any]]:
    """Other labels, features and weights, and fewer exits, of the classifiers of all tasks."""
    for scope in _scopes(traces, "full"):
        if scope.name != "all":
            continue
        for name, fit in VARIANTS.items():
            few = name == "every 3rd exit"
            own = (
                replace(scope, train=_every_third(scope.train), test=_every_third(scope.test))
                if few
                else scope
            )
            yield _row(name, _fitted(own.train, fit), own, FULL_HEAD, backbone)


def _every_third(trace: Trace) -> Trace:
    kept = [k for k, depth in enumerate(trace.exits) if depth % 3 == 0]
    return replace(
        trace,
        exits=tuple(trace.exits[k] for k in kept),
        chosen=trace.chosen[:, [*kept, -1]],
        loss=trace.loss[:, [*kept, -1]],
        scores={name: values[:, kept] for name, values in trace.scores.items()},
    )


def _fitted(trace: Trace, fit: Fit) -> Classifier | str:
    """Return the classifier, or why there is none: a task whose exits are all right, or none."""
    try:
        return fit(trace)
    except offramp.UsageError as error:
        return str(error)


def _row(
    name: str, fitted: Classifier | str, scope: Scope, check: Check, backbone: Backbone
) -> dict[str, Any]:
    """Return the figures of one classifier on one task's held-out half."""
    facts = {"kind": name, "scope": scope.name, "task": scope.task, "check": str(check)}
    if isinstance(fitted, str):
        return facts | {"refused": fitted}
    test = scope.test
    done = replay(test, policy_of(fitted), exit_prompt=True)
    gold, last = test.targets, test.chosen[:, -1]
    return facts | {
        "accuracy": _share(done.chosen == gold),
        "full_accuracy": _share(last == gold),
        "agreement": _share(done.chosen == last),
        "mean_depth": done.depths.double().mean().item(),
        "layers_saved": 1 - done.depths.double().mean().item() / test.num_layers,
        **_costs(test, done.depths.tolist(), check, backbone),
    }


def _share(rows: Tensor) -> float:
    return rows.double().mean().item()


def _costs(
    trace: Trace, depths: Sequence[int], check: Check, backbone: Backbone
) -> dict[str, float]:
    """Return operations against full depth: of the prompt, and of one more token behind it."""
    shape = backbone.shape
    full, layers, looking = Meter(), Meter(), Meter()
    full_token, token = Meter(), Meter()
    for length, depth in zip(trace.lengths, depths, strict=True):
        prompt = [range(length - 1)]  # the last token of the text is the answer
        newest = [range(length - 2, length - 1)]
        for work, run, spans in (
            (full, trace.num_layers, prompt),
            (layers, depth, prompt),
            (looking, depth, prompt),
            (full_token, trace.num_layers, newest),
            (token, depth, newest),
        ):
            work.ran(run, spans)
        for work in (full, layers, full_token):
            work.read(1)
        token.filled(trace.num_layers - depth, 1)
        for work in (looking, token):
            look(work, trace, depth, check)
    weights = check.weights(shape)
    base, base_token = flops(full, shape), flops(full_token, shape)
    return {
        "flops_ratio": flops(looking, shape, weights) / base,
        "flops_ratio_without_checks": flops(layers, shape) / base,
        "decode_flops_ratio": flops(token, shape, weights) / base_token,
    }


def look(work: Meter, trace: Trace, depth: int, check: Check) -> None:
    """Count what asking at every exit down to ``depth`` reads, and the token's own readout."""
    asked = sum(stop <= depth for stop in trace.exits)
    if check == FULL_HEAD:
        for _ in range(asked + (depth == trace.num_layers)):
            work.read(1)
        return
    for _ in range(asked):
        work.checked(1)
    work.read(1)


def _facts(trace: Trace) -> dict[str, Any]:
    return {
        "texts": len(trace.lengths),
        "prompt_tokens": sum(trace.lengths) - len(trace.lengths),
        "full_accuracy": _share(trace.chosen[:, -1] == trace.targets),
        "agreement": {
            str(depth): _share(trace.agrees[:, k]) for k, depth in enumerate(trace.exits)
        },
    }


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of each classifier averaged over the tasks it could be fitted for."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "refused" not in row:
            found.setdefault((row["kind"], row["scope"], row["check"]), []).append(row)
    figures = [name for name, value in rows[0].items() if isinstance(value, float)]
    return [
        {"kind": kind, "scope": scope, "check": check, "tasks": len(group)}
        | {name: sum(row[name] for row in group) / len(group) for name in figures}
        for (kind, scope, check), group in found.items()
    ]


def _measured(
    model: offramp.Model, traces: dict[str, dict[str, Trace]]
) -> Iterator[dict[str, Any]]:
    """Run the real loop on each task's held-out half: the replay's depths, and seconds."""
    backbone = model.backbone
    full: dict[str, tuple[float, list[int], Meter]] = {}
    for check in CHECKS:
        for scope in _scopes(traces, str(check)):
            if scope.name != "all":
                continue
            fitted = fit_classifier(scope.train)
            replayed = replay(scope.test, policy_of(fitted), exit_prompt=True).depths.tolist()
            ids = [text.tolist()[:-1] for text in scope.test.ids.split(list(scope.test.lengths))]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "classifier.safetensors"
                fitted.save(file)
                run = offramp.Exit(
                    signal="classifier",
                    thresholds=dict.fromkeys(fitted.facts.exits, 0.0),
                    classifier=str(file),
                    check=check,
                    exit_prompt=True,
                )
                seconds, depths, work = _timed(backbone, ids, run)
            if scope.task not in full:
                full[scope.task] = _timed(backbone, ids, offramp.Full())
            base, _, plain = full[scope.task]
            yield {
                "check": str(check),
                "task": scope.task,
                "same_depths": _share(torch.tensor(depths) == torch.tensor(replayed)),
                "flops_ratio": flops(work, backbone.shape, check.weights(backbone.shape))
                / flops(plain, backbone.shape),
                "seconds_ratio": seconds / base,
            }


def _timed(
    backbone: Backbone, ids: Sequence[list[int]], run: offramp.Exit | offramp.Full
) -> tuple[float, list[int], Meter]:
    """Return seconds, depths and work of one new token behind each prompt, one by one."""
    before, start = backbone.meter.copy(), time.perf_counter()
    requests = [Request(list(prompt), 1) for prompt in ids]
    depths = [token.depth for token in execute(backbone, requests, run, batch_size=1)]
    return time.perf_counter() - start, depths, backbone.meter - before


if __name__ == "__main__":
    main()
