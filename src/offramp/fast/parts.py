"""What a Llama-like model is made of: matrices, norms and facts, by the names its modules have.

No family is known: a model is taken whose layers hold just these parts, under the usual names.
Whether they mean the usual things is for the check against the generic backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedModelError
from offramp.fast.layout import ACTIVATIONS, NO_NORM, PER_HEAD, WHOLE


@dataclass(frozen=True)
class Facts:
    """What all layers of a model have in common; named as in ``layout.ModelStruct``."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    activation: int
    """One of ``layout.ACTIVATIONS``."""
    scale: float
    """Of attention scores."""
    residual: float
    """What is added to the stream is multiplied by this."""
    softcap: float
    """Of attention scores; 0 for none."""

    @property
    def queries(self) -> int:
        """Return the width of all queries; keys follow them in a fused matrix."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Matrix:
    """Linear modules whose outputs stand side by side."""

    modules: tuple[nn.Linear, ...]
    sizes: tuple[int, ...]
    """Outputs of each part that must begin at a whole block, if outputs come in blocks."""

    def weight(self) -> Tensor:
        """Return ``[outputs, inputs]`` in the model's precision."""
        return torch.cat([module.weight.detach() for module in self.modules])

    def bias(self) -> Tensor | None:
        """Return ``[outputs]``, zeros where only some modules have one, or None."""
        if all(module.bias is None for module in self.modules):
            return None
        parts: list[Tensor] = [
            module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
            for module in self.modules
        ]
        return torch.cat(parts).detach()


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer."""

    qkv: Matrix
    output: Matrix
    gate_up: Matrix
    down: Matrix
    gains: dict[str, Tensor]
    """What its RMS norms multiply by, fp32, by place; places are named as in ``LayerStruct``."""
    head_norm: int
    """Whether queries and keys are normed, head by head or whole."""


@dataclass(frozen=True)
class TopParts:
    """What follows the last layer."""

    gains: Tensor
    """``[D]`` of the last norm, fp32."""
    head: Matrix
    epsilon: float
    """Of every norm of the model."""
    logit_scale: float
    logit_softcap: float


class Reader:
    """Takes one model apart, layer by layer.

    Raises:
        UnsupportedModelError: by every method, for parts that a Llama-like model does not have.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.facts: Facts | None = None
        """Known after the first layer."""
        self._config = model.config.get_text_config(decoder=True)
        self._used: set[int] = set()
        self._epsilon: float | None = None

    def layer(self, layer: nn.Module) -> LayerParts:
        """Return the parts of one decoder layer."""
        attention, mlp = self._part(layer, "self_attn"), self._part(layer, "mlp")
        f = self._facts(attention, mlp, layer)
        if self.facts not in (None, f):
            raise self._refusal("its layers are of different sizes")
        self.facts = f
        qkv = self._one_or_several(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        gate_up = self._one_or_several(mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        head_norm, gains = self._head_norms(attention)
        parts = LayerParts(
            self._matrix(qkv, f.queries + 2 * f.kv_heads * f.head_size),
            self._matrix([self._part(attention, "o_proj")], f.hidden),
            self._matrix(gate_up, f.inner, f.inner),
            self._matrix([self._part(mlp, "down_proj")], f.hidden),
            self._norms(layer) | gains,
            head_norm,
        )
        for name, parameter in layer.named_parameters():
            if id(parameter) not in self._used:
                raise self._refusal(f"its layers hold {name}, which is unknown to it")
        return parts

    def top(self) -> TopParts:
        """Return the last norm, the head and what scales the logits."""
        facts, head = self._config.to_dict(), self.model.get_output_embeddings()
        assert self.facts is not None, "the layers come first"
        norm = self._part(self.model.base_model, "norm")
        scale = facts.get("logit_scale") or 1 / (facts.get("logits_scaling") or 1.0)
        if not scale > 0:  # the largest logit would be another before it than behind it
            raise self._refusal(f"it multiplies its logits by {scale:g}")
        return TopParts(
            self._gains(norm, self.facts.hidden),
            self._matrix([head], head.weight.shape[0]),
            self._epsilon or 0.0,
            scale,
            facts.get("final_logit_softcapping") or 0.0,
        )

    def _facts(self, attention: nn.Module, mlp: nn.Module, layer: nn.Module) -> Facts:
        """Return what one layer says of the model."""
        facts = self._config.to_dict()
        activation = facts.get("hidden_activation") or facts.get("hidden_act")
        if activation not in ACTIVATIONS:
            raise self._refusal(f"its MLP uses {activation}")
        down, output = self._part(mlp, "down_proj"), self._part(attention, "o_proj")
        heads = facts["num_attention_heads"]
        size = vars(attention).get("head_dim") or self._config.hidden_size // heads
        return Facts(
            hidden=self._config.hidden_size,
            heads=output.weight.shape[1] // size,
            kv_heads=facts.get("num_key_value_heads") or heads,
            head_size=size,
            inner=down.weight.shape[1],
            activation=ACTIVATIONS[activation],
            scale=float(vars(attention).get("scaling", size**-0.5)),
            residual=float(vars(layer).get("residual_multiplier", 1.0)),
            softcap=facts.get("attn_logit_softcapping") or 0.0,
        )

    def _norms(self, layer: nn.Module) -> dict[str, Tensor]:
        """Which norm stands where: some families norm what comes out, some both ends."""
        assert self.facts is not None
        have = layer._modules
        both_ends = "pre_feedforward_layernorm" in have
        only_after = "input_layernorm" not in have
        norms = {"input_layernorm": "before_attention", "post_feedforward_layernorm": "after_mlp"}
        norms["pre_feedforward_layernorm"] = "before_mlp"
        norms["post_attention_layernorm"] = (
            "after_attention" if both_ends or only_after else "before_mlp"
        )
        return {
            place: self._gains(self._part(layer, name), self.facts.hidden)
            for name, place in norms.items()
            if name in have
        }

    def _head_norms(self, attention: nn.Module) -> tuple[int, dict[str, Tensor]]:
        f = self.facts
        if f is None or "q_norm" not in attention._modules:
            return NO_NORM, {}
        query, key = self._part(attention, "q_norm"), self._part(attention, "k_norm")
        each = query.weight.numel() == f.head_size
        sizes = (f.head_size,) * 2 if each else (f.queries, f.kv_heads * f.head_size)
        gains = [self._gains(norm, size) for norm, size in zip((query, key), sizes, strict=True)]
        return PER_HEAD if each else WHOLE, {"query_norm": gains[0], "key_norm": gains[1]}

    def _gains(self, norm: Any, size: int) -> Tensor:
        """Return what an RMS norm multiplies by, whatever it keeps: its answer to ones."""
        own = vars(norm)
        epsilon = own.get("variance_epsilon", own.get("eps"))
        if epsilon is None or self._epsilon not in (None, epsilon):
            raise self._refusal("its norms are not RMS norms with one epsilon")
        self._epsilon = epsilon
        self._used.update(id(p) for p in norm.parameters())
        like = next(norm.parameters(), torch.empty(0, device=self.model.device))
        with torch.no_grad():
            answer: Tensor = norm(torch.ones(1, size, dtype=like.dtype, device=like.device))
        gains: Tensor = answer[0].float() * (1 + epsilon) ** 0.5
        return gains

    def _matrix(self, modules: Sequence[Any], *sizes: int) -> Matrix:
        f = self.facts
        assert f is not None
        for module in modules:
            if not isinstance(module, nn.Linear):
                raise self._refusal(f"it holds a {type(module).__name__} where a matrix should be")
            self._used.update(id(p) for p in module.parameters())
        widths = {module.weight.shape[1] for module in modules}
        outputs = sum(len(module.weight) for module in modules)
        if outputs != sum(sizes) or len(widths) > 1 or not widths <= {f.hidden, f.inner, f.queries}:
            raise self._refusal("its matrices have unexpected sizes")
        return Matrix(tuple(modules), sizes)

    def _one_or_several(self, parent: nn.Module, one: str, several: Sequence[str]) -> list[Any]:
        if one in parent._modules:
            return [self._part(parent, one)]
        return [self._part(parent, name) for name in several]

    def _part(self, parent: nn.Module, name: str) -> Any:
        return part(self.model, parent, name)

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return refusal(self.model, reason)


def part(model: nn.Module, parent: nn.Module, name: str) -> Any:
    """Return a module's part of this name, or refuse the model."""
    found = parent._modules.get(name)
    if found is None:
        raise refusal(model, f"its {type(parent).__name__} has no {name}")
    return found


def refusal(model: nn.Module, reason: str) -> UnsupportedModelError:
    """Return the error that says why the fast backbones do not fit this model."""
    return UnsupportedModelError(f"the fast backbone cannot run {type(model).__name__}: {reason}")
