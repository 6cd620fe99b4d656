"""Halves of a Hugging Face layer: its attention or its MLP alone, while the other adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.hf.adapter import split_hidden, standing
from offramp.paths import attends

_NAMES = ("self_attn", "mlp")


class Halves:
    """The halves of a model's layers, as far as they are modules of the usual names."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._outputs: dict[tuple[int, str], int | None] = {}
        """How many values a layer's half returns beside its states; None: states alone."""

    @property
    def named(self) -> bool:
        """Return whether every layer has both halves."""
        return all(set(_NAMES) <= {n for n, _ in layer.named_children()} for layer in self._layers)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Note, while whole layers run, what their halves return."""

        def hook(index: int, name: str) -> Callable[..., None]:
            def note(_module: nn.Module, _args: Any, output: Any) -> None:
                self._outputs[index, name] = len(output) - 1 if isinstance(output, tuple) else None

            return note

        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                for name in _NAMES:
                    half = layer.get_submodule(name)
                    hooks.enter_context(_removed(half.register_forward_hook(hook(index, name))))
            yield

    @contextmanager
    def only(self, layer: int, part: int) -> Iterator[None]:
        """Let the other half of this layer add nothing; it is not run."""
        name = "mlp" if attends(part) else "self_attn"
        extra = self._outputs[layer, name]

        def nothing(*args: Any, **kwargs: Any) -> Any:
            states: Tensor = torch.zeros_like(split_hidden(args, kwargs)[0])
            return states if extra is None else (states, *[None] * extra)

        with standing([self._layers[layer].get_submodule(name)], [nothing]):
            yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
