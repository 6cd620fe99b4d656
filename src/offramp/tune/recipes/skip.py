"""Gumbel skip gates: per token and layer, learn whether to run the layer, at a price per layer.

*Dynamic layer selection in decoder-only transformers* (Glavas et al. 2024): gates on layers 1 to
L-2, hard Gumbel-softmax at temperature 1, over the state in front of the layer (detached, not
normed); the loss is that of the last layer plus ``alpha`` times the executed share of layers on
response tokens, the two layers that always run counted; prompts run every layer. With
``gate_input="fixed"`` a gate sees ones: a learnt static share, their ablation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment
from offramp.tune.recipes._teach import teach

RUN = 0
"""The gate's first output asks to run the layer, its second to skip it."""


def trainable(net: Net) -> None:
    """Train the model together with a gate for every layer but the first and the last."""
    net.train_model()
    for layer in range(1, net.num_layers - 1):
        net.gates[str(layer)] = nn.Linear(net.width, 2)


def loss(net: Net, batch: Batch, moment: Moment) -> Losses:
    """Return the last layer's loss plus the price of the layers that ran."""
    response = batch.labels >= 0
    ran: list[Tensor] = []

    def choose(layer: int, before: Tensor, after: Tensor) -> Tensor:
        if str(layer) not in net.gates:
            ran.append(response.sum().float())
            return after
        seen = before.detach()
        if moment.settings.gate_input == "fixed":
            seen = torch.ones_like(seen)
        wanted = net.gates[str(layer)](seen).float()
        keep = _hard_gumbel(wanted, moment.generator)[..., RUN]
        keep = torch.where(response, keep, torch.ones_like(keep))
        ran.append((keep * response).sum())
        return keep[..., None] * after + (1 - keep)[..., None] * before

    losses = teach(net, batch, {net.num_layers: 1.0}, moment, choose)
    executed = torch.stack(ran).mean()  # rows times share of layers: a sum, like the loss
    return replace(
        losses,
        total=losses.total + moment.settings.alpha * executed,
        soft={0: executed.item()},
    )


def _hard_gumbel(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return one-hot draws ``[..., 2]``, with the gradient of their softmax (straight through)."""
    uniform = torch.rand(scores.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
    noise = -torch.log(-torch.log(uniform)).to(scores.device)
    soft = torch.softmax(scores + noise, -1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()
