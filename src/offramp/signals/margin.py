"""The gap between the two most probable tokens (CALM's softmax response; AdaInfer's *gap*)."""

from torch import Tensor

from offramp.probe import Probe
from offramp.signals import signal


@signal(0, 1)
def margin(probe: Probe) -> Tensor:
    """Return p1 - p2, in [0, 1]."""
    best = probe.probabilities.topk(2, -1).values
    return best[:, 0] - best[:, 1]
