"""The main job on the default model: a real answer, plain and lossless-speculative, and its cost.

make demo
"""

from __future__ import annotations

import sys

from rich.console import Console

import offramp
from offramp.cli.output import table

PROMPT = "Why is the sky blue? Answer in two sentences."
DRAFT_DEPTH, DRAFT_TOKENS = 24, 2


def main() -> None:
    """Generate twice, compare, and say honestly what it cost."""
    console = Console(highlight=False, width=100)
    model = offramp.load()
    depth = model.backbone.shape.num_layers
    kind = type(model.backbone).__name__
    console.print(f"{model.name}: {depth} layers, checked against the untouched model, {kind}.\n")

    draft = offramp.Speculate(draft=tuple(range(DRAFT_DEPTH)), tokens=DRAFT_TOKENS)
    model.generate(PROMPT, max_new_tokens=2)  # the first pass pages the weights in
    plain = model.generate(PROMPT, max_new_tokens=64)
    speculative = model.generate(PROMPT, plan=offramp.Plan(run=draft), max_new_tokens=64)

    console.print(f"[bold]{PROMPT}[/bold]\n{plain.text}\n")
    same = plain.outputs[0].token_ids == speculative.outputs[0].token_ids
    console.print(f"Plain and speculative answers are {'equal' if same else 'NOT EQUAL'}.\n")

    runs = {"plain, full depth": plain, f"lossless, draft at {DRAFT_DEPTH}": speculative}
    head = ("", "tokens", "layer passes", "head rows", "operations", "weights read", "tokens/s")
    rows = []
    for name, run in runs.items():
        f = run.figures.as_dict()
        ratios = (f"{f['flops_ratio']:.2f}", f"{f['bytes_ratio']:.2f}")
        counts = (f"{f['tokens']}", f"{f['layer_passes']}", f"{f['head_rows']}")
        rows.append((name, *counts, *ratios, f"{f['tokens_per_second']:.1f}"))
    table("cost (operations and weights read against full depth)", head, rows, console)
    ratio = speculative.figures.seconds / plain.figures.seconds
    word = "slower" if ratio > 1 else "faster"
    console.print(
        f"Speculation was {max(ratio, 1 / ratio):.2f} times {word} than plain decoding here. "
        "`offramp inspect` says beforehand\nwhether it can pay: this model was never tuned to "
        "speak from its intermediate layers."
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
