"""``offramp tune``: teach the intermediate layers of a model to speak."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.tune.figures import Figures
    from offramp.tune.run import Tuned


class ReadoutName(StrEnum):
    """What reads the exits out."""

    shared = "shared"
    affine = "affine"
    head = "head"
    block = "block"


class EachStep(StrEnum):
    """Which exits a step trains."""

    all = "all"
    rotate = "rotate"
    sample = "sample"


class GateInput(StrEnum):
    """What the gates of ``skip`` see."""

    hidden = "hidden"
    fixed = "fixed"


class TrackerName(StrEnum):
    """Who keeps figures of experiments."""

    trackio = "trackio"
    tensorboard = "tensorboard"


class Rounding(StrEnum):
    """--rounding."""

    none = "none"
    int4 = "int4"


class Precision(StrEnum):
    """Of the arithmetic."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


def tune(
    model: o.ModelName = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Rows to learn: Alpaca, chat or prompt/completion as .json or .jsonl, plain .txt, "
            "each perhaps .gz, or a hub id; may be given several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="New folder for the tuned model, or that of a run to go on with."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lite, sorted and layerskip train all weights to speak at the exits and at the "
            "end; heads and gates train a readout or a gate per exit and leave the model alone; "
            "skip trains gates that leave layers out; sft is the plain baseline.",
        ),
    ] = "lite",
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="DEPTH,...",
            help="Depths to teach, e.g. 12,18,24; every recipe but sft and skip needs some.",
        ),
    ] = None,
    readout: Annotated[
        ReadoutName | None,
        typer.Option(
            help="What reads an exit out; with --recipe heads block by default, else shared."
        ),
    ] = None,
    each_step: Annotated[
        EachStep,
        typer.Option(
            help="Train all exits in every step, one in turn, or one sub-model drawn at random."
        ),
    ] = EachStep.all,
    distill: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of an exit's loss that is the teacher's, not data."),
    ] = 0.0,
    teacher: Annotated[
        str,
        typer.Option(
            metavar="last|base|MODEL",
            help="With --distill: whose distribution is learnt. The model's own last layer, the "
            "model as it was, or another with the same vocabulary, e.g. a deeper one that was "
            "tuned on the task.",
        ),
    ] = "last",
    lora: Annotated[
        int, typer.Option(min=0, help="Train adapters of this rank; 0 trains all weights.")
    ] = 0,
    lora_layers: Annotated[
        int, typer.Option(min=0, help="With --lora: only the first N layers get adapters; 0: all.")
    ] = 0,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="self|MODEL",
            help="Learn from answers that the model itself, or another, gives to the data's "
            "prompts; they are generated first and kept in OUT.",
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="With --answers: most tokens of an answer.")
    ] = 128,
    answer_weights: Annotated[
        o.Weights, typer.Option(help="With --answers: how the one who answers holds its weights.")
    ] = o.Weights.int8,
    alpha: Annotated[
        float, typer.Option(min=0, help="With --recipe skip: price of running every layer.")
    ] = 1.0,
    gate_input: Annotated[
        GateInput, typer.Option(help="With --recipe skip: what gates see; fixed is an ablation.")
    ] = GateInput.hidden,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="End after so many tokens, whatever --epochs says.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak rate; 2e-5 for all weights, 2e-4 for adapters and readouts."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Packed rows of one step.")] = 16,
    rows_at_once: Annotated[int, typer.Option(min=1, help="Packed rows in memory at once.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a packed row.")] = 512,
    held_out: Annotated[
        int, typer.Option(min=0, help="Examples kept out of training, to judge on.")
    ] = 100,
    watch: Annotated[
        list[str] | None,
        typer.Option("--watch", help="More data to judge on, before and after; never learnt."),
    ] = None,
    raw: o.Raw = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count and leave out rows that are wrong.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between states on disk.")] = 25,
    report_to: Annotated[
        TrackerName | None,
        typer.Option(help="Also tell a tracker of experiments each step's figures."),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of the arithmetic; auto: bf16 where the processor has it. Weights are trained in "
            "fp32."
        ),
    ] = Precision.auto,
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="Train the layers through int4's rounding, which undoes tuning otherwise: for "
            "models that will be run with --weights int4."
        ),
    ] = Rounding.none,
    seed: Annotated[int, typer.Option(help="Of order, split and draws.")] = 0,
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
) -> None:
    """Teach the intermediate layers of a model to speak.

    Killed at any moment, the same command goes on where it was. The folder opens like any model:
    offramp generate OUT, bench OUT, trace OUT.
    """
    from offramp.errors import UsageError
    from offramp.machine import keep_memory
    from offramp.tune.run import tune as run
    from offramp.tune.settings import make_settings

    if not data:
        raise UsageError("name what to learn: --data FILE (or a hub id)")
    if out is None:
        raise UsageError("name the folder for the tuned model: --out DIR")
    heads = recipe == "heads"
    light = bool(lora) or heads or recipe == "gates"
    settings = make_settings(
        recipe=recipe,
        exits=o.parse_depths(exits) or (),
        readout=(readout or (ReadoutName.block if heads else ReadoutName.shared)).value,
        each_step=each_step.value,
        distill=distill,
        teacher=teacher,
        lora=lora,
        lora_layers=lora_layers,
        alpha=alpha,
        gate_input=gate_input.value,
        answers=answers,
        answer_tokens=answer_tokens,
        answer_weights=answer_weights.value,
        learning_rate=(2e-4 if light else 2e-5) if learning_rate is None else learning_rate,
        length=length,
        rows=rows,
        rows_at_once=min(rows_at_once, rows),
        epochs=epochs,
        tokens=tokens,
        held_out=held_out,
        seed=seed,
        precision=precision.value,
        rounding=rounding.value,
        raw=raw,
    )
    keep_memory()
    tuned = run(
        model,
        data,
        settings,
        out,
        watch=watch or (),
        limit=limit,
        skip_bad=skip_bad,
        save_every=save_every,
        tracker=None if report_to is None else report_to.value,
        trust_remote_code=trust_remote_code,
    )
    if tuned.main:
        _show(tuned, as_json=json)


def _show(tuned: Tuned, *, as_json: bool) -> None:
    from rich.console import Console

    from offramp.cli.output import environment, finish, table

    if not as_json:
        console = Console(highlight=False)
        for name, rows in _rows(tuned.before, tuned.after).items():
            head = ("depth", "agreement", "before", "loss", "before", "calibration error", "before")
            shown = [
                (
                    str(new["depth"]),
                    *(f"{row[key]:.3f}" for key in _SHOWN for row in (new, old)),
                )
                for new, old in rows
            ]
            table(name, head, shown, console)
        left_out = dict(tuned.skipped)
        if tuned.truncated:
            left_out["answers cut at --length"] = tuned.truncated
        for reason, count in left_out.items():
            console.print(f"{count} rows: {reason}")
        console.print(f"Written to {tuned.folder}: offramp generate {tuned.folder}")
    result = {
        "verb": "tune",
        "model": tuned.card.base.name,
        "plan": None,
        "seed": tuned.card.recipe.settings["seed"],
        **environment(),
        "out": str(tuned.folder),
        "card": tuned.card.told(),
        "before": tuned.before,
        "after": tuned.after,
        "skipped": tuned.skipped,
        "truncated": tuned.truncated,
    }
    finish(result, as_json=as_json, out=None)


_SHOWN = ("agreement", "loss", "calibration_error")


def _rows(
    before: Figures, after: Figures
) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Return (after, before) of every depth, by the name of the text judged on."""
    return {name: list(zip(after[name], before[name], strict=True)) for name in after}
