"""Prices: from counted rows and passes to operations and bytes of weights, and what would pay.

One model of cost for every door. All terms are there: layers, attention by context, exit checks,
key and value fill, draft work thrown away. Two views, because machines differ: *flops* is what a
compute-bound step costs, *bytes* (weights read) what a memory-bound one does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.backbone import Shape
from offramp.meter import Meter


def flops(work: Meter, shape: Shape, check_weights: int = 0) -> float:
    """Return operations: two per weight and row, four per key, head dimension and row.

    ``check_weights`` are those that one row of a cheap exit check multiplies.
    """
    return 2.0 * (
        shape.layer_weights * work.layer_tokens
        + shape.head_weights * work.head_rows
        + check_weights * work.check_rows
        + shape.fill_weights * work.fill_rows
        + 2 * shape.attention_size * work.attended
    )


def weight_bytes(work: Meter, shape: Shape, check_weights: int = 0) -> float:
    """Return bytes of weights read, each pass reading its module's weights once.

    A cheap check's weights are held as precisely as the layers', not as the head's.
    """
    checks = check_weights * work.check_passes
    layers = shape.layer_weights * work.layer_passes + shape.fill_weights * work.fill_passes
    head = shape.head_weights * work.head_passes
    return shape.bytes_per_weight * (layers + checks) + shape.head_bytes_per_weight * head


def full_depth(
    texts: Sequence[tuple[int, int]],
    shape: Shape,
    batch_size: int,
    *,
    batched: bool = True,
    ragged: bool = False,
) -> Meter:
    """Return the work of plain decoding of ``(prompt tokens, new tokens)`` at full depth.

    Follows the same pool: a text that ends makes room for the next; rows that come one per text
    share a pass, prompts of equal length too (of any length on a ragged backbone), unless the
    backbone runs texts one by one.
    """
    work = Meter()
    queue, active = list(reversed(texts)), list[tuple[int, int]]()
    while queue or active:
        fresh = [queue.pop() for _ in range(min(batch_size - len(active), len(queue)))]
        groups = [prompt for prompt, _ in fresh] + [1] * len(active)
        passes = 1 if ragged else len(set(groups)) if batched else len(groups)
        work.layer_passes += shape.num_layers * passes
        work.head_passes += 1
        active = [(prompt, left - 1) for prompt, left in active + fresh if left > 1]
    for prompt, new in texts:
        rows = prompt + new - 1
        work.head_rows += new
        work.layer_tokens += shape.num_layers * rows
        work.attended += shape.num_layers * rows * (rows + 1) // 2
    return work


def check_in_layers(shape: Shape) -> float:
    """Return the bytes of weights that one full-vocabulary exit check reads, one layer = 1."""
    precision = shape.head_bytes_per_weight / shape.bytes_per_weight
    return precision * shape.head_weights / shape.layer_weights


def cheap_check_in_layers(shape: Shape, check_weights: int) -> float:
    """Return the same of a cheap check, held as precisely as the layers, of so many weights."""
    return check_weights / shape.layer_weights


def fill_in_layers(shape: Shape) -> float:
    """Return the cost of one layer's keys and values, one layer = 1."""
    return shape.kv_weights / shape.layer_weights


def break_even_depth(shape: Shape, check_weights: int = 0) -> float:
    """Return the deepest exit that pays when every layer is checked and skipped layers filled.

    A token leaving at e costs e checks, e layers and L - e fills; the full model L layers and one
    head: e = (L + h - f L) / (1 + h - f). A cheap check of c layers leaves the head to run once
    for the token, as in the full model: e = (L - f L) / (1 + c - f).
    """
    h, f, depth = check_in_layers(shape), fill_in_layers(shape), shape.num_layers
    if check_weights:
        return depth * (1 - f) / (1 + cheap_check_in_layers(shape, check_weights) - f)
    return (depth + h - f * depth) / (1 + h - f)


def exit_ratio(shape: Shape, exits: Sequence[int], shares: Sequence[float]) -> float:
    """Return the predicted weight reads per token against full depth, exits that wait.

    Args:
        shape: the model.
        exits: where a full-vocabulary check is made, ascending.
        shares: the share of tokens that leave at each exit; the rest runs to the end.
    """
    h, depth = check_in_layers(shape), shape.num_layers
    stay, cost = 1.0, 0.0
    for checks, (stop, share) in enumerate(zip(exits, shares, strict=True), 1):
        cost += share * (stop + checks * h)
        stay -= share
    cost += stay * (depth + (len(exits) + 1) * h)
    return cost / (depth + h)


def speculation_ratio(shape: Shape, depth: int, tokens: int, agreement: float) -> float:
    """Return the predicted weight reads per token of self-speculation against plain decoding.

    Each of ``tokens`` drafts costs ``depth`` layers and a head; the confirming step reads the other
    layers' weights once for all rows. A run of right drafts is geometric in ``agreement``
    (Leviathan et al. 2023, equation 1).
    """
    h, layers = check_in_layers(shape), shape.num_layers
    written = sum(agreement**i for i in range(tokens + 1))
    # The last drafted token has not run the draft's layers yet, so the confirming step reads them.
    return (tokens * (depth + h) + layers + h) / (written * (layers + h))


@dataclass(frozen=True)
class Figures:
    """What a run did and what it cost; the keys every command shares."""

    tokens: int
    seconds: float
    depths: Sequence[int]
    work: Meter
    baseline: Meter
    shape: Shape
    check_weights: int = 0
    """Weights that one row of the run's cheap exit check multiplies."""

    def as_dict(self) -> dict[str, object]:
        """Return the figures by name; ratios are against full depth over the same tokens."""
        counted = sorted(Counter(self.depths).items())
        done, whole = (self.work, self.shape, self.check_weights), (self.baseline, self.shape)
        return {
            "tokens": self.tokens,
            **self.work.as_dict(),
            "flops_ratio": _ratio(flops(*done), flops(*whole)),
            "bytes_ratio": _ratio(weight_bytes(*done), weight_bytes(*whole)),
            "seconds": self.seconds,
            "tokens_per_second": _ratio(self.tokens, self.seconds),
            "mean_depth": sum(self.depths) / max(len(self.depths), 1),
            "depth_histogram": {str(depth): count for depth, count in counted},
        }


def _ratio(part: float, whole: float) -> float:
    """Return part / whole; before anything was done, nan."""
    return part / whole if whole else math.nan
