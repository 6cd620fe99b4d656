"""``offramp bench``: our plans and other engines in turns, beside what the machine could do."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.errors import OfframpError, UsageError

if TYPE_CHECKING:
    from offramp.bench.figures import Row
    from offramp.bench.race import Case, Contestant, Race

_PEERS = Path(".venv-peers/bin/python")
"""Where ``make peers`` puts the interpreter of the other engines."""
_ENGINES = ("hf", "hf-early-exit", "llama.cpp", "economize", "ctranslate2")


def bench(
    model: o.ModelName = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="A plan file to time; may be repeated.")
    ] = None,
    draft: o.DraftDepth = None,
    draft_tokens: o.DraftTokens = 4,
    draft_confidence: o.DraftConfidence = 0.0,
    exit_depth: o.ExitDepth = None,
    head: o.HeadText = None,
    threshold: o.ThresholdText = None,
    check: o.CheckText = None,
    kv: o.KeyValues = o.KV.exact,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N,...", help="Texts at once; 1 by default.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,...", help="Tokens of a prompt; 256 by default.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to read instead, one after the other in each turn; as for generate."
        ),
    ] = None,
    limit: o.Limit = None,
    raw: o.Raw = False,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of a text in a turn.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 7,
    backbone: Annotated[
        str, typer.Option(metavar="NAME,...", help="fast, hf or auto, as elsewhere.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(metavar="FORMAT,...", help="fp32, bf16, int8, int4.")
    ] = "fp32",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE,...",
            help="hf, hf-early-exit, llama.cpp, economize, ctranslate2, or none; by default those "
            "that are installed.",
        ),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            help="Interpreter that has the other engines; by default what 'make peers' built.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contestant; torch's by default.")
    ] = None,
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: o.Out = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw decoding speeds (matplotlib).")
    ] = None,
) -> None:
    """Time plans and other engines on this machine, in turns: A B C A B C ...

    Everybody reads the same prompts and writes greedily with as many threads, as many tokens: an
    end token is one like any other. Full depth is always among the contestants; ratios are speeds
    against it within a round, medians over the rounds.

    [bold]offramp bench --weights int4 --exit 12 --against llama.cpp,hf[/bold]
    """
    found = [o.parse_plan(file) for file in (None, *(plan or []))] + [
        o.parse_plan(
            None, draft=draft, draft_tokens=draft_tokens, draft_confidence=draft_confidence
        ),
        o.parse_plan(None, exit_depth=exit_depth),
        o.parse_plan(None, exit_depth=exit_depth, head=head),
        o.parse_plan(None, threshold=threshold, kv=kv),
        o.parse_plan(None, threshold=threshold, check=check, kv=kv),
    ]
    plans = [plan for i, plan in enumerate(found) if plan not in found[:i]]  # unset is full again
    if prompts is not None and (context or batch_size):
        raise UsageError(
            "--prompts are as long as they are, one at a time: no --context, no --batch-size"
        )
    if prompts is None and (limit or raw):
        raise UsageError("--limit and --raw are about --prompts; give a file")
    given = o.read_prompt_options(None, prompts, limit)
    sizes = (
        o.parse_counts("--context", context or "256"),
        o.parse_counts("--batch-size", batch_size or "1"),
    )
    held: Any = product(
        o.parse_choices("--backbone", backbone, list(o.BackboneName)),
        o.parse_choices("--weights", weights, list(o.Weights)),
    )
    asked = None if against is None else o.parse_choices("--against", against, (*_ENGINES, "none"))
    python = _interpreter(peers)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise OfframpError("--plot needs matplotlib: pip install 'offramp[plot]'")
    import torch

    from offramp import load
    from offramp.bench import own
    from offramp.bench.figures import rows
    from offramp.bench.peers import able, opening_order, peer_contestants
    from offramp.cli.output import environment, finish

    torch.set_num_threads(threads or torch.get_num_threads())
    names, whole = able(asked and [name for name in asked if name != "none"], model)
    loaded = load(model, backbone="hf", trust_remote_code=trust_remote_code)
    cases = (
        [own.given_case(loaded.tokenizer, given, tokens, raw=raw)]
        if given
        else [own.make_case(loaded.tokenizer, b, c, tokens) for c, b in product(*sizes)]
    )
    longest = tokens + max(len(ids) for case in cases for ids in case.prompts)
    own.check(loaded, plans, longest)
    contestants = [
        one for kind, form in held for one in own.own_contestants(loaded, model, kind, form, plans)
    ]
    with ExitStack() as stack:
        order = opening_order(whole, longest, draft, trust_remote_code)
        others, versions = peer_contestants(names, python, order, stack)
        races = _compete([*contestants, *others], cases, rounds)
    timed = [row for run in races for row in rows(run)]
    if all(row.reason for row in timed):
        raise OfframpError(f"nothing could be timed; {timed[0].name}: {timed[0].reason}")
    ceilings = _ceilings(races)
    if not json:
        _show(timed, ceilings)
    facts = environment()
    record = {
        "verb": "bench",
        "command": shlex.join(["offramp", *sys.argv[1:]]),
        "model": loaded.name,
        "plan": [plan.model_dump(mode="json") for plan in plans],
        "seed": None,
        "versions": facts["versions"] | versions,
        "machine": facts["machine"] | ceilings,
        "rounds": rounds,
        "rows": [dataclasses.asdict(row) for row in timed],
    }
    finish(record, as_json=json, out=out)
    if plot is not None:
        _draw(timed, plot)


def _interpreter(given: Path | None) -> Path | None:
    """Return the peers' interpreter, its link not followed: that is what makes it theirs."""
    if given is not None and not given.is_file():
        raise UsageError(f"--peers {given}: there is no such interpreter")
    found = given or (_PEERS if _PEERS.is_file() else None)
    return found and found.absolute()


