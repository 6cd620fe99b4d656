"""Opens a causal LM at its decoder layers without copying its forward.

The model's own forward is asked to *prepare* (embeddings, masks, rotary tables) while its layers
are stubbed out; the real layers are then run one by one with the arguments it prepared; the
readout is its own norm, head and post-processing, reached the same way. No family is known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.errors import UnsupportedModelError


class _PreparedError(Exception):
    """Raised by the last stub: everything a layer needs has been prepared."""


@dataclass
class Prepared:
    """What the model would hand to its layers for some rows."""

    hidden: Tensor  # [B, m, D], input of the first layer
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments of each layer, without the hidden states."""
    cache: Any


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers: the largest module list as long as the configuration says.

    Raises:
        UnsupportedModelError: there is none.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if count < 1:
        raise UnsupportedModelError(f"{type(model).__name__} has {count} layers")
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps its {count} layers in no list of modules, so they "
            "cannot be run one by one"
        )
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    if len({id(layer) for layer in layers}) < count:
        raise UnsupportedModelError(f"{type(model).__name__} shares one layer between depths")
    return layers


class Adapter:
    """One model, opened. Stubbing is not thread-safe: one thread owns it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = find_layers(model)
        self._accepted = set(inspect.signature(model.forward).parameters)
        if "cache" in self._accepted:  # both names at once would be refused
            self._accepted.discard("past_key_values")
        # Older families return (hidden, ...) from a layer; learnt from a real pass.
        self._extra_outputs: int | None = None

    def learn_outputs(self, output: Any) -> None:
        """Remember from a real layer's output what the model's loop expects of a layer."""
        self._extra_outputs = len(output) - 1 if isinstance(output, tuple) else None

    def prepare(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Prepared:
        """Return the layer inputs for ``ids [B, m]`` at ``positions [B, m]``.

        ``mask [B, width]`` marks real keys (None: all), ``cache`` tells how many came before; None
        for a pass that keeps no keys and values.
        """
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            "cache": cache,
            "past_key_values": cache,  # its name before transformers 5.24, and in older families
            "use_cache": cache is not None,
        }
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = split_hidden(args, kwargs)
            first.append(hidden)
            calls.append((rest, named))
            if len(calls) == len(self.layers):
                raise _PreparedError
            return self._as_output(hidden)

        with standing(self.layers, [record] * len(self.layers)):
            try:
                self.model(**{k: v for k, v in arguments.items() if k in self._accepted})
            except _PreparedError:
                return Prepared(first[0], calls, cache)
        raise UnsupportedModelError(
            f"{type(self.model).__name__} ran {len(calls)} of its {len(self.layers)} layers"
        )

    def call(
        self, layer: int, hidden: Tensor, prepared: Prepared, module: nn.Module | None = None
    ) -> Tensor:
        """Run one real layer, or ``module`` in its place, on ``hidden [B, m, D]``."""
        args, kwargs = prepared.calls[layer]
        output = (module or self.layers[layer])(hidden, *args, **kwargs)
        rows: Tensor = output[0] if isinstance(output, tuple) else output
        return rows

    def readout(self, hidden: Tensor) -> Tensor:
        """Return logits ``[N, V]`` of intermediate states ``[N, D]``, normed once by the model."""
        rows = hidden[:, None]  # one row per text: no mask, no neighbours

        def replace(*_args: Any, **_kwargs: Any) -> Any:
            return self._as_output(rows)

        def identity(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(split_hidden(args, kwargs)[0])

        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with standing(self.layers, [replace, *[identity] * (len(self.layers) - 1)]):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, 0]

    def _as_output(self, hidden: Tensor) -> Any:
        if self._extra_outputs is None:
            return hidden
        return (hidden, *[None] * self._extra_outputs)


@contextmanager
def standing(modules: Iterable[nn.Module], stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let stubs stand in for the modules' forwards for a moment, whatever was there before."""
    replaced = list(modules)
    kept = [module.__dict__.get("forward") for module in replaced]
    try:
        for module, stub in zip(replaced, stubs, strict=True):
            module.__dict__["forward"] = stub
        yield
    finally:
        for module, own in zip(replaced, kept, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:  # accelerate's offloading puts a forward of its own on the instance
                module.__dict__["forward"] = own


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return (hidden states, other arguments by position, other arguments by name) of a call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named
