"""How peaked the next-token distribution is (BranchyNet's entropy, turned: more is safer)."""

import math

import torch
from torch import Tensor

from offramp.probe import Probe
from offramp.signals import signal


@signal(0, 1)
def entropy(probe: Probe) -> Tensor:
    """Return 1 - H(p) / ln V, in [0, 1]: 1 for a certain token, 0 for a uniform guess."""
    p = probe.probabilities
    disorder: Tensor = torch.special.entr(p).sum(-1) / math.log(p.shape[-1])
    return 1 - disorder
