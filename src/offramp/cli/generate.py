"""``offramp generate``: text, streamed, with the depth of each token and what it cost."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.backbone import Backbone
    from offramp.model import Model, Result, Stream
    from offramp.plan import Plan
    from offramp.runs import Run
    from offramp.sample import Sampling


def generate(
    model: o.ModelName = None,
    prompt: o.PromptText = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
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
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the K most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Keep the tokens that reach this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Where sampling starts; prompt i uses SEED + i.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")
    ] = None,
    audit: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Re-check this share of a certified plan's answers at full depth; alarm if its "
            "risk is above alpha.",
        ),
    ] = None,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: o.Out = None,
) -> None:
    """Generate text, each token only as deep as the plan says.

    Without a plan every token runs every layer. Tokens are coloured by depth on a terminal. Where
    'offramp inspect' has measured this machine, the predicted time stands beside the real one, and
    a plan that cannot pay for itself draws a warning.

    [bold]offramp generate --prompt "Why is the sky blue?" --draft 24 --draft-tokens 2[/bold]
    """
    from offramp.sample import Sampling

    wanted = o.read_prompt_options(prompt, prompts, limit)
    if not wanted:
        raise UsageError("there is no prompt; give --prompt TEXT or --prompts FILE")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
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
    _may_audit(chosen, audit, sampling)
    from rich.console import Console

    from offramp import load
    from offramp.cli.output import environment, figures_table, finish
    from offramp.text import pieces

    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    stream = loaded.stream(
        wanted,
        plan=chosen,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        raw=raw,
        batch_size=batch_size,
    )
    _warn(chosen.run, loaded.backbone)
    depth = loaded.backbone.shape.num_layers
    console = Console(soft_wrap=True, highlight=False, quiet=json)
    result = _show(stream, depth, console)
    figures = result.figures.as_dict()
    if not json:
        figures_table(figures, Console(stderr=True))
    audited = None if audit is None else _audited(loaded, result, chosen, audit, raw=raw)
    record = {
        "verb": "generate",
        "model": loaded.name,
        "num_layers": depth,
        "plan": chosen.model_dump(mode="json"),
        "seed": seed,
        "raw": raw,
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        **figures,
        "audit": audited,
        "outputs": [
            dataclasses.asdict(output) | {"pieces": pieces(loaded.tokenizer, output.token_ids)}
            for output in result.outputs
        ],
    }
    finish(record, as_json=json, out=out)


def _may_audit(plan: Plan, share: float | None, sampling: Sampling) -> None:
    """Refuse an audit before a model is loaded for it."""
    if share is None:
        return
    from offramp.calibrate.audit import audited

    audited(plan, share)
    if sampling.temperature > 0 or sampling.repetition_penalty != 1:
        raise UsageError("--audit compares with the full model's greedy choice: sample nothing")


def _audited(
    model: Model, result: Result, plan: Plan, share: float, *, raw: bool
) -> dict[str, Any]:
    """Re-check some answers, say on stderr what came of it, and return that for JSON."""
    from tqdm import tqdm

    from offramp.calibrate.audit import audit
    from offramp.text import encode

    texts = []
    for output in result.outputs:
        prompt = encode(model.tokenizer, output.prompt, raw=raw)
        texts.append((prompt + output.token_ids, len(prompt)))
    with tqdm(texts, desc="audit", unit="answer", leave=False) as bar:
        monitor = audit(model.backbone, bar, plan, share, eos=model.eos)
    print(
        f"offramp: {'ALARM: the risk is above' if monitor.alarm else 'no alarm: the risk may be'} "
        f"{monitor.alpha:g}{'' if monitor.alarm else ' or less'}, as it was certified; "
        f"{monitor.seen} answers re-checked, mean loss {monitor.rate:.4f}",
        file=sys.stderr,
    )
    return {"share": share, "seen": monitor.seen, "rate": monitor.rate, "alarm": monitor.alarm}


def _warn(run: Run, backbone: Backbone) -> None:
    """Say on stderr that a plan cannot pay for itself here; only where times are known already."""
    from offramp.inspection import at_best
    from offramp.timing import known

    constants = known(backbone)
    if constants is None:
        return
    best = at_best(run, backbone.shape, constants)
    if best > 1:
        print(
            "offramp: this plan cannot pay for itself here: if every guess were right, it would "
            f"take {best:.0%} of the time of plain decoding",
            file=sys.stderr,
        )


def _show(stream: Stream, depth: int, console: Console) -> Result:
    """Print one answer as it comes, several when all are there, and return what came of it."""
    from tqdm import tqdm

    from offramp.cli.output import depth_text
    from offramp.shown import visible

    single = len(stream.outputs) == 1
    with tqdm(total=len(stream.outputs), unit="prompt", disable=single, leave=False) as bar:
        for piece in stream:
            if single:
                console.print(depth_text(piece.text, piece.token.depth, depth), end="")
            bar.update(piece.token.finish is not None)
    result = stream.result
    console.print()
    if not single:
        for number, output in enumerate(result.outputs, 1):
            console.rule(f"{number}")
            console.print(visible(output.text), markup=False)
    return result
