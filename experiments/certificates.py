r"""Do certificates hold on a real trace? Counts violations for every risk and bound.

    PYTHONPATH=. python experiments/certificates.py smol --prompts all_730.jsonl \
        --trace smol.safetensors --out results/certificates.json
    PYTHONPATH=. python experiments/certificates.py stories --trace stories.safetensors \
        --out results/certificates_stories.json
    python experiments/certificates.py labels --model runs/ag --prompts test.jsonl \
        --trace labels.safetensors --out results/certificates_labels.json

The model writes greedily, and one pass over that text is the trace: the default model with the exit
that is shipped, on the 512 shortest prompts, or the 260K-parameter story model on 640 first
sentences. Or the text is given: rows of a prompt and its label (of experiments/narrow_data.py),
read by a model tuned for them, whose prompts may leave; there *error* is a wrong label. TRACE is
where it is kept (with what it took, as JSON beside it); a second run begins with it. Then:

* the 200 draws of ``offramp calibrate --verify``, for every risk and bound;
* the same with broken bounds: the mean taken at its word, or less its standard error, and
  Hoeffding-Bentkus as if the tokens of a sequence were independent;
* what calibration takes, replaying all settings, against the pass that made the trace;
* drift: what the certified policy's own text loses, on the held-out prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command
from narrow_data import read_rows
from tqdm import tqdm

import offramp
from offramp.calibrate.bounds import BOUNDS, Floats, PValue, hoeffding_bentkus
from offramp.calibrate.certify import CONFORMAL, CannotCertifyError, Goal
from offramp.calibrate.drift import measure, prompts_of, write
from offramp.calibrate.replays import Replays
from offramp.calibrate.risks import RISKS
from offramp.calibrate.run import (
    Calibration,
    Way,
    calibrate,
    candidates,
    replay_settings,
)
from offramp.calibrate.settings import Price, pricing
from offramp.calibrate.texts import counted
from offramp.calibrate.verify import verify
from offramp.checks import Shortlist, Tokens
from offramp.cli.output import environment, finish
from offramp.cli.tracing import Texts, traced
from offramp.fast.open import open_fast
from offramp.files import write_text
from offramp.hf.open import open_model
from offramp.runs import Exit
from offramp.text import encode, read_prompts
from offramp.trace import Trace, load_trace

DELTA = 0.1
_TOKENS = 16


@dataclass(frozen=True)
class Subject:
    """A model, its texts, how tokens may leave, and the alphas that are certified."""

    model: offramp.Model
    prompts: list[list[int]]
    way: Way
    alphas: dict[str, float]
    labels: list[int] | None = None
    """The right token after each prompt, where the model is not to write its own."""


def smol(args: argparse.Namespace) -> Subject:
    """Return the default model with the shipped exit, and two that were taught nothing."""
    model = offramp.load("default-exits", backbone="fast", weights="int8")
    prompts = sorted(read_prompts(args.prompts), key=lambda prompt: len(str(prompt)))[:512]
    return Subject(
        model,
        [encode(model.tokenizer, prompt) for prompt in prompts],
        Way((24, 27, 28), check=Shortlist(size=4096), head=Shortlist(size=4096)),
        {"disagreement": 0.1, "divergence": 0.4, "loss": 0.2, "error": 0.4},
    )


def stories(args: argparse.Namespace) -> Subject:
    """Return the story model on first sentences, all different."""
    from tests.stories import load_stories

    network, tokenizer = load_stories()
    model = offramp.Model(open_fast(open_model(network)), tokenizer, "stories260K", frozenset({1}))
    words = (
        ("Once upon a time,", "One day,", "In the park,", "Last night,"),
        ("a little", "a big", "an old", "a happy", "a sad", "a red", "a shy", "a brave"),
        ("girl", "boy", "dog", "cat", "bird", "bear", "frog", "tree", "car", "fish"),
        ("saw", "was"),
    )
    sentences = [" ".join(parts) for parts in itertools.product(*words)]
    return Subject(
        model,
        [tokenizer.encode(sentence) for sentence in sentences],
        Way((2, 3, 4)),
        {"disagreement": 0.1, "divergence": 0.4, "loss": 0.2, "error": 0.4},
    )


def labels(args: argparse.Namespace) -> Subject:
    """Return a tuned model on rows of a prompt and a label, all of whose tokens may leave."""
    model = offramp.load(args.model, backbone="fast", weights="int8")
    assert model.card is not None, "a model tuned with offramp has exits"
    rows = read_rows(args.prompts)
    right = [encode(model.tokenizer, row["completion"], raw=True)[0] for row in rows]
    among = Tokens(tokens=tuple(sorted(set(right))))
    last = model.backbone.shape.num_layers
    return Subject(
        model,
        [encode(model.tokenizer, row["prompt"], raw=True) for row in rows],
        Way((*model.card.exits, last), check=among, head=among, exit_prompt=True),
        {"disagreement": 0.05, "error": 0.1},
        right,
    )


def plug_in(losses: Floats, alpha: float) -> Floats:
    """Broken: takes the mean of the sample for the risk."""
    p: Floats = (losses.mean(-1) > alpha).astype(float)
    return p


def tokens_apart(losses: Floats, alpha: float) -> Floats:
    """Broken: counts every token of a sequence as if it were drawn by itself."""
    return hoeffding_bentkus(np.repeat(losses, _TOKENS, -1), alpha)


def too_kind(losses: Floats, alpha: float) -> Floats:
    """Broken: takes the mean of the sample less its standard error for the risk."""
    error = losses.std(-1) / losses.shape[-1] ** 0.5
    p: Floats = (losses.mean(-1) - error > alpha).astype(float)
    return p


SUBJECTS = {"smol": smol, "stories": stories, "labels": labels}
BROKEN = {
    "mean at its word": plug_in,
    "mean less its error": too_kind,
    "tokens as if independent": tokens_apart,
}


def recorded(subject: Subject, path: Path) -> tuple[Trace, Any]:
    """Return the trace and what it took; made once, and kept."""
    kept = path.with_suffix(".json")
    if not path.is_file():
        start = time.perf_counter()
        texts = written(subject)
        middle = time.perf_counter()
        way = subject.way
        traced(subject.model, texts, way.exits, check=way.check, head=way.head).save(path)
        end = time.perf_counter()
        took = {"answers_seconds": middle - start, "pass_seconds": end - middle}
        write_text(kept, json.dumps(took) + "\n")
    return counted(load_trace(path)), json.loads(kept.read_text(encoding="utf-8"))


def written(subject: Subject) -> Texts:
    """Return each prompt and what follows it, its label or the model's own answer."""
    if subject.labels is not None:
        pairs = zip(subject.prompts, subject.labels, strict=True)
        return [([*ids, label], len(ids)) for ids, label in pairs]
    asked = [(ids, _TOKENS) for ids in subject.prompts]
    full = Exit(signal="max_prob", thresholds={})
    return write(subject.model.backbone, asked, full, eos=subject.model.eos, batch_size=16)


