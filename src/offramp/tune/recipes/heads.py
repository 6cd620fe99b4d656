"""A frozen model whose exits get readouts of their own, trained on the last layer's distribution.

A head per exit is SoFT's ICT baseline, an affine map the tuned lens, a decoder block per exit
Balcony. The full depth is untouched, bit for bit.
"""

from __future__ import annotations

from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment
from offramp.tune.recipes._teach import chosen


def trainable(net: Net) -> None:
    """Train the exits' readouts, nothing else."""
    net.readouts.requires_grad_()


def loss(net: Net, batch: Batch, moment: Moment) -> Losses:
    """Return the mean divergence of the exits from the last layer."""
    weights = chosen(dict.fromkeys(net.exits, 1 / len(net.exits)), net.num_layers, moment)
    states = net.states(batch, sorted({*weights, net.num_layers}))
    return net.losses(states, {}, weights)
