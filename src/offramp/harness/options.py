"""The values of ``--model_args``: read, or refused in one sentence."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from offramp.errors import UsageError
from offramp.plan import Plan, read_plan

_log = logging.getLogger("lm_eval.offramp")  # the harness shows what its own loggers say

_DEFAULT_LENGTH = 2048
"""Most tokens to read, where a model does not say: as the harness's own models have it."""
_BATCH = 8


def plan_of(plan: str | Plan | None) -> Plan:
    """Return a plan, the one in a JSON file, or every layer where there is none."""
    if isinstance(plan, Plan):
        return plan
    return Plan() if plan in (None, "full") else read_plan(Path(str(plan)))


def device_of(device: str) -> str:
    """Return where the model runs: what the harness says unasked cannot be meant without CUDA."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        _log.info("there is no CUDA here: running on the CPU")
        return "cpu"
    return device


def batch_of(size: int | str) -> int:
    """Return the number of texts at once; the harness hands on what was typed."""
    if size == "auto":
        return _BATCH
    if not str(size).isdecimal() or int(size) < 1:
        raise UsageError(f"batch_size must be 'auto' or a number, 1 or more, not {size!r}")
    return int(size)


def length_of(wanted_length: int | None, context: int) -> int:
    """Return the most tokens read before one that is predicted."""
    if wanted_length is None:
        return context - 1 if context < 2**31 else _DEFAULT_LENGTH
    if not 1 <= wanted_length < context:
        raise UsageError(
            f"max_length must be from 1 to {context - 1}, the model's context less the token "
            f"predicted, not {wanted_length}"
        )
    return wanted_length
