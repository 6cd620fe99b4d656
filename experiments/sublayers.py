"""Would skipping attention or MLP alone beat skipping whole layers? By hooks, before any code.

    python experiments/sublayers.py --data wikitext2_test.txt.gz --out results/sublayers.json

Every part (a whole layer, its attention, its MLP) is taken out alone; what the loss then gains, per
weight saved, ranks the parts, whole layers and halves apart. The best ones go together until a
share of the layers' weights is saved, and what is left is judged on other texts. Skipped parts are
run here and their output dropped: this measures what is lost, not what is saved. Layer 0 stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from skip_exit import cut
from torch import Tensor, nn

import offramp
from offramp.cli.output import environment, finish

Part = tuple[int, str]


def main() -> None:
    """Rank parts, take the best out together, print a line for each share, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="plain text, perhaps gzipped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    options = parser.parse_args()
    model = offramp.load(backbone="hf")
    texts = [torch.tensor([ids]) for ids, _ in cut(model, options.data, 128, 12)]
    ranked, judged = torch.cat(texts[:4])[:, :64], torch.cat(texts[4:])
    inner = model.backbone.model.model  # type: ignore[attr-defined]
    net = model.backbone.model  # type: ignore[attr-defined]
    parts: dict[str, list[Part]] = {
        "layers": [(i, "layer") for i in range(1, len(inner.layers))],
        "halves": [(i, half) for i in range(1, len(inner.layers)) for half in ("attention", "mlp")],
    }
    base, before = loss(net, inner, ranked, ()), loss(net, inner, judged, ())
    rows: list[dict[str, Any]] = []
    for kind, candidates in parts.items():
        gains = {}
        for part in candidates:
            gains[part] = loss(net, inner, ranked, [part]) - base
            print(kind, part, round(gains[part], 3), flush=True)
        order = sorted(candidates, key=lambda part: gains[part] / weights(inner, [part]))
        whole = weights(inner, [(i, "layer") for i in range(len(inner.layers))])
        for share in options.shares:
            out: list[Part] = []
            for part in order:
                if weights(inner, [*out, part]) <= share * whole * 1.001:
                    out.append(part)
            rows.append(
                {
                    "parts": kind,
                    "share": weights(inner, out) / whole,
                    "loss": loss(net, inner, judged, out),
                    "out": sorted(out),
                }
            )
            print(rows[-1], flush=True)
        rows[-1]["alone"] = {f"{i} {half}": round(gain, 4) for (i, half), gain in gains.items()}
    record = {
        "command": "python experiments/sublayers.py --data wikitext2_test.txt.gz "
        "--out results/sublayers.json",
        "model": model.name,
        **environment(),
        "data": options.data.name,
        "tokens": judged[:, 1:].numel(),
        "full": {"loss": before},
        "rows": rows,
    }
    finish(record, as_json=False, out=options.out)


def modules(inner: Any, part: Part) -> list[nn.Module]:
    """Return what a part is made of: modules whose outputs are added to the stream."""
    layer, name = inner.layers[part[0]], part[1]
    found = {"attention": [layer.self_attn], "mlp": [layer.mlp]}
    return found.get(name, [layer.self_attn, layer.mlp])


def weights(inner: Any, parts: Iterable[Part]) -> int:
    """Return how many weights these parts hold."""
    return sum(
        p.numel() for part in parts for module in modules(inner, part) for p in module.parameters()
    )


@contextmanager
def without(inner: Any, parts: Iterable[Part]) -> Iterator[None]:
    """Let these parts add nothing."""

    def nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    hooks = [m.register_forward_hook(nothing) for part in parts for m in modules(inner, part)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def loss(net: Any, inner: Any, ids: Tensor, parts: Iterable[Part]) -> float:
    """Return the mean loss of the texts ``[B, T]`` without these parts."""
    with without(inner, parts):
        total = sum(
            net(input_ids=text, labels=text, use_cache=False).loss.item() for text in ids.split(2)
        )
    return float(total) / len(ids.split(2))


if __name__ == "__main__":
    main()
