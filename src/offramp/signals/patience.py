"""For how many exits in a row the choice has not changed (PABEE's patience)."""

import math

import torch
from torch import Tensor

from offramp.probe import Probe
from offramp.signals import score, signal


@signal(0, math.inf, looks_back=True)
def patience(probe: Probe) -> Tensor:
    """Return the number of directly preceding exits with the same most probable token."""
    if probe.previous is None:
        return torch.zeros_like(probe.top, dtype=torch.float32)
    same = probe.top == probe.previous.top
    return torch.where(same, score(probe.previous, "patience") + 1, 0.0)
