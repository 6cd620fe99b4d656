"""The texts of a trace: which of them count, some of them, and what they are known by."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from offramp.card import Data
from offramp.sketch import among
from offramp.trace import Trace


def counted(trace: Trace) -> Trace:
    """Return the trace without the texts that have no counted token."""
    return trace.part(np.flatnonzero(trace.rows).tolist())


def text_hash(trace: Trace) -> str:
    """Return the SHA-256 of a trace's texts, and of which of their tokens are counted."""
    digest = hashlib.sha256(repr((trace.lengths, trace.rows)).encode())
    digest.update(trace.ids.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def overlaps(data: dict[str, str], trace: Trace, tuned_on: Data) -> str:
    """Return what a model was tuned on of what it is calibrated on, in words; empty for nothing.

    Args:
        data: SHA-256 of what it is calibrated on, by name: a whole file is known by it.
        trace: of that text; its prompts are known one by one, where it noted them.
        tuned_on: the data of the model's card; an early one has no sketch of prompts.
    """
    files = [name for name, digest in data.items() if digest in tuned_on.files.values()]
    if files:
        return ", ".join(files)
    if trace.prompts is None or tuned_on.prompts is None:
        return ""
    shared, told = among(trace.prompts, tuned_on.prompts)
    said = f"{shared} of the {told} prompts that can be compared (or kept them out of its tuning)"
    return said if shared else ""
