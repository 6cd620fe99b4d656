"""A small head for a moment in the place of the model's own, wherever that is. Knows no family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.errors import UnsupportedModelError
from offramp.heads import low_rank
from offramp.hf.adapter import Adapter

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference of a shortlist's logits from the full head's; half precisions get 5e-2."""


class HeadPlace:
    """Where a model keeps its vocabulary head; checks that what is put there speaks for it.

    Raises:
        UnsupportedModelError: the head is no plain matrix, or the model's logits do not come out
            of it alone.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        self._adapter = adapter
        self._name = type(model).__name__
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise self._refusal("its vocabulary head is no plain matrix")
        self.head = head
        self._places = [
            (parent._modules, name)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is head
        ]
        self._check()

    def readout(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Return what the model's own readout of ``hidden [N, D]`` is with this head."""
        try:
            for modules, name in self._places:
                modules[name] = module
            return self._adapter.readout(hidden)
        finally:
            for modules, name in self._places:
                modules[name] = self.head

    def shortlist(self, tokens: Tensor, head: nn.Linear) -> nn.Module:
        """Return a head of these entries of the model's head, or of one that may stand there."""
        tokens = tokens.to(head.weight.device)
        return linear(head.weight[tokens], _part(head.bias, tokens))

    def low_rank(self, rank: int, head: nn.Linear) -> nn.Module:
        """Return the best approximation of this rank of such a head, as two matrices."""
        weight = head.weight
        up, down = low_rank(weight, self._gains(), rank)
        return nn.Sequential(
            linear(down.to(weight.dtype), None), linear(up.to(weight.dtype), head.bias)
        )

    def _gains(self) -> Tensor:
        """Return ``[D]``: by how much the last norm scales each width, whatever norm it is.

        Two opposite rows of mean 0 and variance 1 come out as plus and minus the gains, each with
        the bias added, if there is one.
        """
        weight, caught = self.head.weight, _Catch()
        row = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        row[:, ::2] = -1
        self.readout(caught, torch.cat((row, -row)))
        return (caught.rows[0] - caught.rows[1]).float() / 2

    def _check(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = self.head.weight
        hidden = torch.randn(3, weight.shape[1], generator=generator).to(weight)
        tokens = torch.tensor([len(weight) - 1, 0, len(weight) // 2])
        try:
            actual = self.readout(self.shortlist(tokens, self.head), hidden)
            expected = self._adapter.readout(hidden)[:, tokens.to(weight.device)]
            worst = (actual - expected).abs().max().item()
        except Exception as error:
            raise self._refusal("its forward does not take a smaller vocabulary head") from error
        bound = _TOLERANCE.get(weight.dtype, 5e-2) * max(expected.abs().max().item(), 1.0)
        if actual.shape != expected.shape or not worst <= bound:
            raise self._refusal("its logits do not come out of its vocabulary head alone")

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._name} cannot be checked by a cheap head, because {reason}; check with the "
            "full one, or with a gate"
        )


class _Catch(nn.Module):
    """Keeps what comes in."""

    def forward(self, rows: Tensor) -> Tensor:
        self.rows = rows.flatten(0, -2)
        return rows


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a matrix ``[outputs, inputs]`` as a module that is not trained."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made.eval()


def _part(bias: Tensor | None, tokens: Tensor) -> Tensor | None:
    return None if bias is None else bias[tokens]
