"""LayerSkip: layer dropout that grows with depth, and exit losses that weigh deep exits more.

After Elhoushi et al. 2024. Dropout of layer l is ``p_max (exp(l ln 2 / (L - 1)) - 1)``, the same
all along the run, as for a model that is pretrained already. The exit after l layers weighs
``0.2 (0 + 1 + ... + (l - 1))``, the last layer ``L - 1`` more than 0.2 times the sum below it, all
normalised; ``p_max`` of 0.1 and the 0.2 are our defaults. Their curricula are ``each_step``:
``rotate`` trains one exit a step in turn, ``all`` begins with the deepest and lets in the others
over the first half of the run (gradual).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment
from offramp.tune.recipes._teach import teach

_MOST_DROPPED = 0.1
_SCALE = 0.2


def trainable(net: Net) -> None:
    """Train the whole model."""
    net.train_model()


def loss(net: Net, batch: Batch, moment: Moment) -> Losses:
    """Return the weighted sum over the exits that are let in, with some layers dropped per row."""
    weights = _weights(net, moment)

    def drop(layer: int, before: Tensor, after: Tensor) -> Tensor:
        share = dropped_share(layer, net.num_layers)
        dropped = torch.rand(len(after), generator=moment.generator) < share
        return torch.where(dropped.to(after.device)[:, None, None], before, after)

    return teach(net, batch, weights, moment, drop)


def dropped_share(layer: int, num_layers: int) -> float:
    """Return the share of rows for which a layer is left out."""
    return _MOST_DROPPED * (math.exp(layer * math.log(2) / (num_layers - 1)) - 1)


def _weights(net: Net, moment: Moment) -> dict[int, float]:
    exits = net.exits
    if moment.settings.each_step == "all" and exits:
        let_in = 1 + int(len(exits) * min(2 * moment.step / max(moment.steps, 1), 1))
        exits = exits[-min(let_in, len(exits)) :]
    raw = {depth: _SCALE * (depth - 1) * depth / 2 for depth in exits}
    last = net.num_layers
    raw[last] = last - 1 + _SCALE * (last - 2) * (last - 1) / 2
    total = sum(raw.values())
    return {depth: weight / total for depth, weight in raw.items()}
