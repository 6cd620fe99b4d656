"""What tuning did, exit by exit: loss, agreement with the last layer, calibration of confidence.

Measured on text kept out of training, before and after; the last layer is one of the rows, so harm
to it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.files import write_whole
from offramp.reliability import Bins
from offramp.tune.data import Example
from offramp.tune.losses import CHUNK
from offramp.tune.network import Net
from offramp.tune.packing import Batch, collate, pack

CURVE = "reliability.png"


@dataclass
class _Sums:
    """What is added up at one depth."""

    loss: float = 0.0
    agree: float = 0.0
    bins: Bins = field(default_factory=Bins)

    def add(self, logits: Tensor, labels: Tensor, last: Tensor) -> None:
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        self.loss -= logs.gather(1, labels[:, None]).sum().item()
        best, choice = logs.max(-1)
        sure, right = best.exp().double().cpu(), (choice == last).double().cpu()
        self.agree += right.sum().item()
        self.bins.add(sure, right)

    def row(self, depth: int, rows: int) -> dict[str, Any]:
        confidence, right = self.bins.confidence, self.bins.right
        gap = (confidence - right).abs().sum().item() / rows
        return {
            "depth": depth,
            "loss": self.loss / rows,
            "agreement": self.agree / rows,
            "confidence": confidence.sum().item() / rows,
            "calibration_error": gap,
            "reliability": self.bins.curve(),
        }


@torch.no_grad()
def judge(
    net: Net, examples: Sequence[Example], length: int, device: Any, rows_at_once: int = 4
) -> list[dict[str, Any]]:
    """Return one row of figures per exit, and of the last layer, on the examples' labelled tokens.

    ``loss`` is in nats per token; ``agreement`` is the share of tokens on which an exit's choice is
    the last layer's; ``calibration_error`` the mean gap between confidence (the largest
    probability) and agreement over ten bins (ECE); ``reliability`` these bins.

    Args:
        net: the model with its exits.
        examples: text to judge on.
        length: tokens of a packed row.
        device: where the model is.
        rows_at_once: packed rows held at once.
    """
    depths = [*net.exits, net.num_layers]
    sums = {depth: _Sums() for depth in depths}
    rows = 0
    for batch in _batches(net, examples, length, device, rows_at_once):
        states = net.states(batch, depths)
        for start in range(0, len(states.labels), CHUNK):
            part = slice(start, start + CHUNK)
            labels = states.labels[part]
            rows += len(labels)
            deepest = net.reader(net.num_layers)(states.rows[net.num_layers][part])
            last = deepest.argmax(-1)
            for depth in depths:
                whole = depth == net.num_layers
                read = deepest if whole else net.reader(depth)(states.rows[depth][part])
                sums[depth].add(read, labels, last)
    return [sums[depth].row(depth, max(rows, 1)) for depth in depths]


def _batches(
    net: Net, examples: Sequence[Example], length: int, device: Any, rows_at_once: int
) -> Iterator[Batch]:
    packs = pack(examples, length, 0, 0, alone=net.alone)
    for start in range(0, len(packs), rows_at_once):
        yield collate(packs[start : start + rows_at_once], examples).to(device)


def draw_reliability(
    folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """Draw confidence against agreement of each exit, before and after tuning."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, rows) in enumerate((("before", before), ("after", after)), 1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for row in rows[:-1]:
            bins = [b for b in row["reliability"] if b["tokens"]]
            axes.plot(
                [b["confidence"] for b in bins],
                [b["agreement"] for b in bins],
                marker="o",
                markersize=3,
                label=f"depth {row['depth']}",
            )
        axes.set(title=title, xlabel="confidence", ylabel="agreement with the last layer")
        axes.legend()
    write_whole(folder / CURVE, lambda path: figure.savefig(path, format="png", dpi=120))
