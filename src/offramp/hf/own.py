"""What the exits of one Hugging Face model own: affine maps, heads, and blocks made of its layers.

A block is a layer of the model's last kind. It is called as the last layer is, and sees a cache in
which its own keys and values stand where the last layer's do; so no family's indices are touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from offramp.errors import OfframpError, UnsupportedModelError
from offramp.hf.adapter import Adapter, Prepared
from offramp.hf.cache import GroupLayer
from offramp.hf.heads import linear
from offramp.readouts import ExitReadout


@dataclass(frozen=True)
class Own:
    """Readouts by depth, as modules on the model's device and in its precision."""

    blocks: dict[int, int] = field(default_factory=dict)
    """Index of each block's layer: those behind the model's own."""
    layers: list[nn.Module] = field(default_factory=list)
    """The blocks' layers, in the order of their indices."""
    maps: dict[int, nn.Linear] = field(default_factory=dict)
    heads: dict[int, nn.Linear] = field(default_factory=dict)

    @property
    def apart(self) -> frozenset[int]:
        """Return the exits that own a map or a head."""
        return frozenset({*self.maps, *self.heads})

    def mapped(self, hidden: Tensor, depth: int) -> Tensor:
        """Return states ``[N, D]`` after the affine map of this exit, if it owns one."""
        owned = self.maps.get(depth)
        if owned is None:
            return hidden
        mapped: Tensor = hidden + owned(hidden.to(owned.weight))
        return mapped


@torch.no_grad()
def own(model: PreTrainedModel, adapter: Adapter, readouts: Mapping[int, ExitReadout]) -> Own:
    """Return the modules of these readouts.

    Raises:
        OfframpError: one does not fit the model; the first thing wrong is named.
        UnsupportedModelError: the model's vocabulary head is no plain matrix, so that none can
            stand in for it.
    """
    made, count = Own(), len(adapter.layers)
    for depth, readout in sorted(readouts.items()):
        if not 1 <= depth < count:
            raise OfframpError(
                f"there is a readout of exit {depth}, and the model's exits are 1 to {count - 1}"
            )
        last, tensors = adapter.layers[-1], readout.tensors
        match readout.kind:
            case "affine":
                width = model.config.get_text_config(decoder=True).hidden_size
                _check_shapes(readout, depth, {"weight": (width, width), "bias": (width,)})
                made.maps[depth] = linear(
                    *(tensors[n].to(_place(last)) for n in ("weight", "bias"))
                )
            case "head":
                head = model.get_output_embeddings()
                if not isinstance(head, nn.Linear):
                    raise UnsupportedModelError(
                        f"{type(model).__name__} cannot take exit {depth}'s own head: its "
                        "vocabulary head is no plain matrix"
                    )
                _check_shapes(readout, depth, {"weight": tuple(head.weight.shape)})
                made.heads[depth] = linear(tensors["weight"].to(head.weight), head.bias)
            case "block":
                shapes = {name: tuple(t.shape) for name, t in last.state_dict().items()}
                _check_shapes(readout, depth, shapes)
                layer = copy.deepcopy(last)
                layer.load_state_dict(tensors)
                made.blocks[depth] = count + len(made.layers)
                made.layers.append(layer.eval())
    return made


def _place(layer: nn.Module) -> Tensor:
    """Return a tensor of the device and precision that states have."""
    return next(layer.parameters())


def _check_shapes(readout: ExitReadout, depth: int, expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in readout.tensors.items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise OfframpError(
                f"the {readout.kind} of exit {depth} does not fit the model: its {name} is "
                f"{list(found[name]) if name in found else 'missing'}, where the model has "
                f"{list(expected[name]) if name in expected else 'none'}"
            )


def standing_in(prepared: Prepared, block: GroupLayer) -> Prepared:
    """Return what the last layer is called with, but for the cache: it shows a block's keys."""
    cache = Cache(layers=[*prepared.cache.layers[:-1], block])

    def swapped(value: Any) -> Any:
        return cache if value is prepared.cache else value

    args, kwargs = prepared.calls[-1]
    call = tuple(map(swapped, args)), {name: swapped(value) for name, value in kwargs.items()}
    return Prepared(prepared.hidden, [*prepared.calls[:-1], call], cache)
