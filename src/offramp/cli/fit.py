"""``offramp fit``: a classifier or gates that say where to leave, fitted to traces and judged."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from offramp.cli import options as o
from offramp.cli.tracing import given_texts, own_answers, traced
from offramp.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.adainfer.judge import Judgement
    from offramp.classifier import Classifier
    from offramp.classifier import Kind as Classical
    from offramp.gate import GateWeights
    from offramp.trace import Trace


class Kind(StrEnum):
    """What is fitted."""

    svm = "svm"
    logistic = "logistic"
    crf = "crf"
    rule = "rule"
    gate = "gate"


class Label(StrEnum):
    """When it is right to leave."""

    final = "final"
    gold = "gold"
    stable = "stable"


def fit(
    model: o.ModelName = None,
    kind: Annotated[
        Kind,
        typer.Option(help="svm, logistic, crf: on features; rule: gap >= 0.8; gate: on the state."),
    ] = Kind.svm,
    label: Annotated[
        Label,
        typer.Option(
            help="Right to leave: where the last layer's choice is found (final), and stays "
            "(stable), or the text's own token (gold; with --given or --trace)."
        ),
    ] = Label.final,
    features: Annotated[
        str, typer.Option(metavar="NAME,...", help="Signals, or depth, to judge by.")
    ] = "margin,max_prob",
    per_exit: Annotated[
        bool, typer.Option("--per-exit", help="A classifier for each exit, not one for all.")
    ] = False,
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="A trace to fit to, in place of a model and prompts; may be repeated."),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(help="A trace to judge by, of another task, say; may be repeated."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the cross-validation.")] = 5,
    prompt: o.PromptText = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    given: Annotated[
        bool, typer.Option("--given", help="Fit to the prompts' own text, not to answers to them.")
    ] = False,
    max_new_tokens: o.MaxNewTokens = 64,
    exits: Annotated[
        str | None, typer.Option(metavar="DEPTH,...", help="Depths to look at; all by default.")
    ] = None,
    check: o.CheckText = None,
    exit_prompt: o.ExitPrompt = False,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the result goes (.safetensors); nowhere by default.")
    ] = None,
) -> None:
    """Fit what says where to leave, and judge it on texts it was not fitted to.

    From a model and prompts, or from traces that 'offramp trace --out' wrote. The figures are those
    of cross-validation, whole texts held out, and of each --test trace. Use the result with
    'offramp generate --classifier FILE', or gates with --check gate:FILE.

    [bold]offramp fit --kind crf --trace sst2.safetensors --out stop.safetensors[/bold]
    """
    depths = o.parse_depths(exits)
    wanted = o.read_prompt_options(prompt, prompts, limit)
    if bool(wanted) == bool(trace):
        raise UsageError("give traces to fit to (--trace FILE), or prompts to trace (--prompts)")
    if trace and (model is not None or check is not None or depths is not None):
        raise UsageError("a trace brings its model, exits and check; leave them out with --trace")
    if kind is Kind.gate and label is not Label.final:
        raise UsageError("gates are fitted to the last layer's choice: --label final")
    from offramp.checks import parse_check
    from offramp.cli.output import environment, finish
    from offramp.trace import load_trace

    looked_at = parse_check(check or "full")
    tests = {str(path): load_trace(path) for path in test or ()}
    if trace:
        from offramp.adainfer.labels import joined

        data = joined([load_trace(path) for path in trace])
    else:
        from offramp import load

        loaded = load(
            model,
            backbone=backbone.value,
            weights=weights.value,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        texts = (
            given_texts(loaded, wanted)
            if given
            else own_answers(
                loaded, wanted, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
        )
        data = traced(loaded, texts, depths, keep_hidden=kind is Kind.gate, check=looked_at)
    from offramp.adainfer.judge import cross_validate, judge

    make = _maker(kind, label, tuple(features.split(",")), pooled=not per_exit)
    fitted = make(data)
    judged = cross_validate(make, data, label=label.value, folds=folds, exit_prompt=exit_prompt)
    on_tests = {
        name: judge(fitted, other, label=label.value, exit_prompt=exit_prompt)
        for name, other in tests.items()
    }
    if out is not None:
        fitted.save(out)
    if not json:
        from rich.console import Console

        console = Console(highlight=False)
        _show(f"{kind} on texts held out", judged, data.num_layers, console)
        for name, one in on_tests.items():
            _show(f"{kind} on {name}", one, data.num_layers, console)
        if out is not None:
            console.print(f"Written to {out}.")
    result = {
        "fingerprint": data.fingerprint,
        "num_layers": data.num_layers,
        "check": data.check,
        "kind": kind.value,
        "label": label.value,
        "features": None if kind is Kind.gate else features.split(","),
        "pooled": kind is not Kind.gate and not per_exit,
        "seed": None,
        **environment(),
        "figures": {name: one.as_dict() for name, one in [("held_out", judged), *on_tests.items()]},
    }
    finish(result, as_json=json, out=None)


def _maker(
    kind: Kind, label: Label, features: tuple[str, ...], *, pooled: bool
) -> Callable[[Trace], Classifier | GateWeights]:
    """Return what fits this kind to a trace."""
    from offramp.adainfer.fit import fit_classifier
    from offramp.gate import fit_gate

    if kind is Kind.gate:
        return fit_gate
    named = cast("Classical", kind.value)
    return partial(fit_classifier, kind=named, label=label.value, features=features, pooled=pooled)


def _show(title: str, judged: Judgement, num_layers: int, console: Console) -> None:
    from offramp.cli.output import table

    shown = [
        (f"{one.depth}", f"{one.right:.3f}", f"{one.accuracy:.3f}", f"{one.leaves:.3f}")
        for one in judged.exits
    ]
    table(title, ("depth", "right", "accuracy", "leaves"), shown, console)
    console.print(
        f"At its own word it leaves at depth {judged.mean_depth:.1f} of {num_layers} on average "
        f"over {judged.tokens} tokens of {judged.texts} texts, and chooses the full model's token "
        f"on {judged.agreement:.1%}, the text's own on {judged.gold:.1%} (the full model: "
        f"{judged.full_gold:.1%})."
    )
