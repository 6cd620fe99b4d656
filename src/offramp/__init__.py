"""offramp: depth-adaptive inference for Hugging Face causal language models.

    import offramp
    model = offramp.load()
    print(model.generate("Why is the sky blue?").text)

Names are imported when first used, so that ``import offramp`` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offramp.collector import resting

if TYPE_CHECKING:
    from offramp.adainfer.fit import fit_classifier
    from offramp.calibrate.drift import Monitor
    from offramp.certificate import Certificate
    from offramp.checks import GateFile, LowRank, Refined, Shortlist, Tokens
    from offramp.errors import OfframpError, UnsupportedModelError, UsageError
    from offramp.gate import fit_gate
    from offramp.hf.door import custom_generate
    from offramp.model import Model, Output, Piece, Result, load
    from offramp.plan import Plan, read_plan, write_plan
    from offramp.runs import Adapt, Exit, Full, Path, Route, Skip, Speculate
    from offramp.sample import Sampling
    from offramp.trace import Trace, load_trace, record, replay

__version__ = "0.1.0"

_HOMES = {
    "adainfer.fit": ("fit_classifier",),
    "calibrate.drift": ("Monitor",),
    "certificate": ("Certificate",),
    "checks": ("GateFile", "LowRank", "Refined", "Shortlist", "Tokens"),
    "errors": ("OfframpError", "UnsupportedModelError", "UsageError"),
    "gate": ("fit_gate",),
    "hf.door": ("custom_generate",),
    "model": ("Model", "Output", "Piece", "Result", "load"),
    "plan": (
        "Adapt",
        "Exit",
        "Full",
        "Path",
        "Plan",
        "Route",
        "Skip",
        "Speculate",
        "read_plan",
        "write_plan",
    ),
    "sample": ("Sampling",),
    "trace": ("Trace", "load_trace", "record", "replay"),
}

__all__ = [
    "Adapt",
    "Certificate",
    "Exit",
    "Full",
    "GateFile",
    "LowRank",
    "Model",
    "Monitor",
    "OfframpError",
    "Output",
    "Path",
    "Piece",
    "Plan",
    "Refined",
    "Result",
    "Route",
    "Sampling",
    "Shortlist",
    "Skip",
    "Speculate",
    "Tokens",
    "Trace",
    "UnsupportedModelError",
    "UsageError",
    "custom_generate",
    "fit_classifier",
    "fit_gate",
    "load",
    "load_trace",
    "read_plan",
    "record",
    "replay",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            with resting():
                return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