def _compete(contestants: Sequence[Contestant], cases: Sequence[Case], rounds: int) -> list[Race]:
    """Run all cases under one progress bar."""
    from tqdm import tqdm

    from offramp.bench.own import ceiling_meter
    from offramp.bench.race import race

    meter, turns = ceiling_meter(), len(cases) * len(contestants) * (rounds + 1)
    with tqdm(total=turns, unit="turn", leave=False) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        return [race(contestants, case, rounds, meter, tick) for case in cases]


def _ceilings(races: Sequence[Race]) -> dict[str, float]:
    """Return the medians over all rounds."""
    measured = [ceiling for run in races for ceiling in run.ceilings]
    return {
        "memory_gb_per_second": median(c.bytes_per_second for c in measured) / 1e9,
        **{
            f"{kind}_gflops": median(c.operations[kind] for c in measured) / 1e9
            for kind in measured[0].operations
        },
    }


def _show(rows: Sequence[Row], ceilings: dict[str, float]) -> None:
    """Print a table per batch size and context, then who was not timed, and what was timed."""
    from rich.console import Console

    from offramp.cli.output import table

    wide = None if sys.stdout.isatty() else 120  # a file has no edge to wrap at
    console = Console(highlight=False, width=wide)
    head = ("tokens per second", "prefill", "decode", "quartiles", "to full", "predicted")
    for (batch, context), group in groupby(rows, key=lambda row: (row.batch, row.context)):
        these = list(group)
        shown = [_cells(row) for row in these if not row.reason]
        title = f"batch {batch}, context {context}"
        table(title, (*head, "of memory", "of products", "mismatches"), shown, console)
        for row in these:
            if row.reason:
                console.print(f"{row.name}: not timed: {row.reason}", markup=False)
    ends = "_gflops"
    products = [
        f"{ceiling:.0f} in {kind.removesuffix(ends)}"
        for kind, ceiling in ceilings.items()
        if kind.endswith(ends)
    ]
    console.print(
        f"The machine: {ceilings['memory_gb_per_second']:.1f} GB/s read from memory; billions of "
        f"operations per second in matrix products: {', '.join(products)}."
    )
    for name, note in {row.name: row.note for row in rows if row.note}.items():
        console.print(f"{name}: {note}.", markup=False)


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.decode_quartiles or (0, 0)
    wrong = "-" if row.mismatches is None else f"{row.mismatches} of {row.compared}"
    return (
        row.name,
        f"{row.prefill_tokens_per_second:.0f}",
        f"{row.decode_tokens_per_second:.1f}",
        f"{low:.0f}-{high:.0f}",
        "-" if row.ratio_to_full is None else f"{row.ratio_to_full:.2f}",
        "-" if row.predicted_ratio is None else f"{row.predicted_ratio:.2f}",
        *(
            "-" if share is None else f"{share:.0%}"
            for share in (row.ceiling_share, row.prefill_ceiling_share)
        ),
        wrong if row.lossless else f"n/a (lossy), {wrong}",
    )


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw decoding speeds with their quartiles, a panel per batch size and context."""
    from matplotlib.figure import Figure

    from offramp.files import write_whole

    known = [row for row in rows if not row.reason]
    panels = [(k, list(g)) for k, g in groupby(known, key=lambda row: (row.batch, row.context))]
    figure = Figure(figsize=(8, 1.2 * len(panels) + 0.35 * len(known)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((batch, context), group) in zip(grid, panels, strict=True):
        for row in reversed(group):
            low, high = row.decode_quartiles or (0, 0)
            axes.barh(row.name, row.decode_tokens_per_second, color="#7c7b78")
            axes.plot((low, high), (row.name, row.name), color="black")
        axes.set_title(f"batch {batch}, context {context}: new tokens per second", loc="left")
    write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=150))
