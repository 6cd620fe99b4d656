"""What depth saves: lossless drafts, certified exits, and a narrow task in half the layers.

make demo
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rich.console import Console

import offramp
from offramp import shipped
from offramp.cli.output import table
from offramp.model import Result
from offramp.plan import read_plan

if TYPE_CHECKING:
    from offramp.fast.pack import Format

PROMPT = "Why is the sky blue? Answer in two sentences."
MEANINGS = (
    "name: The Amber Kettle | type: pub | food: Greek | price: cheap | area: riverside\nText:",
    "name: Blue Spice | type: coffee shop | area: city centre | rating: 5 out of 5\nText:",
)
MORE = ("Give me three tips for sleeping better.", "What is a lighthouse for?")
DRAFT_DEPTH, DRAFT_TOKENS = 24, 2
ROUNDS = 3


def main() -> None:
    """Generate, compare, and say honestly what it cost."""
    console = Console(highlight=False, width=100)
    same = _lossless(console)
    _certified(console)
    _refined(console)
    _narrow(console)
    sys.exit(not same)


def _lossless(console: Console) -> bool:
    """Draft with the first layers, confirm with all: the same text, whatever it costs."""
    model = offramp.load()
    depth, kind = model.backbone.shape.num_layers, type(model.backbone).__name__
    console.print(f"{model.name}: {depth} layers, checked against the untouched model, {kind}.\n")
    draft = offramp.Speculate(draft=tuple(range(DRAFT_DEPTH)), tokens=DRAFT_TOKENS)
    model.generate(PROMPT, max_new_tokens=2)  # the first pass pages the weights in
    plain = model.generate(PROMPT, max_new_tokens=64)
    speculative = model.generate(PROMPT, plan=offramp.Plan(run=draft), max_new_tokens=64)
    console.print(f"[bold]{PROMPT}[/bold]\n{plain.text}\n")
    same = plain.outputs[0].token_ids == speculative.outputs[0].token_ids
    console.print(f"Plain and speculative answers are {'equal' if same else 'NOT EQUAL'}.\n")
    runs = {"plain, full depth": plain, f"lossless, draft at {DRAFT_DEPTH}": speculative}
    _costs(console, runs)
    _compare(console, "Speculation", [speculative], [plain])
    console.print("`offramp inspect` says beforehand whether it can pay.\n")
    return same


def _certified(console: Console) -> None:
    """Leave at 24 of 30 layers, at an exit that was taught to speak, as often as is certified."""
    plan = read_plan(shipped.plan(shipped.EXITS))
    made = plan.certificate
    assert made is not None
    model = offramp.load(shipped.EXITS, weights=cast("Format", made.weights))
    console.print(
        f"{model.name} ({made.weights}): certified that at most {made.alpha:.0%} of a text's "
        f"tokens are not the\nfull model's choice ({made.method}, {made.n} texts, delta "
        f"{made.delta}); {made.held_out.risk:.1%} on texts kept apart.\n"
    )
    prompts = [PROMPT, *MORE]
    full, early = [], []
    for _ in range(ROUNDS):
        full.append(model.generate(prompts, max_new_tokens=64, batch_size=1))
        early.append(model.generate(prompts, plan=plan, max_new_tokens=64, batch_size=1))
    console.print(f"[bold]{PROMPT}[/bold]\n{early[0].outputs[0].text}\n")
    _costs(console, {"full depth": full[0], "certified exits": early[0]})
    depths = [depth for output in early[0].outputs for depth in output.depths]
    left = sum(depth < model.backbone.shape.num_layers for depth in depths) / len(depths)
    spared = 1 - early[0].figures.work.head_rows / len(depths)
    console.print(f"{left:.0%} of the tokens left early, {spared:.0%} were spared the full head.")
    _compare(console, f"Leaving, per token, median of {ROUNDS} rounds in turns,", early, full)


def _refined(console: Console) -> None:
    """Run all layers in 4 bits, and look at most of the vocabulary as roughly."""
    plan = read_plan(shipped.plan(shipped.REFINED))
    model = offramp.load(weights="int4")
    prompts = [PROMPT, *MORE]
    full, refined = [], []
    for _ in range(ROUNDS):
        full.append(model.generate(prompts, max_new_tokens=64, batch_size=1))
        refined.append(model.generate(prompts, plan=plan, max_new_tokens=64, batch_size=1))
    console.print(
        f"{model.name} (int4), a head that is read roughly, and exactly where it counts.\n"
    )
    _costs(console, {"full depth": full[0], "refined head": refined[0]})
    what = f"A refined head, per token, median of {ROUNDS} rounds in turns,"
    _compare(console, what, refined, full)
    console.print()


def _narrow(console: Console) -> None:
    """Say in a sentence what a list of attributes tells: half the layers were taught to."""
    plan = read_plan(shipped.plan(shipped.NARROW))
    narrow = offramp.load(shipped.NARROW, weights="int8")
    whole = offramp.load(weights="int8")
    kept, depth = narrow.backbone.shape.num_layers, whole.backbone.shape.num_layers
    console.print(f"{narrow.name}: {kept} of the {depth} layers, for one task (E2E).\n")
    small, full = [], []
    for _ in range(ROUNDS):
        small.append(narrow.generate(MEANINGS, plan=plan, max_new_tokens=48, batch_size=1))
        full.append(whole.generate(MEANINGS, raw=True, max_new_tokens=48, batch_size=1))
    for meaning, output in zip(MEANINGS, small[0].outputs, strict=True):
        console.print(f"[bold]{meaning.splitlines()[0]}[/bold]\n{output.text.strip()}")
    console.print()
    _costs(
        console, {f"all {depth} layers, untuned": full[0], f"{kept} layers, certified": small[0]}
    )
    _compare(console, f"{kept} layers, per token, median of {ROUNDS} rounds in turns,", small, full)
    console.print(
        "docs/tuning.md says how close their sentences are to those of all layers, tuned alike."
    )


def _costs(console: Console, runs: dict[str, Result]) -> None:
    head = ("", "tokens", "layer passes", "head rows", "operations", "weights read", "tokens/s")
    rows = []
    for name, run in runs.items():
        f = run.figures.as_dict()
        ratios = (f"{f['flops_ratio']:.2f}", f"{f['bytes_ratio']:.2f}")
        counts = (f"{f['tokens']}", f"{f['layer_passes']}", f"{f['head_rows']}")
        rows.append((name, *counts, *ratios, f"{f['tokens_per_second']:.1f}"))
    table("cost (operations and weights read against full depth)", head, rows, console)


def _compare(console: Console, what: str, ours: Sequence[Result], full: Sequence[Result]) -> None:
    """Say how much faster or slower a token was, median over the rounds."""
    ratio = statistics.median(
        _seconds(one) / _seconds(other) for one, other in zip(ours, full, strict=True)
    )
    word = "slower" if ratio > 1 else "faster"
    console.print(f"{what} was {max(ratio, 1 / ratio):.2f} times {word} than full depth here.")


def _seconds(run: Result) -> float:
    """Return the seconds of a token."""
    return run.figures.seconds / run.figures.tokens


if __name__ == "__main__":
    main()
