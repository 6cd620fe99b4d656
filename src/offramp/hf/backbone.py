"""The reference backbone: any Hugging Face causal LM, run by its own modules.

Texts that bring the same number of new rows run together as one left-padded batch; no padding row
is ever computed. A family that cannot take padded keys runs text by text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.backbone import Shape
from offramp.batch import Span
from offramp.hf.adapter import Adapter, Prepared
from offramp.hf.cache import FilledError, LayerStore, Slot, group_cache, padding_mask
from offramp.hf.heads import HeadPlace
from offramp.meter import Meter
from offramp.probe import Readout
from offramp.watch import Ran, Watch

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class _Group:
    """Texts that run together: which spans of the step, and what the model prepared for them."""

    members: list[int]
    prepared: Prepared


class HFBackbone:
    """A :class:`~offramp.backbone.Backbone`; made by :func:`offramp.hf.open.open_model`."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, shape: Shape) -> None:
        self.model = model
        self.adapter = adapter
        self.shape = shape
        self.meter = Meter()
        self.name, self.weights = "hf", _FORMATS.get(model.dtype, str(model.dtype)[6:])
        self.build = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.fingerprint = fingerprint(model)
        self.batched = True  # the self-check turns it off where texts cannot share a call
        self.ragged = False
        self.cheap: dict[Hashable, nn.Module] = {}
        """Heads of cheap checks, each made once."""
        self._key: tuple[Any, ...] = ()
        self._groups: list[_Group] = []

    def open(self) -> Slot:
        """Return empty stores, one per layer."""
        return [LayerStore() for _ in range(self.shape.num_layers)]

    def close(self, slot: Slot) -> None:
        """Free the buffers."""
        slot.clear()

    def trim(self, slot: Slot, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        for store in slot[first_layer:]:
            store.length = min(store.length, length)

    @torch.no_grad()
    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""
        self._key = ()  # the same positions may hold other tokens than last time
        groups = self._prepare(spans)
        return _join([(group.members, group.prepared.hidden) for group in groups])

    @torch.no_grad()
    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values."""
        done = []
        parts = hidden.split([len(span) for span in spans])
        for group in self._prepare(spans):
            rows = torch.stack([parts[i] for i in group.members])  # [B, m, D]
            for layer in layers:
                rows = self.adapter.call(layer, rows, group.prepared)
            done.append((group.members, rows))
            self.meter.ran(len(layers), [spans[i] for i in group.members])
        return _join(done)

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run the first segment: whether a row leaves is always asked."""
        return Ran(self.run(segments[0], hidden, spans))

    @torch.no_grad()
    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        Each layer is entered and left as soon as it has stored them: its norm and its query, key
        and value projections run, its attention and MLP do not.
        """
        parts = hidden.split([len(span) for span in spans])
        for group in self._prepare(spans):
            rows = torch.stack([parts[i] for i in group.members])
            for layer in layers:
                store = group.prepared.cache.layers[layer]
                store.only_fill = True
                with suppress(FilledError):
                    self.adapter.call(layer, rows, group.prepared)
                store.only_fill = False
            self.meter.filled(len(layers), rows.shape[0] * rows.shape[1])

    @torch.no_grad()
    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``; every depth shares norm and head."""
        self.meter.read(len(hidden))
        return self.adapter.readout(hidden.to(self.model.device))  # a trace's states lie elsewhere

    @torch.no_grad()
    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``.

        Raises:
            UnsupportedModelError: the model's head cannot be stood in for.
        """
        key = tuple(tokens.tolist())
        if key not in self.cheap:
            self.cheap[key] = self._place.shortlist(tokens)
        return self._reading(self.cheap[key])

    @torch.no_grad()
    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``.

        Raises:
            UnsupportedModelError: the model's head cannot be stood in for.
        """
        if rank not in self.cheap:
            self.cheap[rank] = self._place.low_rank(rank)
        return self._reading(self.cheap[rank])

    @cached_property
    def _place(self) -> HeadPlace:
        return HeadPlace(self.model, self.adapter)

    def _reading(self, head: nn.Module) -> Readout:
        @torch.no_grad()
        def readout(hidden: Tensor, _depth: int) -> Tensor:
            self.meter.checked(len(hidden))
            return self._place.readout(head, hidden.to(self.model.device))

        return readout

    def _prepare(self, spans: Sequence[Span]) -> list[_Group]:
        """Ask the model what its layers need for these rows; the last answer is kept."""
        key = tuple((id(span.text), span.start, span.stop) for span in spans)
        if key != self._key:
            self._groups = [
                _Group(m, self._prepared([spans[i] for i in m])) for m in self._split(spans)
            ]
            self._key = key
        return self._groups

    def _split(self, spans: Sequence[Span]) -> list[list[int]]:
        """Return indices of the spans that run together: those with as many rows."""
        if not self.batched:
            return [[i] for i in range(len(spans))]
        by_rows: dict[int, list[int]] = defaultdict(list)
        for i, span in enumerate(spans):
            by_rows[len(span)].append(i)
        return list(by_rows.values())

    def _prepared(self, spans: list[Span]) -> Prepared:
        device = self.model.device
        starts, rows = [span.start for span in spans], len(spans[0])
        ids = torch.tensor([span.ids for span in spans], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(rows, device=device)
        cache = group_cache([span.text.slot for span in spans], starts, rows)
        return self.adapter.prepare(ids, positions, padding_mask(starts, rows, device), cache)


def _join(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Put groups ``[B, m, D]`` back into the order of their spans, flat."""
    rows = {i: row for members, hidden in parts for i, row in zip(members, hidden, strict=True)}
    return torch.cat([rows[i] for i in range(len(rows))])


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the architecture and of a few weights of every parameter (16 hex digits).

    It tells models apart, it does not certify them: 32 values of each parameter, rounded to bf16,
    so that the same checkpoint has one fingerprint in fp32 and in bf16.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:32].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
