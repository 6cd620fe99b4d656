"""The losses of many exits over one batch, in chunks of rows. Knows no model and no recipe.

A vocabulary of 49,152 makes a row's logits 85 times as wide as its state in the default model, so
they are made for a chunk of rows at one exit, turned into gradients at once, and thrown away: the
peak does not grow with the number of exits, and no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Reader = Callable[[Tensor], Tensor]
"""States ``[n, D]`` to logits ``[n, V]``."""

CHUNK = 512
"""Rows whose logits exist at once."""
_STEP = 32
"""Logits have a multiple of so many rows: what one step frees fits the next one's. Arrays of ever
other sizes leave holes, 50 MB a step on the default model, until memory is full."""


@dataclass(frozen=True, eq=False)
class Term:
    """What one depth is trained on: ``hard * CE(labels) + soft * KL(teacher || exit)`` per row."""

    depth: int
    rows: Tensor
    """``[N, D]``, states after so many layers, with their graph."""
    read: Reader
    hard: float
    soft: float


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums over the rows of a batch; divide by how many rows a step has."""

    total: Tensor
    """Scalar with a graph: what is minimised."""
    hard: dict[int, float]
    """Cross-entropy with the labels in nats, by depth, of every term that weighs it."""
    soft: dict[int, float]
    """Divergence of the exit from its teacher in nats, by depth, likewise."""


def exit_losses(
    terms: Sequence[Term],
    labels: Tensor,
    parameters: Sequence[nn.Parameter],
    teacher: tuple[Tensor, Reader] | None = None,
    chunk: int = CHUNK,
) -> Losses:
    """Return the weighted loss of all terms; its gradients equal those of the naive computation.

    Args:
        terms: one per depth, over the same N rows.
        labels: ``[N]`` int64, the token each row should say.
        parameters: those that the terms' readers use and that are trained.
        teacher: states ``[N, D]`` and what reads them, for terms with a soft weight.
        chunk: rows whose logits exist at once.
    """
    sums = {index: [0.0, 0.0] for index in range(len(terms))}
    total: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        _Work(terms, labels, parameters, teacher, chunk, sums),
        *(term.rows for term in terms),
        *parameters,
    )
    hard = {term.depth: sums[i][0] for i, term in enumerate(terms) if term.hard}
    soft = {term.depth: sums[i][1] for i, term in enumerate(terms) if term.soft}
    return Losses(total, hard, soft)


@dataclass(frozen=True, eq=False)
class _Work:
    terms: Sequence[Term]
    labels: Tensor
    parameters: Sequence[nn.Parameter]
    teacher: tuple[Tensor, Reader] | None
    chunk: int
    sums: dict[int, list[float]]


class _Fused(torch.autograd.Function):
    """Computes the gradients on the way forward, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *inputs: Tensor) -> Tensor:
        states = inputs[: len(work.terms)]
        wanted = [*(state.requires_grad for state in states), *([True] * len(work.parameters))]
        gradients = [
            torch.zeros_like(tensor) if asked else None
            for tensor, asked in zip(inputs, wanted, strict=True)
        ]
        total = work.labels.new_zeros((), dtype=torch.float32)
        for start in range(0, len(work.labels), work.chunk):
            part = slice(start, start + work.chunk)
            taught = _taught(work, part)
            for index, term in enumerate(work.terms):
                total += _accumulate(work, index, term, part, taught, gradients)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.asked = [g is not None for g in gradients]
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        return None, *(next(saved) * upstream if asked else None for asked in ctx.asked)


@dataclass(frozen=True, eq=False)
class _Said:
    """What a chunk of logits says, in fp32."""

    raised: Tensor
    """``[n, V]``, logits less the largest of their row."""
    likely: Tensor
    """``[n, V]``, probabilities."""
    scale: Tensor
    """``[n, 1]``, what is to be taken from ``raised`` for log-probabilities."""

    def cross_entropy(self, of: _Said) -> Tensor:
        """Return these log-probabilities' cross-entropy under the probabilities of others, ``[n]``.

        Their probabilities add up to one, so that a product suffices, and no third array as wide as
        the vocabulary is made: passes over those cost as much as the head. Row by row: of a sum
        over all rows a small divergence would be lost in the rounding.
        """
        products = [torch.dot(p, q) for p, q in zip(of.likely, self.raised, strict=True)]
        return self.scale[:, 0] - torch.stack(products)


def _said(logits: Tensor) -> _Said:
    raised = logits.detach().to(torch.float32, copy=True)
    raised -= raised.amax(-1, keepdim=True)
    likely = raised.exp()
    sums = likely.sum(-1, keepdim=True)
    likely /= sums
    return _Said(raised, likely, sums.log_())


def _taught(work: _Work, part: slice) -> tuple[_Said, Tensor] | None:
    """Return what the teacher says of these rows and its entropy ``[n]``, if it is asked."""
    if work.teacher is None or not any(term.soft for term in work.terms):
        return None
    states, read = work.teacher
    with torch.no_grad():
        said = _said(read(_filled(states[part].detach(), work.chunk)))
    return said, said.cross_entropy(said)


def _filled(rows: Tensor, chunk: int) -> Tensor:
    """Return ``[n, ...]`` with rows of zeros after it, so that there are few sizes."""
    empty = -len(rows) % min(_STEP, chunk)
    return torch.cat([rows, rows.new_zeros(empty, *rows.shape[1:])]) if empty else rows


def _accumulate(
    work: _Work,
    index: int,
    term: Term,
    part: slice,
    taught: tuple[_Said, Tensor] | None,
    gradients: list[Tensor | None],
) -> Tensor:
    """Add one chunk's gradients of one term, and return its weighted loss."""
    with torch.enable_grad():
        rows = _filled(term.rows[part].detach(), work.chunk).requires_grad_()
        logits = term.read(rows)
    count = len(work.labels[part])
    labels = _filled(work.labels[part, None], work.chunk)
    said = _said(logits)
    hard = (said.scale - said.raised.gather(1, labels))[:count].sum()
    soft = hard.new_zeros(())
    slope = said.likely.mul_(term.hard + term.soft)  # d loss / d logits, [n, V]
    slope.scatter_add_(1, labels, slope.new_full(labels.shape, -term.hard))
    if term.soft:
        assert taught is not None, "a soft term needs a teacher"
        teacher, entropy = taught
        soft = (said.cross_entropy(teacher) - entropy)[:count].sum()
        slope.sub_(teacher.likely, alpha=term.soft)
    slope[count:] = 0.0
    found = torch.autograd.grad(
        logits, [rows, *work.parameters], slope.to(logits.dtype), allow_unused=True
    )
    own, *shared = found
    if (kept := gradients[index]) is not None:
        kept[part] = own[:count]
    for kept, gradient in zip(gradients[len(work.terms) :], shared, strict=True):
        if kept is not None and gradient is not None:
            kept += gradient
    sums = work.sums[index]
    sums[0] += hard.item()
    sums[1] += soft.item()
    return term.hard * hard + term.soft * soft
