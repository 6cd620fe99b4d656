"""``offramp export``: some layers of a model as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o
from offramp.errors import UsageError


def export(
    out: Annotated[Path, typer.Option(help="The new folder; not there yet, or empty.")],
    model: o.ModelName = None,
    depth: Annotated[
        int | None, typer.Option(help="How many of the first layers to keep: an exit.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Keep the layers of this sub-model: what search --as path writes."),
    ] = None,
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
) -> None:
    """Write some layers of a model, with its norm, head and tokenizer, as a checkpoint.

    It loads with nothing of ours, says what the model says by these layers, and keeps the model's
    precision; an adapter is merged. Nothing is left behind where it cannot be written whole. Tuned
    again, it is a small model of its own.

    [bold]offramp search --keep 16 --by cosine --as path --prompts mine.txt --out path.json;
    offramp export --plan path.json --out small; offramp tune small --recipe sft ...[/bold]
    """
    from offramp.files import must_be_free

    if (depth is None) == (plan is None):
        raise UsageError("give --depth N or --plan FILE: which layers to keep")
    if depth is not None and depth < 1:
        raise UsageError(f"--depth {depth}: a sub-model has 1 layer or more")
    must_be_free(out)
    from offramp.plan import Plan, read_plan
    from offramp.runs import Path as SubModel

    found = Plan() if plan is None else read_plan(plan)
    path = found.run.layers if isinstance(found.run, SubModel) else None
    if plan is not None and path is None:
        raise UsageError(f"{plan} is a plan of another kind: only a path is a model by itself")
    from offramp.cli.output import environment, finish
    from offramp.hf.export import export as write
    from offramp.hf.open import open_model
    from offramp.hf.tuned import load_tuned
    from offramp.paths import prefix
    from offramp.shown import visible

    tuned = load_tuned(model, weights="own", trust_remote_code=trust_remote_code)
    backbone = open_model(tuned.model, tuned.readouts)
    found.check(backbone)
    made = write(
        backbone,
        tuned.tokenizer,
        path or prefix(depth or 0, backbone.shape.num_layers),
        out,
        card=tuned.card,
        trust_remote_code=trust_remote_code,
    )
    if not json:
        print(
            f"{visible(str(out))}: {len(made.layers)} of {made.num_layers} layers, "
            f"{made.parameters / 1e6:.1f} M weights, {made.bytes / 1e6:.1f} MB in "
            f"{backbone.weights}; a checkpoint for AutoModelForCausalLM, a draft model for "
            "assistant_model= or vLLM, and input of llama.cpp's convert_hf_to_gguf.py"
        )
    record = {
        "model": tuned.name,
        "plan": None,
        "seed": None,
        "backbone": backbone.name,
        "weights": backbone.weights,
        "folder": str(out),
        "depth": len(made.layers),
        "layers": made.layers,
        "num_layers": made.num_layers,
        "parameters": made.parameters,
        "bytes": made.bytes,
        **environment(),
    }
    finish(record, as_json=json, out=None)
