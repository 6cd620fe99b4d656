"""``offramp export``: the first layers of a model as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o
from offramp.errors import UsageError


def export(
    depth: Annotated[int, typer.Option(help="How many of the first layers to keep.")],
    out: Annotated[Path, typer.Option(help="The new folder; not there yet, or empty.")],
    model: o.ModelName = None,
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
) -> None:
    """Write the first layers of a model, with its norm, head and tokenizer, as a checkpoint.

    It loads with nothing of ours, says what the model says at that exit, and keeps the model's
    precision; an adapter is merged. Nothing is left behind where it cannot be written whole.
    """
    from offramp.files import must_be_free

    if depth < 1:
        raise UsageError(f"--depth {depth}: a sub-model has 1 layer or more")
    must_be_free(out)
    from offramp.cli.output import environment, finish
    from offramp.hf.export import export as write
    from offramp.hf.open import open_model
    from offramp.hf.tuned import load_tuned
    from offramp.shown import visible

    tuned = load_tuned(model, weights="own", trust_remote_code=trust_remote_code)
    backbone = open_model(tuned.model, tuned.readouts)
    made = write(
        backbone,
        tuned.tokenizer,
        depth,
        out,
        card=tuned.card,
        trust_remote_code=trust_remote_code,
    )
    if not json:
        print(
            f"{visible(str(out))}: {made.depth} of {made.num_layers} layers, "
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
        "depth": made.depth,
        "num_layers": made.num_layers,
        "parameters": made.parameters,
        "bytes": made.bytes,
        **environment(),
    }
    finish(record, as_json=json, out=None)
