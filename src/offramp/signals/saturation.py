"""How little the hidden state moved since the exit before (CALM, *hidden-state saturation*)."""

import torch
from torch import Tensor

from offramp.errors import UsageError
from offramp.probe import Probe
from offramp.signals import signal


@signal(-1, 1, looks_back=True)
def saturation(probe: Probe) -> Tensor:
    """Return the cosine to the state at the previous exit, in [-1, 1]; -1 at the first exit.

    Raises:
        UsageError: the probe comes from a trace that kept no hidden states.
    """
    if probe.hidden is None:
        raise UsageError("saturation needs hidden states; record the trace with keep_hidden=True")
    if probe.previous is None or probe.previous.hidden is None:
        return torch.full((len(probe.hidden),), -1.0, device=probe.hidden.device)
    return torch.cosine_similarity(probe.hidden.float(), probe.previous.hidden.float(), -1)
