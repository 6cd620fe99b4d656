"""Routers: which of several ways to run a whole text, judged by the first layers of its prompt.

One linear score per way (ridge regression on a table of scores, :mod:`offramp.allocate`) of the
prompt's length, of how sure an early exit is of the first new token, and of the mean state of the
prompt there; the way with the best score after its price per layer is taken. This is what the
oracle of *Dynamic layer selection in decoder-only transformers* (Glavas et al. 2024, section 4.3)
leaves open: it peeks at the answer, a router sees the prompt alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import OfframpError, UsageError
from offramp.files import write_tensors
from offramp.gate import normed
from offramp.policy import check_exits
from offramp.probe import Probe
from offramp.signals import score
from offramp.step import step

CONFIDENCES = ("max_prob", "margin", "entropy")
"""What a router sees of the first new token at each exit: signals of the full head's logits."""

_FORMAT = 1
_MOST_BYTES = 2**26
_MOST_RUNS = 64
_MOST_PRICE = 1e6


def num_features(exits: Sequence[int], hidden_size: int) -> int:
    """Return the width F of what a router sees: length, confidences, mean state."""
    return 1 + len(CONFIDENCES) * len(exits) + hidden_size


@dataclass(frozen=True)
class RouterWeights:
    """What a router has learnt, of which model, and of which ways to run it."""

    exits: tuple[int, ...]
    """Depths at which it looks at the prompt, ascending; the prompt waits at the last one."""
    num_layers: int
    fingerprint: str
    runs: tuple[str, ...]
    """The P ways it chooses among, each as a plan writes it (JSON)."""
    costs: Tensor
    """``[P]`` fp64: layers per token of each way."""
    weights: Tensor
    """``[P, F]`` fp32."""
    biases: Tensor
    """``[P]`` fp32."""
    fitted_on: Mapping[str, Any]
    """How many texts, and how well it does on texts it was not fitted on."""

    @property
    def depth(self) -> int:
        """Return how many layers of the prompt it needs."""
        return self.exits[-1]

    def scores(self, features: Tensor) -> Tensor:
        """Return the predicted score of each way, ``[S, P]``, from features ``[S, F]``."""
        return features.float().cpu() @ self.weights.T + self.biases

    def choose(self, features: Tensor, price: float) -> list[int]:
        """Return which way each text takes: best predicted score minus ``price`` per layer."""
        return choices(self.scores(features), self.costs, price).tolist()

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse another model than the one it was fitted on.

        Raises:
            UsageError: its fingerprint or its width differs.
        """
        width = num_features(self.exits, backbone.shape.hidden_size)
        if (self.fingerprint, self.weights.shape[1]) != (backbone.fingerprint, width):
            raise UsageError(
                f"this router was fitted on a model of {self.num_layers} layers and fingerprint "
                f"{self.fingerprint}, not on this one (fingerprint {backbone.fingerprint})"
            )

    def save(self, path: Path) -> str:
        """Write one safetensors file, whole or not at all, and return its digest for plans."""
        facts = {
            "format": _FORMAT,
            "exits": self.exits,
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
            "runs": self.runs,
            "fitted_on": self.fitted_on,
        }
        tensors = {"weights": self.weights, "biases": self.biases, "costs": self.costs}
        write_tensors(path, tensors, {"offramp_router": json.dumps(facts)})
        return hashlib.sha256(path.read_bytes()).hexdigest()


def choices(scores: Tensor, costs: Tensor, price: float) -> Tensor:
    """Return ``[S]``: the way of best score ``[S, P]`` minus price times cost; the first of equals.

    The Lagrangian of the multiple-choice knapsack: one price for all texts stands for a budget.
    """
    return (scores.double() - price * costs).argmax(-1)


def load_router(path: Path, digest: str | None = None) -> RouterWeights:
    """Return the router in a file.

    Args:
        path: the file.
        digest: SHA-256 of its bytes, where a plan has noted it.

    Raises:
        OfframpError: it cannot be read, is no router, its parts do not go together, or it is not
            the file that the plan was made with.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        content = path.read_bytes()
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise OfframpError(
                f"{path} is not the router this plan was made with: its bytes have changed; fit "
                "it again with 'offramp oracle --router'"
            )
        facts, tensors = _header(content), load(content)
        if facts["format"] != _FORMAT:
            raise OfframpError(f"{path} is a router of format {facts['format']}, not {_FORMAT}")
        router = RouterWeights(
            exits=tuple(facts["exits"]),
            num_layers=facts["num_layers"],
            fingerprint=facts["fingerprint"],
            runs=tuple(facts["runs"]),
            costs=tensors["costs"],
            weights=tensors["weights"],
            biases=tensors["biases"],
            fitted_on=facts["fitted_on"],
        )
        _check_parts(router)
    except OSError as error:
        raise OfframpError(f"cannot read the router {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise OfframpError(f"{path} is no offramp router") from error
    return router


def _header(content: bytes) -> Any:
    """Return the router's facts in a safetensors file: its header is a length, then JSON."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["offramp_router"])


def _check_parts(router: RouterWeights) -> None:
    """Hold what the code relies on."""
    count = len(router.runs)
    whole = all(type(depth) is int for depth in (*router.exits, router.num_layers))
    good = (
        whole
        and router.exits
        and all(a < b for a, b in pairwise((0, *router.exits, router.num_layers)))
        and 2 <= count <= _MOST_RUNS
        and all(isinstance(text, str) for text in (router.fingerprint, *router.runs))
        and isinstance(router.fitted_on, dict)
        and router.weights.ndim == 2
        and router.weights.shape[1] > num_features(router.exits, 0)
        and (len(router.weights), *router.biases.shape, *router.costs.shape) == (count,) * 3
        and router.weights.dtype == router.biases.dtype == torch.float32
        and router.costs.dtype == torch.float64
        and all(bool(t.isfinite().all()) for t in (router.weights, router.biases, router.costs))
        and bool((router.costs > 0).all() and (router.costs <= router.num_layers).all())
    )
    if not good:
        raise ValueError("parts do not go together")


def check_price(price: float) -> None:
    """Refuse a price per layer that is none (UsageError)."""
    if not 0 <= price <= _MOST_PRICE or math.isnan(price):
        raise UsageError(f"a price per layer lies between 0 and {_MOST_PRICE:g}, not at {price}")


@dataclass
class _Looker:
    """A policy that notes how sure each exit is, and leaves at the last."""

    exits: tuple[int, ...]
    seen: list[Tensor] = field(default_factory=list)
    bars = None

    def leave(self, probe: Probe) -> Tensor:
        columns = torch.stack([score(probe, name).float() for name in CONFIDENCES], 1)
        self.seen.append(columns.cpu())
        return torch.full((len(probe.rows),), probe.depth == self.exits[-1])


def look(backbone: Backbone, texts: Sequence[Text], exits: Sequence[int]) -> Tensor:
    """Run prompts as deep as the last exit, where they then wait, and return what a router sees.

    The work is one ordinary step: the meter counts its layers, and one row of the head per text
    and exit.

    Args:
        backbone: what runs the layers.
        texts: prompts of which nothing has been run.
        exits: depths at which to note confidences; the mean state is of the last one.

    Returns:
        ``[S, F]`` fp32 on the CPU: ln(1 + tokens), the confidences exit by exit, and the mean over
        the prompt's tokens of their states at root mean square 1.

    Raises:
        UsageError: no exits, or some that the model lacks.
    """
    if not exits:
        raise UsageError("a router needs a depth to look at the prompt from")
    check_exits(exits, backbone.shape.num_layers)
    looker = _Looker(tuple(exits))
    step(backbone, texts, looker)
    lengths = torch.tensor([[math.log1p(text.done)] for text in texts])
    means = [normed(text.waiting[exits[-1]]).mean(0).cpu() for text in texts]
    return torch.cat((lengths, *looker.seen, torch.stack(means)), 1)
