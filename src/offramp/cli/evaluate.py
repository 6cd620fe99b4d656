"""``offramp evaluate``: what a plan does to answers and what it saves, beside full depth."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import options as o
from offramp.errors import OfframpError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.evaluate.judge import Preference
    from offramp.evaluate.run import Judged
    from offramp.evaluate.scores import Likeness, Row
    from offramp.evaluate.tasks import Task


def evaluate(
    model: o.ModelName = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="T,...",
            help="By name (an unknown one lists all there are), or .jsonl files of your own.",
        ),
    ] = "",
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the tasks' data sets are.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most items of each task.")] = 100,
    max_new_tokens: o.MaxNewTokens = 128,
    plan: o.PlanFile = None,
    draft: o.DraftDepth = None,
    adapt: o.DraftDepths = None,
    draft_tokens: o.DraftTokens = 4,
    draft_confidence: o.DraftConfidence = 0.0,
    exit_depth: o.ExitDepth = None,
    head: o.HeadText = None,
    threshold: o.ThresholdText = None,
    check: o.CheckText = None,
    classifier: o.ClassifierFile = None,
    exit_prompt: o.ExitPrompt = False,
    skip: o.SkipFile = None,
    kv: o.KeyValues = o.KV.exact,
    similarity: Annotated[
        bool,
        typer.Option(
            "--similarity",
            help="Judge likeness in meaning to the full model's answer (the extra similarity).",
        ),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask an OpenAI-compatible endpoint which of both answers is better, in both "
            "orders (the extra judge; needs --out).",
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="Of the judge.")] = "judge",
    judge_key: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Environment variable that holds the judge's key."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the items and the bootstrap's resamples.")] = 0,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: o.Out = None,
) -> None:
    """Compare a plan with the same model at full depth: scores, what is saved, and time.

    Both answer the same items greedily, batch by batch in turns. Every score stands beside full
    depth's, with 95% bootstrap intervals and the paired difference. Operations count every exit
    check and every fill. With --out the answers are kept beside the result: killed at any moment,
    the same command goes on.

    [bold]offramp evaluate my-model --plan plan.json --tasks sst2,vicuna --data data[/bold]
    """
    from offramp.evaluate.run import Settings, compare
    from offramp.evaluate.tasks import find_tasks

    chosen = o.parse_plan(
        plan,
        draft=draft,
        adapt=adapt,
        draft_tokens=draft_tokens,
        draft_confidence=draft_confidence,
        exit_depth=exit_depth,
        head=head,
        threshold=threshold,
        check=check,
        classifier=classifier,
        exit_prompt=exit_prompt,
        skip=skip,
        kv=kv,
    )
    if plan is None and chosen.run.kind == "full":
        raise UsageError(
            "name what to compare with full depth, e.g. --plan FILE, --exit DEPTH or --threshold "
            "max_prob=DEPTH:VALUE"
        )
    wanted = find_tasks(tasks.split(",") if tasks else [])
    asked = [(task, task.items(data, seed)) for task in wanted]
    likeness = _likeness(wanted, similarity)
    prefers = None if judge is None else _preference(judge, judge_model, judge_key, out)
    from rich.console import Console

    from offramp import load
    from offramp.cli.output import environment, finish

    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    settings = Settings(limit, seed, max_new_tokens, batch_size, raw)
    kept = None if out is None else out.with_suffix(".answers.jsonl")
    judged = compare(loaded, chosen, asked, settings, kept=kept, likeness=likeness, judge=prefers)
    if not json:
        _show(judged, loaded.backbone.shape.num_layers, Console(highlight=False))
    record = {
        "verb": "evaluate",
        "model": loaded.name,
        "num_layers": loaded.backbone.shape.num_layers,
        "plan": chosen.model_dump(mode="json"),
        **vars(settings),
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        "tasks": [one.as_dict() for one in judged],
        "judge": None
        if prefers is None
        else {"model": judge_model, "failed": prefers.failed, "retried": prefers.retried},
    }
    if prefers is not None and prefers.failed:
        print(
            f"offramp: the judge gave no verdict on {prefers.failed} pairs, which are left out; "
            "the same command asks again",
            file=sys.stderr,
        )
    finish(record, as_json=json, out=out)


def _preference(url: str, name: str, key: str | None, out: Path | None) -> Preference:
    """Return what asks the judge, and keeps what it said beside the result."""
    if find_spec("httpx2") is None:
        raise OfframpError("--judge speaks HTTP by httpx2: pip install 'offramp[judge]'")
    if out is None:
        raise UsageError("--judge keeps what the judge said beside the result: name it with --out")
    from offramp.evaluate.endpoint import Endpoint
    from offramp.evaluate.judge import Preference

    endpoint = Endpoint(url, name, key)
    endpoint.client().close()  # misses a key now, and not behind all answers
    return Preference(endpoint, out.with_suffix(".verdicts.jsonl"))


def _likeness(tasks: Sequence[Task], similarity: bool) -> Likeness | None:
    """Refuse what cannot be scored before a model loads; return what judges likeness."""
    from offramp.evaluate.overlap import must_have_chrf
    from offramp.evaluate.similarity import open_embedder, similarities

    if any(task.kind == "answer" for task in tasks):
        must_have_chrf()
    return partial(similarities, open_embedder()) if similarity else None


def _show(judged: Sequence[Judged], depth: int, console: Console) -> None:
    from offramp.cli.output import table

    head = ("score", "against", "plan", "full depth", "difference", "verdict")
    for one in judged:
        left = f", {one.left_out} too long" if one.left_out else ""
        table(f"{one.task}: {one.items} items{left}", head, list(map(_line, one.rows)), console)
    head = ("task", "mean depth", "layers saved", "operations saved", "tokens", "time")
    rows = [_costs(one, depth) for one in judged]
    table("saved by the plan; time is a ratio to full depth, with quartiles", head, rows, console)
    slow = [one.task for one in judged if one.costs["time_ratio"]["median"] > 1]
    if slow:
        console.print(f"Slower than full depth: {', '.join(slow)}.")


def _line(row: Row) -> tuple[str, ...]:
    plan, full, gain = row.plan, row.full, row.difference
    return (
        row.score.replace("_", " "),
        row.against,
        f"{plan.mean:.3f} ({plan.low:.3f} to {plan.high:.3f})",
        f"{full.mean:.3f} ({full.low:.3f} to {full.high:.3f})",
        f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
        row.verdict,
    )


def _costs(one: Judged, depth: int) -> tuple[str, ...]:
    costs, time = one.costs, one.costs["time_ratio"]
    return (
        one.task,
        f"{costs['mean_depth']:.1f} of {depth}",
        f"{costs['layers_saved']:.1%}",
        f"{costs['flops_saved']:.1%}",
        f"{costs['tokens']['plan']} / {costs['tokens']['full']}",
        f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})",
    )
