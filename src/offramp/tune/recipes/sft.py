"""Ordinary fine-tuning of the last layer: the baseline of every other recipe."""

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
    """Return the last layer's loss."""
    return teach(net, batch, {net.num_layers: 1.0}, moment)
