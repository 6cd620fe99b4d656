"""A frozen model whose exits get gates: does the state here say what the last layer will?

One logistic regression per exit on the state, as CALM's learnt classifier (Schuster et al. 2022),
trained over the data instead of fitted to one trace (:func:`offramp.fit_gate`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.gate import normed
from offramp.tune.losses import CHUNK, Losses
from offramp.tune.network import Net, States
from offramp.tune.packing import Batch
from offramp.tune.recipes import Moment


def trainable(net: Net) -> None:
    """Give every exit a gate, and train those."""
    for depth in net.exits:
        gate = nn.Linear(net.width, 1)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        net.gates[str(depth)] = gate


def loss(net: Net, batch: Batch, moment: Moment) -> Losses:
    """Return the mean over exits of the cross-entropy of "chooses what the last layer chooses"."""
    with torch.no_grad():
        states = net.states(batch, [*net.exits, net.num_layers])
        last = _choices(net, states, net.num_layers)
    total, parts = torch.zeros((), device=last.device), {}
    for depth in net.exits:
        agrees = (_choices(net, states, depth) == last).float()
        score = net.gates[str(depth)](normed(states.rows[depth]))[:, 0]
        missed = functional.binary_cross_entropy_with_logits(score.float(), agrees, reduction="sum")
        parts[depth] = missed.item()
        total = total + missed / len(net.exits)
    return Losses(total, parts, {})


@torch.no_grad()
def _choices(net: Net, states: States, depth: int) -> Tensor:
    """Return the token that each row chooses after so many layers, ``[N]``."""
    rows, read = states.rows[depth], net.reader(depth)
    parts = [read(rows[i : i + CHUNK]).argmax(-1) for i in range(0, len(rows), CHUNK)]
    return torch.cat(parts) if parts else states.labels
