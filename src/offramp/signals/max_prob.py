"""The largest next-token probability (LITE; Sorted LLaMA, section 3.3; CALM's ``max``)."""

from torch import Tensor

from offramp.probe import Probe
from offramp.signals import signal


@signal(0, 1)
def max_prob(probe: Probe) -> Tensor:
    """Return the probability of the most probable token, in [0, 1]."""
    return probe.probabilities.amax(-1)
