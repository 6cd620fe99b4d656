"""LITE: losses of the exits and of the last layer, through the shared norm and head.

After Varshney et al. 2024: the sum of ``w_i L_i`` over exits and last layer, divided by the sum of
the weights, which secondary sources tell to be equal.
"""

from __future__ import annotations

from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment
from offramp.tune.recipes._teach import teach


def trainable(net: Net) -> None:
    """Train the whole model."""
    net.train_model()


def loss(net: Net, batch: Batch, moment: Moment) -> Losses:
    """Return the normalised sum over exits and last layer."""
    depths = (*net.exits, net.num_layers)
    return teach(net, batch, dict.fromkeys(depths, 1 / len(depths)), moment)
