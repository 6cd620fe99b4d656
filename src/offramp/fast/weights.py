"""Takes a loaded model's weights for the kernels, by the names its modules have.

No family is known: a model is taken whose layers hold just the parts the kernels have, under the
usual names. Whether they mean the usual things is for the check against the generic backbone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedModelError
from offramp.fast.layout import (
    ACTIVATIONS,
    INT8,
    NO_NORM,
    PER_HEAD,
    WHOLE,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
)
from offramp.fast.memory import Arena
from offramp.fast.pack import BYTES, LANES, Format, pack


@dataclass
class Taken:
    """The kernels' view of a model, and whatever must stay in memory for it."""

    struct: ModelStruct
    layers: ctypes.Array[LayerStruct]
    head_bytes: float
    """Bytes per weight of the vocabulary head."""
    gains: Tensor
    """``[D]`` of the last norm."""
    kept: list[Tensor] = field(default_factory=list)


def take(
    model: nn.Module, layers: Sequence[nn.Module], form: Format, only: Sequence[int] | None = None
) -> Taken:
    """Return the model's weights in this format.

    Args:
        model: the causal LM.
        layers: its decoder layers.
        form: the format; with int4 the vocabulary head keeps 8 bits, for it is what chooses.
        only: the layers to take; all by default. The others must not be run.

    Raises:
        UnsupportedModelError: it has parts that the kernels do not have.
    """
    head_form: Format = "int8" if form == "int4" else form
    taker = _Taker(model, form)
    structs = (LayerStruct * len(layers))()
    for index in range(len(layers)) if only is None else only:
        taker.layer(structs[index], layers[index])
    gains = taker.top(head_form)
    taker.struct.layers = ctypes.cast(structs, ctypes.POINTER(LayerStruct))
    return Taken(taker.struct, structs, BYTES[head_form], gains, taker.kept)


