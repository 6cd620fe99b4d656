"""``offramp trace``: one full pass over texts, with everything a policy could have seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.tracing import (
    given_texts,
    own_answers,
    plan_of,
    read_generated,
    run_texts,
    traced,
)
from offramp.errors import UsageError

if TYPE_CHECKING:
    from offramp.plan import Plan
    from offramp.trace import Replay, Trace


def trace(
    model: o.ModelName = None,
    prompt: o.PromptText = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    given: Annotated[
        bool,
        typer.Option("--given", help="Trace the prompts' own text instead of answers to them."),
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="FILE",
            help="Trace what 'generate --json' wrote into FILE; its plan is replayed.",
        ),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 64,
    exits: Annotated[
        str | None, typer.Option(metavar="DEPTH,...", help="Depths to look at; all by default.")
    ] = None,
    keep_hidden: Annotated[
        bool, typer.Option(help="Keep hidden states, for policies that look at them.")
    ] = False,
    plan: o.PlanFile = None,
    threshold: o.ThresholdText = None,
    check: o.CheckText = None,
    head: o.HeadText = None,
    classifier: o.ClassifierFile = None,
    exit_prompt: o.ExitPrompt = False,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the trace goes (.safetensors); nowhere by default.")
    ] = None,
) -> None:
    """Record what every exit would say of every token, and replay a policy on it.

    The texts are the model's own greedy answers to the prompts, with --given the prompts
    themselves, or with --run the answers of a run: 'offramp report' then shows what the full model
    would have said of them. A plan or --threshold is replayed: the depths are those of real
    generation, and the scores recorded are what its check saw. A gate needs the hidden states, so
    they are kept.
    """
    depths = o.parse_depths(exits)
    alone = threshold is None and classifier is None  # then check and head are for the record only
    chosen = o.parse_plan(
        plan,
        threshold=threshold,
        check=None if alone else check,
        head=None if alone else head,
        classifier=classifier,
        exit_prompt=exit_prompt,
    )
    for name, value in (("--check", check), ("--head", head)):
        if alone and value is not None and plan is not None:
            raise UsageError(f"a plan has its own check and head; leave out {name} with --plan")
    wanted = o.read_prompt_options(prompt, prompts, limit)
    if bool(wanted) == (run is not None):
        raise UsageError("name one thing to trace: --prompt TEXT, --prompts FILE or --run FILE")
    earlier = None if run is None else read_generated(run)
    if earlier is not None and plan is None and threshold is None:
        chosen = plan_of(earlier)
    from rich.console import Console

    from offramp import load
    from offramp.checks import parse_check, parse_head
    from offramp.cli.detail import curve, details, exit_rows, signal_of
    from offramp.cli.output import environment, finish, table
    from offramp.plan import check_of
    from offramp.runs import Exit
    from offramp.sketch import keys

    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    chosen.check(loaded.backbone)
    if earlier is not None:
        wanted, texts = run_texts(loaded, earlier, limit)
    elif given:
        texts = given_texts(loaded, wanted)
    else:
        texts = own_answers(
            loaded, wanted, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    looked_at = check_of(chosen) if check is None or not alone else parse_check(check)
    keep_hidden |= looked_at.kind == "gate"
    if head is not None and alone and isinstance(chosen.run, Exit):
        raise UsageError("the run's plan has its own head; leave out --head with --run")
    chosen_by = chosen.run.head if isinstance(chosen.run, Exit) else parse_head(head or "full")
    recorded = traced(
        loaded, texts, depths, keep_hidden=keep_hidden, check=looked_at, head=chosen_by
    )
    if out is not None:
        replace(recorded, prompts=keys(wanted)).save(out)
    rows = exit_rows(recorded)
    done = _replay(recorded, chosen)
    replayed = done and _figures(recorded, done)
    if not json:
        shown_keys = ("agreement", "max_prob", "loss")
        shown = [
            (f"{row['depth']}", *(f"{row[key]:.3f}" if key in row else "" for key in shown_keys))
            for row in rows
        ]
        console = Console(highlight=False)
        table(f"{len(recorded.chosen)} tokens", ("depth", *shown_keys), shown, console)
        if replayed:
            console.print(
                f"The plan would leave at depth {replayed['mean_depth']:.1f} of "
                f"{recorded.num_layers} on average, and choose the full model's token on "
                f"{replayed['agreement']:.1%} of tokens."
            )
        if out is not None:
            console.print(f"Written to {out}.")
    result = {
        "verb": "trace",
        "model": loaded.name,
        "num_layers": recorded.num_layers,
        "plan": chosen.model_dump(mode="json"),
        "seed": None,
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        "tokens": len(recorded.chosen),
        "rows": rows,
        "replay": replayed,
        "curve": curve(recorded, done),
        "exits": recorded.exits,
        **details(recorded, done, wanted, loaded.tokenizer, signal_of(chosen)),
    }
    finish(result, as_json=json, out=None)


def _replay(recorded: Trace, chosen: Plan) -> Replay | None:
    from offramp.runs import Exit
    from offramp.trace import replay

    if not isinstance(chosen.run, Exit):
        return None
    return replay(
        recorded,
        chosen.run.policy,
        max_waiting=chosen.run.max_waiting,
        exit_prompt=chosen.run.exit_prompt,
        check=chosen.run.check,
        head=chosen.run.head,
    )


def _figures(recorded: Trace, done: Replay) -> dict[str, Any]:
    depths, counts = done.depths.unique(return_counts=True)
    return {
        "mean_depth": done.depths.float().mean().item(),
        "depth_histogram": {
            str(d): c for d, c in zip(depths.tolist(), counts.tolist(), strict=True)
        },
        "agreement": (done.chosen == recorded.chosen[:, -1]).float().mean().item(),
        "loss": done.loss.mean().item(),
    }
