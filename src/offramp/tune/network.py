"""A causal LM opened for training: states after any layers with their graph, readouts, losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.card import ReadoutKind
from offramp.hf.adapter import Adapter
from offramp.hf.heads import HeadPlace, linear
from offramp.tune.losses import Losses, Reader, Term, exit_losses
from offramp.tune.packing import Batch, block_mask, find_isolation

Between = Callable[[int, Tensor, Tensor], Tensor]
"""``(layer, states before it, states after it) -> states that go on``, each ``[B, T, D]``."""


@dataclass(frozen=True, eq=False)
class States:
    """What a pass over a batch left at the rows that have a label."""

    rows: dict[int, Tensor]
    """By depth, ``[N, D]``."""
    labels: Tensor
    """``[N]`` int64."""


class Net(nn.Module):
    """A model, the exits it is taught to speak at, and what reads them out.

    The model's own modules run, prepared by its own forward as in generation; no forward is
    copied, and no logits are made but for rows with a label.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        exits: Sequence[int],
        kind: ReadoutKind = "shared",
        teacher: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = Adapter(model)
        self.isolation = find_isolation(model)
        self.exits = tuple(exits)
        self.num_layers = len(self.adapter.layers)
        self.kind: ReadoutKind = kind
        self.readouts = nn.ModuleDict(
            {str(depth): self._own(kind) for depth in exits if kind != "shared"}
        )
        self.gates = nn.ModuleDict()
        """Of exits or layers, where the recipe makes some."""
        # A list hides it from ``parameters()``: it is looked at, not trained or saved.
        self._teacher = [] if teacher is None else [Net(teacher.eval().requires_grad_(False), ())]
        self._place = HeadPlace(model, self.adapter) if kind == "head" else None
        # Dropout stays off: exits learn the states that they will read, and a step repeats itself.
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Net:
        """Move or cast the teacher, too, whom a module does not know."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return self

    def _own(self, kind: ReadoutKind) -> nn.Module:
        """Return an exit's own readout as it starts: as the model would read out here, or nearly.

        An affine map starts as none, a head as the model's, a block as its last layer.
        """
        head = self.model.get_output_embeddings().weight
        if kind == "affine":
            affine = nn.Linear(head.shape[1], head.shape[1])
            nn.init.zeros_(affine.weight)
            nn.init.zeros_(affine.bias)
            return affine
        if kind == "head":
            return linear(head.detach().clone(), None).requires_grad_()
        return copy.deepcopy(self.adapter.layers[-1])

    @property
    def alone(self) -> bool:
        """Whether examples must not share a row: this model, or its teacher, would mix them."""
        return any(net.isolation == "rows" for net in (self, *self._teacher))

    @property
    def width(self) -> int:
        """Return the width of a state."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def train_model(self) -> None:
        """Switch on the exits' readouts and the model: its adapters, else all of its weights."""
        self.readouts.requires_grad_()
        adapters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        for parameter in adapters or list(self.model.parameters()):
            parameter.requires_grad_()

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Hold a model that is never trained as it is multiplied, instead of casting it each time.

        Nothing changes but the time: autocast keeps its casts of trained weights for a pass, of
        others not at all, and casting all layers takes a fifth of the time of running them.

        Args:
            dtype: what autocast would cast matrices to.
        """
        for teacher in self._teacher:
            teacher.hold_frozen(dtype)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            for module in self.model.modules():
                if isinstance(module, nn.Linear):  # an embedding tied to one stays as it is
                    module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)

    def states(self, batch: Batch, depths: Sequence[int], between: Between | None = None) -> States:
        """Run the batch as deep as the deepest of ``depths`` and return the states asked for.

        Args:
            batch: packed examples; no token sees another example.
            depths: after how many layers, 1 to L. Exits with a block get its output.
            between: what becomes of the states after each layer; by default they go on.
        """
        mask = block_mask(batch.segments) if self.isolation == "mask" else None
        prepared = self.adapter.prepare(batch.ids, batch.positions, mask, None)
        labelled = batch.labels >= 0
        hidden, rows = prepared.hidden, {}
        for layer in range(max(depths)):
            before = hidden
            hidden = self.adapter.call(layer, before, prepared)
            if between is not None:
                hidden = between(layer, before, hidden)
            if layer + 1 in depths:
                rows[layer + 1] = self._passed(layer + 1, hidden, prepared)[labelled]
        return States(rows, batch.labels[labelled])

    def _passed(self, depth: int, hidden: Tensor, prepared: Any) -> Tensor:
        """Return the states an exit reads out: its block's output, if it owns one."""
        if self.kind != "block" or str(depth) not in self.readouts:
            return hidden
        args, kwargs = prepared.calls[-1]
        output = self.readouts[str(depth)](hidden, *args, **kwargs)
        passed: Tensor = output[0] if isinstance(output, tuple) else output
        return passed

    def reader(self, depth: int) -> Reader:
        """Return what makes logits ``[n, V]`` of an exit's states ``[n, D]``."""
        if str(depth) in self.readouts and self.kind == "affine":
            affine = self.readouts[str(depth)]
            return lambda rows: self.adapter.readout(rows + affine(rows))
        if str(depth) in self.readouts and self._place is not None:
            place, head = self._place, self.readouts[str(depth)]
            return lambda rows: place.readout(head, rows)
        return self.adapter.readout

    def losses(
        self,
        states: States,
        hard: dict[int, float],
        soft: dict[int, float],
        taught: Tensor | None = None,
    ) -> Losses:
        """Return the weighted losses of the exits, summed over the labelled rows.

        Args:
            states: what the batch left.
            hard: weight of the cross-entropy with the labels, by depth.
            soft: weight of the divergence from the teacher, by depth.
            taught: the teacher's last states ``[N, D]``; this model's own by default.
        """
        terms = [
            Term(
                depth,
                states.rows[depth],
                self.reader(depth),
                hard.get(depth, 0),
                soft.get(depth, 0),
            )
            for depth in sorted({*hard, *soft})
        ]
        teacher = None
        if any(soft.values()):
            reads = self._teacher[0].adapter.readout if self._teacher else self.adapter.readout
            last = states.rows[self.num_layers] if taught is None else taught
            teacher = (last, reads)
        return exit_losses(terms, states.labels, self.speaking(terms), teacher)

    @torch.no_grad()
    def teach(self, batch: Batch) -> Tensor | None:
        """Return a separate teacher's last states ``[N, D]`` on this batch, or None."""
        if not self._teacher:
            return None
        teacher = self._teacher[0]
        return teacher.states(batch, [teacher.num_layers]).rows[teacher.num_layers]

    def speaking(self, terms: Sequence[Term]) -> list[nn.Parameter]:
        """Return the trained parameters that these terms' readers use, found by asking autograd."""
        candidates = [p for p in self.parameters() if p.requires_grad]
        found: dict[int, nn.Parameter] = {}
        for term in {term.read: term for term in terms}.values():  # most share one
            with torch.enable_grad():
                logits = term.read(term.rows[:1].detach().requires_grad_())
            gradients = (
                torch.autograd.grad(logits.sum(), candidates, allow_unused=True, retain_graph=False)
                if logits.requires_grad
                else ()
            )
            found |= {
                id(p): p for p, g in zip(candidates, gradients, strict=False) if g is not None
            }
        return list(found.values())
