"""Skip gates: per token and layer, run the layer or pass it by; a loop over single layers.

*Dynamic layer selection in decoder-only transformers* (Glavas et al. 2024). A token that passes a
layer by keeps its state, and the layer's keys and values are made from that state by its own norm
and projections ("KV cache propagation": :meth:`~offramp.backbone.Backbone.fill`), so that later
tokens attend to it in every layer. A prompt runs every layer but for its last token, which chooses
the first new one: that is what ``offramp tune --recipe skip`` trains. Where the paper's code draws
Gumbel noise at inference too, here the larger of a gate's two scores decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Flow, Span, Text
from offramp.decode import written
from offramp.errors import OfframpError, UsageError
from offramp.files import digest_of, write_tensors
from offramp.records import Record
from offramp.request import Pool, Request, Token
from offramp.step import Outcome, all_or_nothing

RUN, SKIP = 0, 1
"""A gate's two scores."""
_KEY, _DIGEST = "offramp_skip", "sha256"
_MOST_BYTES = 2**28


class SkipFacts(Record):
    """What a file of skip gates says of itself, as JSON in its header."""

    format: Literal[2] = 2
    num_layers: int
    fingerprint: str
    """Of the model they were trained with."""
    gate_input: Literal["hidden", "fixed"]
    """What a gate sees: the state in front of its layer, or ones (the paper's ablation)."""


@dataclass(frozen=True, eq=False)
class SkipGates:
    """The gates of some layers; the others always run."""

    facts: SkipFacts
    weights: dict[int, Tensor]
    """By layer, ``[2, D]`` fp32."""
    biases: dict[int, Tensor]
    """By layer, ``[2]`` fp32."""

    def runs(self, layer: int, hidden: Tensor) -> Tensor:
        """Return ``[S]`` bool: whether states ``[S, D]`` in front of a layer go through it."""
        if layer not in self.weights:
            return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        seen = torch.ones_like(hidden) if self.facts.gate_input == "fixed" else hidden
        weights, bias = self.weights[layer], self.biases[layer]
        scores = seen.float() @ weights.T.to(hidden.device) + bias.to(hidden.device)
        return scores[:, RUN] >= scores[:, SKIP]

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse another model than the one they were trained with.

        Raises:
            UsageError: its fingerprint, its depth or its width differs.
        """
        width = next(iter(self.weights.values())).shape[1]
        facts, shape = self.facts, backbone.shape
        own = (facts.fingerprint, facts.num_layers, width)
        if own != (backbone.fingerprint, shape.num_layers, shape.hidden_size):
            raise UsageError(
                f"these skip gates were trained with a model of {facts.num_layers} layers, width "
                f"{width} and fingerprint {facts.fingerprint}, not with this one (fingerprint "
                f"{backbone.fingerprint}): give them the model that was tuned with them"
            )

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of everything they are, by which a changed file is known."""
        layers = sorted(self.weights)
        pairs = [tensor for i in layers for tensor in (self.weights[i], self.biases[i])]
        return digest_of(f"{self.facts.model_dump_json()} {layers}", pairs)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        tensors = {f"{layer}.weight": tensor for layer, tensor in self.weights.items()}
        tensors |= {f"{layer}.bias": tensor for layer, tensor in self.biases.items()}
        write_tensors(path, tensors, {_KEY: self.facts.model_dump_json(), _DIGEST: self.digest})


def load_skip_gates(path: Path) -> SkipGates:
    """Return the skip gates in a file.

    Raises:
        OfframpError: it cannot be read, is no file of skip gates, its parts do not go together, or
            it was changed since it was written.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            facts = SkipFacts.model_validate_json(said[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = sorted({int(name.partition(".")[0]) for name in tensors})
        gates = SkipGates(
            facts,
            {layer: tensors.pop(f"{layer}.weight") for layer in layers},
            {layer: tensors.pop(f"{layer}.bias") for layer in layers},
        )
        _check_parts(gates, tensors)
    except OSError as error:
        raise OfframpError(f"cannot read the skip gates {path}: {error.strerror}") from error
    except (SafetensorError, ValidationError, KeyError, ValueError, TypeError) as error:
        raise OfframpError(f"{path} is no file of offramp skip gates") from error
    if gates.digest != said.get(_DIGEST):
        raise OfframpError(
            f"{path} was changed since it was written: its digest is not that of its content; "
            "train the gates again"
        )
    return gates


def _check_parts(gates: SkipGates, left_over: dict[str, Tensor]) -> None:
    """Refuse what does not go together; the caller says of which file."""
    widths = {weight.shape[-1] for weight in gates.weights.values()}
    tensors = [*gates.weights.values(), *gates.biases.values()]
    good = (
        not left_over
        and len(widths) == 1
        and all(0 <= layer < gates.facts.num_layers for layer in gates.weights)
        and all(weight.shape == (2, *widths) for weight in gates.weights.values())
        and all(bias.shape == (2,) for bias in gates.biases.values())
        and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors)
    )
    if not good:
        raise ValueError("parts do not go together")


@torch.no_grad()
def skip_step(backbone: Backbone, texts: Sequence[Text], gates: SkipGates) -> Outcome:
    """Run each text's new tokens, the last of each only through the layers its gates let it run.

    Returns:
        The logits of each text's last token, and the number of layers that it ran.
    """
    with all_or_nothing(backbone, texts):
        spans = tuple(Span(text, text.done, len(text.ids)) for text in texts)
        flow = Flow(backbone.embed(spans), spans, tuple(range(len(texts))))
        for text in texts:
            text.done = len(text.ids)
        backbone.meter.tally.steps += 1
        depths = [0] * len(texts)
        for layer in range(backbone.shape.num_layers):
            runs = gates.runs(layer, flow.tails([1] * len(texts))).tolist()
            flow = _through(backbone, layer, flow, runs)
            depths = [depth + ran for depth, ran in zip(depths, runs, strict=True)]
        logits = backbone.readout(flow.tails([1] * len(texts)), backbone.shape.num_layers)
        return Outcome(list(logits.split(1)), depths)


def _through(backbone: Backbone, layer: int, flow: Flow, runs: Sequence[bool]) -> Flow:
    """Return the flow behind a layer that the last row of each text runs, or passes by."""
    if all(runs):
        return Flow(backbone.run([layer], flow.hidden, flow.spans), flow.spans, flow.members)
    running, passing = flow.cut([int(not one) for one in runs])
    parts: dict[int, list[Tensor]] = {member: [] for member in flow.members}
    if running.spans:  # earlier tokens of a text first: the layer's keys lie in their order
        hidden = backbone.run([layer], running.hidden, running.spans)
        running = Flow(hidden, running.spans, running.members)
    backbone.fill([layer], passing.hidden, passing.spans)
    for done in (running, passing):
        for member, rows in zip(done.members, done.rows(), strict=True):
            parts[member].append(rows)
    joined = [rows for member in flow.members for rows in parts[member]]
    return Flow(torch.cat(joined), flow.spans, flow.members)


def skip(
    backbone: Backbone, requests: Iterable[Request], gates: SkipGates, *, batch_size: int = 8
) -> Iterator[Token]:
    """Yield the new tokens of all requests; a token's depth is the number of layers it ran.

    Args:
        backbone: what runs the layers.
        requests: what to continue; read only when there is room for it.
        gates: which layers a token runs.
        batch_size: texts at once; each token has its own layers.
    """
    gates.must_fit(backbone)
    for writers in Pool(backbone, requests, batch_size).rounds():
        yield from written(writers, skip_step(backbone, [one.text for one in writers], gates))
