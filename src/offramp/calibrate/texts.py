"""The texts of a trace: which of them count, some of them, and what they are known by."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from offramp.calibrate.certify import Indices
from offramp.trace import Trace


def counted(trace: Trace) -> Trace:
    """Return the trace without the texts that have no counted token."""
    return selected(trace, np.flatnonzero(trace.rows))


def selected(trace: Trace, sequences: Indices) -> Trace:
    """Return the trace of some of its texts, in the order given."""
    kept = sequences.tolist()
    if kept == list(range(len(trace.rows))):
        return trace
    ids = trace.ids.split(list(trace.lengths))
    rows = torch.arange(sum(trace.rows)).split(list(trace.rows))
    index = torch.cat([rows[i] for i in kept])
    return replace(
        trace,
        ids=torch.cat([ids[i] for i in kept]),
        lengths=tuple(trace.lengths[i] for i in kept),
        rows=tuple(trace.rows[i] for i in kept),
        chosen=trace.chosen[index],
        loss=trace.loss[index],
        scores={name: column[index] for name, column in trace.scores.items()},
        hidden=None if trace.hidden is None else trace.hidden[index],
    )


def text_hash(trace: Trace) -> str:
    """Return the SHA-256 of a trace's texts, and of which of their tokens are counted."""
    digest = hashlib.sha256(repr((trace.lengths, trace.rows)).encode())
    digest.update(trace.ids.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def overlaps(data: dict[str, str], trained_on: dict[str, str]) -> list[str]:
    """Return the names in ``data`` whose contents the model was tuned on, by SHA-256."""
    known = set(trained_on.values())
    return [name for name, digest in data.items() if digest in known]
