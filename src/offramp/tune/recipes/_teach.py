"""What the recipes share: which exits a step trains, and how labels and teacher are mixed."""

from __future__ import annotations

import torch

from offramp.tune.losses import Losses
from offramp.tune.network import Between, Net
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment


def teach(
    net: Net,
    batch: Batch,
    weights: dict[int, float],
    moment: Moment,
    between: Between | None = None,
) -> Losses:
    """Return the loss of depths with these weights, as the settings choose and distil them.

    An exit's loss is ``(1 - distill) * CE(labels) + distill * KL(teacher || exit)``. The last layer
    learns from the labels, or from the teacher where that is another model.
    """
    settings = moment.settings
    weights = chosen(weights, net.num_layers, moment)
    share = {
        depth: settings.distill if depth < net.num_layers or settings.teacher != "last" else 0.0
        for depth in weights
    }
    soft = {depth: weight * share[depth] for depth, weight in weights.items() if share[depth]}
    hard = {d: weight * (1 - share[d]) for d, weight in weights.items() if share[d] < 1}
    taught = net.teach(batch) if soft else None
    own = {net.num_layers} if soft and taught is None else set()
    states = net.states(batch, sorted({*weights, *own}), between)
    return net.losses(states, hard, soft, taught)


def chosen(weights: dict[int, float], last: int, moment: Moment) -> dict[int, float]:
    """Return the weights of the depths that this step trains; their mean over steps is as given."""
    exits = sorted(depth for depth in weights if depth < last)
    match moment.settings.each_step:
        case "rotate" if exits:
            turn = exits[moment.step % len(exits)]
            share = sum(weights[depth] for depth in exits)
            return {turn: share, **({last: weights[last]} if last in weights else {})}
        case "sample":
            depths = sorted(weights)
            drawn = torch.multinomial(
                torch.tensor([weights[depth] for depth in depths]), 1, generator=moment.shared
            )
            return {depths[int(drawn.item())]: sum(weights.values())}
        case _:
            return weights
