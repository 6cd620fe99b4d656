"""``offramp oracle``: the best any choice of depth per text could do, beside what a router does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import options as o
from offramp.cli.scoring import (
    as_record,
    check_depths,
    fitted_router,
    scored_table,
    texts_to_score,
    written_plan,
)
from offramp.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.allocate.report import Report
    from offramp.allocate.table import ScoreTable


def oracle(
    model: o.ModelName = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    answers: Annotated[
        str,
        typer.Option(
            metavar="own|file",
            help="Score the model's own greedy answers, or those in the file (output, response).",
        ),
    ] = "own",
    max_new_tokens: o.MaxNewTokens = 32,
    exits: Annotated[
        str | None, typer.Option(metavar="DEPTH,...", help="Depths to choose among; full is added.")
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            metavar="loss|match|agreement",
            help="Of each depth on that text: minus its loss, the share of the text's tokens, or "
            "of the last layer's, that it would choose.",
        ),
    ] = "loss",
    look: Annotated[
        str | None,
        typer.Option(
            metavar="DEPTH,...",
            help="Where a router looks at the prompt, not behind the first of --exits; half of "
            "that by default.",
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Use this score table instead of making one.")
    ] = None,
    table_out: Annotated[
        Path | None, typer.Option(help="Where the score table goes (.safetensors).")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="LAYERS,...", help="Mean layers per token; a sweep by default."),
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help="Where the fitted router goes (.safetensors).")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="With --router and one --budget: where the plan that uses it goes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of shuffles, bootstraps and folds.")] = 0,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: o.Out = None,
) -> None:
    """Say how far from the best possible a fixed depth is, and how much of it a router recovers.

    Every text is scored at every depth in one pass; the oracle then gives each text the depth that
    is best for all within a budget of layers. It peeks at the scores, so beside it stand the same
    sums over noise alone (null), choices scored on tokens they have not seen (held-out), and a
    router that sees only the prompt, judged on texts it was not fitted on.

    [bold]offramp oracle --prompts prompts.jsonl --exits 18,21,24,27 --out oracle.json[/bold]
    """
    budgets = _parse_budgets(budget)
    depths, looks = o.parse_depths(exits), o.parse_depths(look)
    o.parse_choices("--answers", answers, ("own", "file"))
    o.parse_choices("--score", score, ("loss", "match", "agreement"))
    _check_options(prompts, depths, table, router, plan, budgets)
    from rich.console import Console
    from tqdm import tqdm

    from offramp.allocate.report import check_budgets, default_budgets, report
    from offramp.allocate.table import load_table
    from offramp.cli.output import environment, finish

    loaded = None
    if table is None or model is not None:
        from offramp import load

        loaded = load(
            model,
            backbone=backbone.value,
            weights=weights.value,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    if table is not None:
        scored = load_table(table)
        if loaded is not None:
            scored.must_be_of(loaded.backbone)
    else:
        assert loaded is not None
        assert prompts is not None
        assert depths is not None
        looks = looks or (max(depths[0] // 2, 1),)
        check_depths(loaded, depths, looks)
        texts = texts_to_score(loaded, prompts, limit, answers, max_new_tokens, batch_size, raw=raw)
        scored = scored_table(loaded, texts, depths, looks, score, seed=seed, batch_size=batch_size)
    if table_out is not None:
        scored.save(table_out)
    scored.must_allocate()
    check_budgets(budgets, scored.costs)
    fitted, predicted = fitted_router(scored, seed, needed=router is not None)
    swept = budgets or default_budgets(scored.costs)
    with tqdm(total=100, desc="budgets", unit="%", leave=False) as bar:
        done = report(
            scored,
            swept,
            predicted,
            seed=seed,
            progress=lambda s: bar.update(round(100 * s) - bar.n),
        )
    plan_record = None
    if router is not None:
        assert fitted is not None
        assert predicted is not None
        plan_record = written_plan(scored, fitted, predicted, router, plan, swept)
    if not json:
        _show(scored, done, Console(highlight=False))
    record = {
        "model": scored.model.name,
        "plan": plan_record,
        "seed": seed,
        "backbone": None if loaded is None else loaded.backbone.name,
        "weights": None if loaded is None else loaded.backbone.weights,
        **environment(),
        **as_record(scored, done, fitted),
    }
    finish(record, as_json=json, out=out)


def _parse_budgets(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--budget {text!r}: write layers with commas, e.g. 18,20.5") from error


def _check_options(
    prompts: Path | None,
    depths: tuple[int, ...] | None,
    table: Path | None,
    router: Path | None,
    plan: Path | None,
    budgets: list[float],
) -> None:
    if table is None and (prompts is None or depths is None):
        raise UsageError(
            "an oracle needs texts and depths: give --prompts FILE and --exits DEPTH,..., or a "
            "--table made before"
        )
    if table is not None and (prompts is not None or depths is not None):
        raise UsageError("--table holds its texts and depths: leave out --prompts and --exits")
    if plan is not None and (router is None or len(budgets) != 1):
        raise UsageError("--plan needs --router FILE and one --budget, the mean depth to aim at")


def _show(scored: ScoreTable, done: Report, console: Console) -> None:
    """Print the budgets, the allocation, and what it comes to."""
    from offramp.cli.output import table

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    head = ("layers", "fixed", "oracle", "held-out", "null", "permuted", "route", "recovered")
    rows = [
        (
            f"{row.budget:g}",
            *map(cell, (row.fixed, row.oracle, row.held_out, row.null, row.permuted[0], row.route)),
            "" if row.recovered is None else f"{row.recovered:.0%}",
        )
        for row in done.rows
    ]
    forced = "teacher-forced" if scored.teacher_forced else "each way on its own text"
    table(f"{scored.score} of {len(scored.scores)} texts, {forced}", head, rows, console)
    costs = [f"{cost:g}" for cost in scored.costs.tolist()]
    kinds = [
        ("every text at", *map(cell, done.constant)),
        ("best up to (weak oracle)", *map(cell, done.weak)),
        *((f"texts at {row.budget:g} on average", *map(str, row.histogram)) for row in done.rows),
    ]
    table("depths", ("", *costs), kinds, console)
    low, high = done.smallest_interval
    console.print(
        f"The oracle equals the full model at {done.smallest:.2f} layers on average (95% interval "
        f"over texts {low:.2f} to {high:.2f})"
        + ("" if done.smallest_held_out is None else _held_out_words(done.smallest_held_out))
        + "."
    )
    console.print(
        f"With depth for free it gains {done.gain:.4f} on the full model"
        + ("" if done.held_out_gain is None else f", {done.held_out_gain:.4f} of it held out")
        + (
            ""
            if done.null_gain is None
            else f"; runs that differ by seed alone gain {done.null_gain:.4f}"
        )
        + "."
    )


def _held_out_words(smallest: float) -> str:
    if smallest != smallest:
        return "; choices made on half of the tokens never do on the other half"
    return f"; choices made on half of the tokens do on the other half at {smallest:.2f}"
