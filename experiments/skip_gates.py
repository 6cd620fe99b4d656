r"""Does the state help a skip gate? Gates of hidden states, of a fixed input, and chosen paths.

    python experiments/tuning.py skip --only sft hidden-1 fixed-1 --data data --runs runs
    python experiments/skip_gates.py --sft runs/skip-sft \
        --gates runs/skip-hidden-1 runs/skip-fixed-1 \
        --data data/alpaca_52k/alpaca_data_52k.jsonl.gz --out results/skip_gates.json

The second question of *Dynamic layer selection* (Glavas et al. 2024). Every arm writes the very
answers of Alpaca rows that no tuning saw, token by token, in the loop that generates: prompts run
every layer but for their last token, and a layer that a token passes by is not run. Beside gates
stand all layers of the plainly tuned model, and its layers chosen by cosine, and evenly (ULS), as
many as each gate runs on average: as static gates, so that nothing else differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import command
from papers import shown_rows
from selection_figures import gates as comparison
from torch import Tensor
from torch.nn.functional import cross_entropy

import offramp
from offramp.card import GATES, read_card
from offramp.cli.output import environment, finish
from offramp.cost import flops, full_depth
from offramp.paths import unified_skip
from offramp.request import Request
from offramp.search.passes import opened
from offramp.search.subsets import Shrinking
from offramp.skipping import RUN, SKIP, SkipFacts, SkipGates, load_skip_gates, skip
from offramp.tune.data import Example, tokenise
from offramp.tune.rows import read_rows

SEEN = 51_000
"""Usable rows that tuning may see (its --limit); those after them are held out."""
SEARCHED = 8
"""Held-out rows that paths are searched on; the others judge."""
DEVIATIONS = (
    "the model: the paper's is OPT-IML 1.3B, and gates are tuned for one or two epochs of Alpaca",
    "the price of a layer (alpha): the paper's is 2 to 10, and 10 where it prints figures",
    "loss and right tokens of the very answers of few held-out rows, no ROUGE-L of written ones",
    "gates decide; the paper's draw noise at test time, too",
    "evenly spread layers are not tuned for their number, as the paper's are",
)


def main() -> None:
    """Judge every arm, print a line for each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft", required=True, help="tuned plainly, as long")
    parser.add_argument("--gates", nargs="+", required=True, help="tuned with --recipe skip")
    parser.add_argument("--data", required=True, help="Alpaca rows")
    parser.add_argument("--limit", type=int, default=40, help="held-out rows to judge on")
    parser.add_argument("--length", type=int, default=160, help="most tokens of a row")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plain = offramp.load(options.sft)
    unseen = read_rows([options.data], skip_bad=True)
    unseen.rows = unseen.rows[SEEN : SEEN + options.limit + SEARCHED]
    examples = tokenise(unseen, plain.tokenizer, max_length=options.length).examples
    searched, judged = examples[:SEARCHED], examples[SEARCHED:]
    rows = [arm(plain, static(plain, range(plain.backbone.shape.num_layers)), judged, "all layers")]
    for folder in options.gates:
        model, gates = offramp.load(folder), load_skip_gates(Path(folder) / GATES)
        card = read_card(Path(folder))
        assert card is not None, "no folder of a tuned model"
        alpha = card.recipe.settings["alpha"]
        rows.append(arm(model, gates, judged, f"gates, {gates.facts.gate_input} input", alpha))
    rows += list(paths(plain, searched, judged, sorted({round(r["layers"]) for r in rows[1:]})))
    tuned = read_card(Path(options.sft))
    record = {
        "command": command(),
        "model": tuned.base.name if tuned else plain.name,
        "num_layers": plain.backbone.shape.num_layers,
        "seed": None,
        "backbone": plain.backbone.name,
        "weights": plain.backbone.weights,
        **environment(),
        "deviations": DEVIATIONS,
        "tuned_on": tuned.data.tokens if tuned and tuned.data else None,
        "texts": len(judged),
        "tokens": sum(len(one.ids) - one.first for one in judged),
        "rows": rows,
    }
    record["comparison"] = comparison(record)
    print(shown_rows(record["comparison"]))
    finish(record, as_json=False, out=options.out)


def arm(
    model: offramp.Model,
    gates: SkipGates,
    examples: Sequence[Example],
    name: str,
    alpha: float | None = None,
) -> dict[str, Any]:
    """Return what one way of running makes of the answers."""
    backbone = model.backbone
    forced = [Forced(one.ids[one.first :]) for one in examples]
    requests = [
        Request(one.ids[: one.first], len(one.ids) - one.first, told)
        for one, told in zip(examples, forced, strict=True)
    ]
    before = backbone.meter.copy()
    depths = [token.depth for token in skip(backbone, requests, gates, batch_size=1)]
    work = backbone.meter - before
    sizes = [(one.first, len(one.ids) - one.first) for one in examples]
    whole = full_depth(sizes, backbone.shape, 1, batched=backbone.batched, ragged=backbone.ragged)
    losses = torch.cat([told.losses for told in forced])
    row = {
        "arm": name,
        "alpha": alpha,
        "layers": sum(depths) / len(depths),
        "spread": torch.tensor(depths).double().std().item(),
        "loss": losses.mean().item(),
        "right": sum(told.right for told in forced) / len(losses),
        "operations": flops(work, backbone.shape) / flops(whole, backbone.shape),
    }
    print(row, flush=True)
    return row


@dataclass
class Forced:
    """A chooser that says the tokens it was given, and notes what they cost."""

    tokens: list[int]
    right: int = 0

    def __post_init__(self) -> None:
        self.losses = torch.zeros(0)

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        """Return the next tokens."""
        at = len(self.losses)
        told = torch.tensor(self.tokens[at : at + len(logits)])
        self.losses = torch.cat([self.losses, cross_entropy(logits, told, reduction="none")])
        self.right += int((logits.argmax(-1) == told).sum())
        return told.tolist()


def static(model: offramp.Model, layers: Iterable[int]) -> SkipGates:
    """Return gates that let every token run these layers, whatever they see."""
    shape, kept = model.backbone.shape, set(layers)
    others = [layer for layer in range(shape.num_layers) if layer not in kept]
    bias = torch.zeros(2)
    bias[SKIP], bias[RUN] = 1.0, -1.0
    return SkipGates(
        SkipFacts(
            num_layers=shape.num_layers,
            fingerprint=model.backbone.fingerprint,
            gate_input="fixed",
        ),
        {layer: torch.zeros(2, shape.hidden_size) for layer in others or [0]},
        dict.fromkeys(others or [0], bias if others else -bias),
    )


def paths(
    model: offramp.Model, searched: Sequence[Example], judged: Sequence[Example], keep: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield the plain model's rows by so many chosen layers, and by as many evenly spread."""
    depth = model.backbone.shape.num_layers
    keep = [count for count in keep if count < depth]
    if not keep:
        return
    found: dict[int, Sequence[int]] = {}
    with opened(model.backbone, [(one.ids, one.first) for one in searched]) as passes:
        shrinking = Shrinking(passes)
        while len(shrinking.path) > min(keep):
            shrinking.remove(shrinking.most_alike(lambda _share: None)[0])
            found[len(shrinking.path)] = tuple(shrinking.path)
    for count in keep:
        yield arm(model, static(model, found[count]), judged, f"{count} by cosine")
        yield arm(model, static(model, unified_skip(count, depth)), judged, f"{count} evenly (ULS)")


if __name__ == "__main__":
    main()
