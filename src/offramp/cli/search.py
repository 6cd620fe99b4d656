"""``offramp search``: which layers could this model do without, on these texts?"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.tracing import Texts, given_texts, own_answers, timed
from offramp.errors import UsageError

if TYPE_CHECKING:
    from offramp.backbone import Shape
    from offramp.checks import Head
    from offramp.model import Model
    from offramp.search.subsets import Step
    from offramp.timing import Constants


class Criterion(StrEnum):
    """How layers are chosen."""

    uls = "uls"
    cosine = "cosine"
    loss = "loss"


class Use(StrEnum):
    """What the layers are for."""

    path = "path"
    draft = "draft"


def search(
    model: o.ModelName = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    given: Annotated[
        bool,
        typer.Option("--given", help="Search on the prompts' own text instead of answers to them."),
    ] = False,
    max_new_tokens: o.MaxNewTokens = 48,
    keep: Annotated[
        int | None, typer.Option("--keep", help="How many layers to keep.", show_default=False)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="What share of the layers to keep; 0.6 by default."),
    ] = None,
    by: Annotated[
        Criterion,
        typer.Option(
            "--by",
            help="Evenly spread layers (uls); or one after the other is taken out: the one that "
            "changes its state least (cosine), or that the loss misses least (loss, slow).",
        ),
    ] = Criterion.cosine,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="With --by loss: a layer may lose its attention or its MLP alone; --keep and "
            "--share then count weights.",
        ),
    ] = False,
    use: Annotated[
        Use,
        typer.Option(
            "--as", help="A sub-model (path, lossy), or what drafts run (draft, lossless)."
        ),
    ] = Use.path,
    draft_tokens: o.DraftTokens = 4,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="full|refined|shortlist:N|tokens:FILE",
            help="With --as draft: what chooses the drafted tokens.",
        ),
    ] = None,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the plan goes (.json); nowhere by default.")
    ] = None,
) -> None:
    """Find layers to leave out, on texts like yours, and write a plan of those that stay.

    The texts are the model's own greedy answers to the prompts, or with --given the prompts
    themselves; every third one has no say and judges what was found. Layer 0 always stays.

    [bold]offramp search --prompts mine.jsonl --share 0.8 --as draft --out plan.json[/bold]
    """
    if keep is not None and share is not None:
        raise UsageError("--keep and --share exclude each other")
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--share {share}: a share of the layers lies between 0 and 1")
    if head is not None and use is not Use.draft:
        raise UsageError("--head says what chooses the drafted tokens; it needs --as draft")
    if halves and by is not Criterion.loss:
        raise UsageError("--halves looks for halves of layers by their loss; it needs --by loss")
    wanted = o.read_prompt_options(None, prompts, limit)
    if not wanted:
        raise UsageError("there is nothing to search on; give --prompts FILE")
    from offramp.checks import parse_head
    from offramp.search.subsets import check_count, check_halves, check_keep

    check_count(len(wanted))
    reads = parse_head(head or "full")
    from offramp import load
    from offramp.cli.output import environment, finish
    from offramp.plan import Plan, write_plan
    from offramp.runs import Path as SubModel
    from offramp.runs import Speculate

    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    depth = loaded.backbone.shape.num_layers
    kept = keep if keep is not None else max(round((0.6 if share is None else share) * depth), 1)
    check_keep(kept, depth)
    if halves:
        check_halves(loaded.backbone, by.value)
    texts = (
        given_texts(loaded, wanted)
        if given
        else own_answers(
            loaded, wanted, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    )
    steps = _searched(loaded, texts, kept, by, halves=halves)
    layers = steps[-1].layers
    run = (
        SubModel(layers=layers)
        if use is Use.path
        else Speculate(draft=layers, tokens=draft_tokens, head=reads)
    )
    plan = Plan(model=loaded.id, run=run)
    plan.check(loaded.backbone)
    if out is not None:
        write_plan(out, plan)
    context = sum(len(ids) for ids, _ in texts) // len(texts)
    price = _Price(loaded, use, draft_tokens, reads, timed(loaded), context)
    shape = loaded.backbone.shape
    rows = [_row(step, shape) | {"predicted_ratio": price.of(step)} for step in steps]
    drafted = _drafted(loaded, plan, texts) if use is Use.draft else None
    if not json:
        _show(rows, drafted, use, out)
    record = {
        "model": loaded.name,
        "plan": plan.model_dump(mode="json"),
        "seed": None,
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        "by": by.value,
        "halves": halves,
        "texts": len(texts),
        "rows": rows,
        "draft": drafted,
    }
    finish(record, as_json=json, out=None)


def _row(step: Step, shape: Shape) -> dict[str, Any]:
    """Return a step as JSON has it: parts by their names, and what they weigh in layers."""
    from offramp.cost import worth
    from offramp.paths import named

    removed = None if step.removed is None else named(step.removed)
    found = {"layers": [*map(named, step.layers)], "removed": removed}
    return dataclasses.asdict(step) | found | {"weighs": worth(step.layers, shape)}


def _searched(loaded: Model, texts: Texts, keep: int, by: Criterion, *, halves: bool) -> list[Step]:
    from tqdm import tqdm

    from offramp.search.subsets import search as found

    with tqdm(total=100, desc="search", unit="%", leave=False) as bar:
        return found(
            *(loaded.backbone, texts, keep, by.value),
            lambda share: bar.update(round(100 * share) - bar.n),
            halves=halves,
        )


@dataclasses.dataclass(frozen=True)
class _Price:
    """What a path found would take, against full depth."""

    model: Model
    use: Use
    tokens: int
    head: Head
    constants: Constants
    context: int

    def of(self, step: Step) -> float | None:
        """Return the predicted time of a sub-model or of drafts; None of drafts by all layers."""
        from offramp.cost import path_ratio, speculation_ratio, worth
        from offramp.plan import in_heads
        from offramp.speculate import Draft

        shape = self.model.backbone.shape
        count = worth(step.layers, shape)
        if self.use is Use.path:
            return path_ratio(shape, count, self.constants, self.context)
        if count == shape.num_layers:
            return None
        return speculation_ratio(
            *(shape, count, self.tokens, step.held_out.agreement, self.constants, self.context),
            head=in_heads(self.head, shape),
            shared=Draft(step.layers).shared,
        )


def _drafted(loaded: Model, plan: Any, texts: Texts) -> dict[str, float]:
    """Draft really on the held-out prompts, and return how often drafts were right."""
    from offramp.plan import execute
    from offramp.request import Request
    from offramp.search.subsets import split

    before = loaded.backbone.meter.copy()
    requests = [
        Request(list(ids[:given]), len(ids) - given, eos=loaded.eos)
        for ids, given in split(texts)[1]
    ]
    tokens = sum(1 for _ in execute(loaded.backbone, requests, plan.run))
    work = loaded.backbone.meter - before
    found = {"tokens": tokens, "drafted": work.drafted, "accepted": work.accepted}
    return found | {"acceptance": work.accepted / max(work.drafted, 1)}


def _show(
    rows: list[dict[str, Any]], drafted: dict[str, float] | None, use: Use, out: Path | None
) -> None:
    from rich.console import Console

    from offramp.cli.output import table

    console = Console(highlight=False)
    shown = [
        (
            f"{row['weighs']:.4g}",
            "" if row["removed"] is None else f"{row['removed']}",
            *(f"{row['searched'][key]:.3f}" for key in ("loss", "agreement")),
            *(f"{row['held_out'][key]:.3f}" for key in ("loss", "agreement")),
            "" if row["predicted_ratio"] is None else f"{row['predicted_ratio']:.2f}",
        )
        for row in rows
    ]
    names = ("layers", "taken out", "loss", "agreement", "loss, held out", "agreement, held out")
    ratio = "time / full depth" if use is Use.path else "time of drafts / plain"
    table("what is left", (*names, ratio), shown, console)
    console.print(f"Layers: {', '.join(map(str, rows[-1]['layers']))}.")
    if drafted:
        console.print(
            f"As a draft it proposed {drafted['drafted']} tokens on the held-out texts; "
            f"{drafted['accepted']} ({drafted['acceptance']:.0%}) were confirmed."
        )
    if out is not None:
        console.print(f"Plan written to {out}.")