class _Taker:
    def __init__(self, model: Any, form: Format) -> None:
        self.model, self.form = model, form
        self.config = model.config.get_text_config(decoder=True)
        self.kept: list[Tensor] = []
        self._arena = Arena()
        self.struct = ModelStruct()
        self._used: set[int] = set()
        self._epsilon: float | None = None

    def layer(self, struct: LayerStruct, layer: nn.Module) -> None:
        attention, mlp = self._part(layer, "self_attn"), self._part(layer, "mlp")
        s = self._sizes(attention, mlp, layer)
        if self.struct.heads and bytes(s) != bytes(self.struct):
            raise self._refusal("its layers are of different sizes")
        self.struct = s
        queries, keys = s.heads * s.head_size, s.kv_heads * s.head_size
        struct.qkv = self._matrix(
            self._one_or_several(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            [queries + 2 * keys],
            first=queries,
        )
        struct.output = self._matrix([self._part(attention, "o_proj")], [s.hidden])
        struct.gate_up = self._matrix(
            self._one_or_several(mlp, "gate_up_proj", ("gate_proj", "up_proj")), [s.inner] * 2
        )
        struct.down = self._matrix([self._part(mlp, "down_proj")], [s.hidden])
        self._norms(struct, layer, attention)
        self._nothing_left(layer)

    def _sizes(self, attention: nn.Module, mlp: nn.Module, layer: nn.Module) -> ModelStruct:
        """Return what one layer says of the model."""
        facts = self.config.to_dict()
        activation = facts.get("hidden_activation") or facts.get("hidden_act")
        if activation not in ACTIVATIONS:
            raise self._refusal(f"its MLP uses {activation}")
        down, output = self._part(mlp, "down_proj"), self._part(attention, "o_proj")
        heads = facts["num_attention_heads"]
        size = vars(attention).get("head_dim") or self.config.hidden_size // heads
        return ModelStruct(
            hidden=self.config.hidden_size,
            head_size=size,
            heads=output.weight.shape[1] // size,
            kv_heads=facts.get("num_key_value_heads") or heads,
            inner=down.weight.shape[1],
            activation=ACTIVATIONS[activation],
            scale=float(vars(attention).get("scaling", size**-0.5)),
            residual=float(vars(layer).get("residual_multiplier", 1.0)),
            softcap=facts.get("attn_logit_softcapping") or 0.0,
        )

    def _norms(self, struct: LayerStruct, layer: nn.Module, attention: nn.Module) -> None:
        """Which norm stands where: some families norm what comes out, some both ends."""
        have = layer._modules
        both_ends = "pre_feedforward_layernorm" in have
        only_after = "input_layernorm" not in have
        norms = {"input_layernorm": "before_attention", "post_feedforward_layernorm": "after_mlp"}
        norms["pre_feedforward_layernorm"] = "before_mlp"
        norms["post_attention_layernorm"] = (
            "after_attention" if both_ends or only_after else "before_mlp"
        )
        for name, place in norms.items():
            if name in have:
                gains = self._gains(self._part(layer, name), self.struct.hidden)
                setattr(struct, place, self._address(gains))
        struct.head_norm = NO_NORM
        if "q_norm" in attention._modules:
            self._head_norms(struct, attention)

    def _head_norms(self, struct: LayerStruct, attention: nn.Module) -> None:
        s = self.struct
        query, key = self._part(attention, "q_norm"), self._part(attention, "k_norm")
        each = query.weight.numel() == s.head_size
        struct.head_norm = PER_HEAD if each else WHOLE
        sizes = (
            (s.head_size, s.head_size)
            if each
            else (s.heads * s.head_size, s.kv_heads * s.head_size)
        )
        struct.query_norm = self._address(self._gains(query, sizes[0]))
        struct.key_norm = self._address(self._gains(key, sizes[1]))

    def top(self, form: Format) -> Tensor:
        """Take the last norm, the head and what scales the logits; return the norm's gains."""
        s, facts = self.struct, self.config.to_dict()
        inner = self.model.base_model
        gains = self._gains(self._part(inner, "norm"), s.hidden)
        s.norm = self._address(gains)
        s.epsilon = self._epsilon or 0.0
        head = self.model.get_output_embeddings()
        s.head = self._matrix([head], [head.weight.shape[0]], form=form)
        if self.form == "int4":  # beside such layers 8-bit states do, and many rows take half
            s.head.format = INT8
        s.logit_scale = facts.get("logit_scale") or 1 / (facts.get("logits_scaling") or 1.0)
        s.logit_softcap = facts.get("final_logit_softcapping") or 0.0
        return gains

    def _gains(self, norm: Any, size: int) -> Tensor:
        """Return what an RMS norm multiplies by, whatever it keeps: its answer to ones."""
        own = vars(norm)
        epsilon = own.get("variance_epsilon", own.get("eps"))
        if epsilon is None or self._epsilon not in (None, epsilon):
            raise self._refusal("its norms are not RMS norms with one epsilon")
        self._epsilon = epsilon
        self._used.update(id(p) for p in norm.parameters())
        dtype = next((p.dtype for p in norm.parameters()), torch.float32)
        with torch.no_grad():
            answer: Tensor = norm(torch.ones(1, size, dtype=dtype))
        gains: Tensor = answer[0].float() * (1 + epsilon) ** 0.5
        return gains

    def _matrix(
        self,
        modules: Sequence[Any],
        sizes: Sequence[int],
        *,
        first: int = 0,
        form: Format | None = None,
    ) -> MatrixStruct:
        """Pack modules side by side; each of ``sizes`` begins at a whole block."""
        for module in modules:
            if not isinstance(module, nn.Linear):
                raise self._refusal(f"it holds a {type(module).__name__} where a matrix should be")
            self._used.update(id(p) for p in module.parameters())
        weight = torch.cat([module.weight.detach().float() for module in modules])
        biases = [module.bias for module in modules]
        if len(weight) != sum(sizes) or weight.shape[1] not in self._widths():
            raise self._refusal("its matrices have unexpected sizes")
        packed = pack(_apart(weight, sizes), form or self.form)
        struct = MatrixStruct(
            weights=self._address(packed.data),
            format=packed.format,
            outputs=packed.outputs,
            inputs=packed.inputs,
            first=first,
        )
        if any(bias is not None for bias in biases):
            parts = [
                module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
                for module in modules
            ]
            bias = _apart(torch.cat(parts).detach().float(), sizes)
            spare = bias.new_zeros(LANES)  # the kernels read whole vectors
            struct.bias = self._address(torch.cat((bias, spare)))
        return struct

    def _widths(self) -> set[int]:
        return {self.struct.hidden, self.struct.inner, self.struct.heads * self.struct.head_size}

    def _one_or_several(self, parent: nn.Module, one: str, several: Sequence[str]) -> list[Any]:
        if one in parent._modules:
            return [self._part(parent, one)]
        return [self._part(parent, name) for name in several]

    def _part(self, parent: nn.Module, name: str) -> Any:
        return part(self.model, parent, name)

    def _nothing_left(self, layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            if id(parameter) not in self._used:
                raise self._refusal(f"its layers hold {name}, which is unknown to them")

    def _address(self, tensor: Tensor) -> int:
        kept = self._arena.keep(tensor)
        self.kept.append(kept)
        return kept.data_ptr()

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return refusal(self.model, reason)


def part(model: nn.Module, parent: nn.Module, name: str) -> Any:
    """Return a module's part of this name, or refuse the model."""
    found = parent._modules.get(name)
    if found is None:
        raise refusal(model, f"its {type(parent).__name__} has no {name}")
    return found


def refusal(model: nn.Module, reason: str) -> UnsupportedModelError:
    """Return the error that says why the kernels do not fit this model."""
    return UnsupportedModelError(f"the fast kernels cannot run {type(model).__name__}: {reason}")


def _apart(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pad each part but the last to whole blocks of outputs."""
    if len(sizes) == 1:
        return rows
    parts = []
    for part in rows.split(list(sizes)):
        parts += [part, part.new_zeros(-len(part) % LANES, *part.shape[1:])]
    return torch.cat(parts)
