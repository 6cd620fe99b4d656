"""What the papers set, carried over to a model of any depth; and what "saved" means. Pure.

Thresholds of LITE are as quoted by others (the paper itself was not at hand); those of Sorted LLaMA
are in its section 3.3. Depths are numbers of layers run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from offramp.backbone import Shape
from offramp.cost import flops, full_depth
from offramp.meter import Meter


@dataclass(frozen=True)
class Setting:
    """At which depths a paper asks, and what confidence it asks for."""

    num_layers: int
    thresholds: dict[int, float]
    """Lowest largest probability that leaves, by exit."""
    head: float
    """Reading the whole vocabulary once, of the paper's model; one of its layers = 1."""
    fill: float
    """The keys and values of one skipped layer, likewise."""

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Return the paper's exits at the same shares of another depth, 1 to L-1, each once."""
        placed = [round(stop * num_layers / self.num_layers) for stop in self.thresholds]
        return tuple(dict.fromkeys(min(max(stop, 1), num_layers - 1) for stop in placed))

    def at(self, exits: Iterable[int], num_layers: int) -> dict[int, float]:
        """Return for each exit the threshold of the paper's nearest one, by share of the depth.

        Of two that are equally near, the shallower one's, which is not the laxer.
        """
        return {
            stop: self.thresholds[
                min(
                    self.thresholds,
                    key=lambda own: abs(own * num_layers - stop * self.num_layers),
                )
            ]
            for stop in exits
        }


LITE_7B = Setting(
    32, {8: 0.95, 12: 0.95, 16: 0.9, 20: 0.9, 24: 0.8, 28: 0.7}, head=0.648, fill=0.166
)
LITE_SAVED = {"7B": 0.3786, "13B": 0.4635}
"""Share of inference compute saved (LITE, abstract)."""
SOFT_13B = Setting(
    40,
    {12: 0.95, 16: 0.95, 20: 0.9, 24: 0.9, 28: 0.8, 32: 0.8, 36: 0.7},
    head=0.516,
    fill=0.165,
)


def layers_saved(depths: Iterable[int], num_layers: int) -> float | None:
    """Return the share of layers that tokens of these depths did not run; None without tokens."""
    known = list(depths)
    return 1 - fmean(known) / num_layers if known else None


def token_cost(
    depth: int, exits: Sequence[int], num_layers: int, head: float, fill: float
) -> float:
    """Return what a token costs in layers, every check and the fill of skipped layers counted.

    Every exit up to its depth reads the whole vocabulary; the last reading chooses the token.
    """
    looks = sum(stop <= depth for stop in exits) + (depth == num_layers)
    return depth + head * looks + fill * (num_layers - depth)


def saved_at(
    depths: Iterable[int], exits: Sequence[int], num_layers: int, head: float, fill: float
) -> float | None:
    """Return what these depths save where head and fill cost so much, the context apart."""
    costs = [token_cost(depth, exits, num_layers, head, fill) for depth in depths]
    return 1 - fmean(costs) / (num_layers + head) if costs else None


@dataclass(frozen=True)
class Saved:
    """Shares of the operations of plain decoding of the very same tokens that were not done.

    All that was counted is in them: layers, attention, every check, head and fill.
    """

    generated: float | None
    """Without what comes before the second token, which all run alike; None without such tokens."""
    whole: float
    """Prompts included."""


def operations_saved(
    work: Meter, sizes: Sequence[tuple[int, int]], shape: Shape, check_weights: int = 0
) -> Saved:
    """Return what this work saved, over texts of (prompt tokens, new tokens)."""
    done = flops(work, shape, check_weights)
    plain = flops(full_depth(sizes, shape, batch_size=1), shape)
    prompts = flops(full_depth([(prompt, 1) for prompt, _ in sizes], shape, batch_size=1), shape)
    later = plain - prompts
    return Saved(1 - (done - prompts) / later if later else None, 1 - done / plain)


def percent(share: float | None) -> str:
    """Return a share as one writes it; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"


def compared(what: str, paper: str, here: str, same: str) -> dict[str, Any]:
    """Return a row of *paper | here | same metric, same definition?*."""
    return {"what": what, "paper": paper, "here": here, "same": same}


def shown_rows(rows: Iterable[dict[str, Any]]) -> str:
    """Return such rows as a table for people."""
    lines = ["| | paper | here | same metric, same definition? |", "|---|---:|---:|---|"]
    lines += [f"| {row['what']} | {row['paper']} | {row['here']} | {row['same']} |" for row in rows]
    return "\n".join(lines)
