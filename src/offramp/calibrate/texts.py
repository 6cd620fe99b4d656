"""The texts of a trace: which of them count, some of them, and what they are known by."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from offramp.trace import Trace


def counted(trace: Trace) -> Trace:
    """Return the trace without the texts that have no counted token."""
    return trace.part(np.flatnonzero(trace.rows).tolist())


def text_hash(trace: Trace) -> str:
    """Return the SHA-256 of a trace's texts, and of which of their tokens are counted."""
    digest = hashlib.sha256(repr((trace.lengths, trace.rows)).encode())
    digest.update(trace.ids.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def overlaps(data: dict[str, str], trained_on: dict[str, str]) -> list[str]:
    """Return the names in ``data`` whose contents the model was tuned on, by SHA-256."""
    known = set(trained_on.values())
    return [name for name, digest in data.items() if digest in known]
