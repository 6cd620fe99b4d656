"""Sorted fine-tuning (SoFT): the mean loss of nested sub-models, the whole model among them.

Kavehzadeh et al. 2024, eq. 1. With ``each_step="sample"`` one sub-model is drawn per step and only
its layers run, as in the parent method SortedNet: a step then costs what the sub-model costs. With
``all`` and equal weights this is LITE's formula; the papers differ in exits and in what they do
with the result.
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
    """Return the mean over the sub-models."""
    depths = (*net.exits, net.num_layers)
    return teach(net, batch, dict.fromkeys(depths, 1 / len(depths)), moment)
