"""``offramp inspect``: is it worth it on this model and this text?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.tracing import own_answers, timed, traced
from offramp.errors import OfframpError

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.card import Card
    from offramp.inspection import Inspection


def inspect(
    model: o.ModelName = None,
    prompt: o.PromptText = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 48,
    every: Annotated[int, typer.Option(min=1, help="Show every N-th depth in the table.")] = 3,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: o.Out = None,
) -> None:
    """Say whether depth-adaptive inference is worth it on this model and text, before any training.

    The model answers the prompts (six everyday ones by default) greedily; then every depth is
    judged on that text: how often its choice is the last layer's, and what using it would cost in
    time. For that, layers and heads are timed once per model, backbone and machine; the result is
    kept in the cache.
    """
    wanted = o.read_prompt_options(prompt, prompts, limit)
    from rich.console import Console

    from offramp import inspection, load
    from offramp.cli.output import environment, finish

    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if loaded.backbone.shape.num_layers == 1:
        raise OfframpError(f"{loaded.name} has one layer: there is no depth to leave at")
    asked = wanted or list(inspection.PROMPTS)
    texts = own_answers(
        loaded, asked, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    found = inspection.judge(
        traced(loaded, texts),
        loaded.backbone.shape,
        batched=loaded.backbone.batched,
        constants=timed(loaded),
    )
    if not json:
        if loaded.card is not None:
            print(_tuned(loaded.card))
        _show(loaded.name, found, every, Console(highlight=False))
    record = {
        "model": loaded.name,
        "plan": None,
        "seed": None,
        "supported": True,
        "card": None if loaded.card is None else loaded.card.told(),
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        **dataclasses.asdict(found),
    }
    finish(record, as_json=json, out=out)


def _tuned(card: Card) -> str:
    """Say in two lines how the model was tuned, and what reads its exits out."""
    from offramp.shown import visible

    data, base = card.data, card.base
    seen = f" on {data.tokens:,} tokens of {', '.join(data.files)}" if data else ""
    exits = ", ".join(f"{depth} ({card.readouts.get(depth, 'shared')})" for depth in card.exits)
    some = "" if base.layers is None else f"layers {', '.join(map(str, base.layers))} of "
    return visible(
        f"Tuned by {card.recipe.name}{seen}, from {some}{base.name} (fingerprint "
        f"{base.fingerprint}).\n"
        f"Its exits, and what reads them out: {exits or 'none'}."
    )


def _show(name: str, found: Inspection, every: int, console: Console) -> None:
    from offramp.cli.output import table

    shape = found.shape
    console.print(
        f"{name}: supported ({shape.num_layers} layers; its logits equal the untouched model's at "
        f"full depth, after exits and drains{', and in ragged batches' if found.batched else ''})."
    )
    console.print(
        f"By weights read, one full-vocabulary exit check costs {found.check_in_layers:.2f} "
        f"layers; keys and values of one skipped layer cost {found.fill_in_layers:.3f}.\n"
        "Checking after every layer pays only for tokens that leave by depth "
        f"{found.break_even_depth:.1f}."
    )
    checks = [
        (row.check, f"{row.layers:.2f}", f"{row.break_even_depth:.1f}") for row in found.checks
    ]
    table("what a check costs", ("check", "layers", "pays until depth"), checks, console)
    if found.timing is not None:
        console.print(_measured(found.timing))
    rows = [
        (
            f"{row.depth}",
            f"{row.agreement:.0%}",
            f"{row.confidence:.2f}",
            f"{row.loss:.2f}",
            f"{row.draft_tokens}",
            f"{row.speculation_ratio:.2f}",
        )
        for row in found.rows
        if row.depth % every == 0 or row.depth == shape.num_layers - 1
    ]
    head = ("depth", "agreement", "confidence", "loss", "draft tokens", "speculation ratio")
    table(f"each depth on {found.tokens} tokens of the model's own text", head, rows, console)
    exits = ", ".join(map(str, found.exits)) or "none"
    console.print(
        f"Exits that would pay at 95% agreement: {exits} (mean depth {found.exit_depth:.1f}, "
        f"{'time' if found.timing else 'weights read'} {found.exit_ratio:.2f} of full depth)."
    )
    console.print(f"[bold]Verdict:[/bold] {found.verdict}.")
    console.print(f"[bold]Next:[/bold] {found.recipe}.")


def _measured(timing: dict[str, Any]) -> str:
    """Say in one sentence what this machine does, and that predictions are of time."""
    layer = timing["layer_microseconds"]
    many = list(layer)[-1]
    return (
        f"Measured here: one layer takes {layer['1']:.0f} us for one row and {layer[many]:.0f} for "
        f"{many}; a check {timing['check_in_layers']:.2f} layers, a fill "
        f"{timing['fill_in_layers']:.3f}; a step {timing['step_microseconds']:.0f} us beside them. "
        "What follows is predicted time."
    )