def wrong(trace: Trace) -> dict[str, float]:
    """Return the share of given tokens that each depth does not choose, the last layer's last."""
    shares = (trace.chosen != trace.targets[:, None]).float().mean(0).tolist()
    names = [*(f"exit {depth}" for depth in trace.exits), "last layer"]
    return dict(zip(names, shares, strict=True))


def rows(
    replays: Replays, alphas: dict[str, float], price: Price, repeats: int, *, given: bool
) -> list[dict[str, Any]]:
    """Return a row for each risk and bound; the broken bounds last."""
    tries: list[tuple[str, Goal, PValue | None]] = [
        (method, Goal(risk, alpha, DELTA, method), None)
        for risk, alpha in alphas.items()
        for method in (*BOUNDS, CONFORMAL)
        if method != "binomial" or RISKS[risk].binary
    ]
    tries += [
        (name, Goal(risk, alpha, DELTA), bound)
        for risk, alpha in alphas.items()
        for name, bound in BROKEN.items()
        if given or risk != "error"  # on the model's own text that is divergence
    ]
    bar = tqdm(range(repeats), desc="verify")
    asked = [(goal, bound) for _, goal, bound in tries]
    done = verify(replays, asked, price, repeats=repeats, progress=bar)
    return [
        {
            "risk": goal.risk,
            "alpha": goal.alpha,
            "delta": None if goal.method == CONFORMAL else goal.delta,
            "bound": name,
            "broken": bound is not None,
            **dataclasses.asdict(one),
            "holds": one.holds,
        }
        for (name, goal, bound), one in zip(tries, done, strict=True)
    ]


def certified(trace: Trace, way: Way, price: Price) -> tuple[Calibration | None, dict[str, Any]]:
    """Return one calibration as the command line does it, and how long it took."""
    start = time.perf_counter()
    try:
        found = calibrate(trace, way, Goal("disagreement", 0.1, DELTA), price)
    except CannotCertifyError as error:
        return None, {"said": str(error), "seconds": time.perf_counter() - start}
    return found, {
        "seconds": time.perf_counter() - start,
        "settings": found.tried,
        "thresholds": {str(depth): value for depth, value in found.run.thresholds.items()},
        "tested": len(found.parts.test),
        **dataclasses.asdict(found.found),
        "held_out": found.held_out.model_dump(),
    }


def drifted(subject: Subject, trace: Trace, found: Calibration | None) -> dict[str, Any] | None:
    """Return what the certified policy's own text loses, beside the full model's text."""
    if found is None or subject.labels is not None:
        return None
    held = found.parts.held_out
    full = found.replays.losses[found.goal.risk][found.found.setting][held]
    made = measure(
        subject.model.backbone,
        prompts_of(trace, held.tolist()),
        full,
        found.run,
        found.goal.risk,
        eos=subject.model.eos,
    )
    return {**made.model_dump(), "gap": made.gap}


def main() -> None:
    """Record, or read; verify; write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=list(SUBJECTS))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--model", help="of labels: a folder tuned for them")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    subject = SUBJECTS[args.subject](args)
    model, way = subject.model, subject.way
    trace, took = recorded(subject, args.trace)
    price = pricing(model.backbone.shape, way.check, trace, None, way.head)
    found, one = certified(trace, way, price)
    worth = [candidates(trace, way, risk, price)[1] for risk in subject.alphas]
    replays = replay_settings(trace, way, torch.cat(worth).unique(dim=0))
    agreement = trace.agrees.float().mean(0).tolist()
    record = {
        "model": model.name,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights,
        **environment(),
        "command": command(),
        "sequences": len(trace.rows),
        "tokens": len(trace.chosen),
        "exits": way.exits,
        "check": str(way.check),
        "head": str(way.head),
        "agreement": dict(zip(map(str, trace.exits), agreement, strict=True)),
        "wrong": None if subject.labels is None else wrong(trace),
        **took,
        "calibration": one,
        "share_of_pass": one["seconds"] / took["pass_seconds"],
        "drift": drifted(subject, trace, found),
        "rows": rows(
            replays, subject.alphas, price, args.repeats, given=subject.labels is not None
        ),
    }
    finish(record, as_json=False, out=args.out)


if __name__ == "__main__":
    main()
