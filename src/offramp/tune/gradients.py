"""The gradients of one optimiser step: part by part, and over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offramp.machine import multiplies_bf16
from offramp.tune.data import Example
from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import IGNORED, Batch, Pack, collate
from offramp.tune.recipes import Moment, find
from offramp.tune.settings import Settings
from offramp.tune.steps import labels, parts


class Student(nn.Module):
    """A net and its recipe as one module whose forward is the loss, as accelerate wants it."""

    def __init__(self, net: Net, settings: Settings) -> None:
        super().__init__()
        self.net = net
        self._recipe = find(settings.recipe)
        net.requires_grad_(False)
        with seeded(settings.seed):
            self._recipe.trainable(net)  # it may make modules of its own
        if precise := _multiplied_in(settings, next(net.parameters()).device):
            net.hold_frozen(precise)
        self._settings = settings
        self.losses: Losses | None = None
        """Of the last forward."""

    def forward(self, batch: Batch, moment: Moment) -> Tensor:
        """Return the loss, summed over the labelled rows."""
        with arithmetic(self._settings, batch.ids.device):
            self.losses = self._recipe.loss(self.net, batch, moment)
        return self.losses.total

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}


@dataclass
class Tally:
    """Sums of losses over a step, in nats, to be divided by its labels."""

    hard: dict[int, float] = field(default_factory=dict)
    soft: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, losses: Losses) -> None:
        """Add those of a part of the step."""
        self.total += losses.total.item()
        for kept, new in ((self.hard, losses.hard), (self.soft, losses.soft)):
            for depth, value in new.items():
                kept[depth] = kept.get(depth, 0.0) + value


def add_gradients(
    model: Any,
    student: Student,
    step: list[Pack],
    number: int,
    steps: int,
    examples: Sequence[Example],
    settings: Settings,
    accelerator: Accelerator,
) -> Tally:
    """Add up the gradients of one step, part by part, and return its losses.

    Args:
        model: the student as accelerate prepared it.
        student: the same, as it is.
        step: the packed rows of all processes.
        number: steps done.
        steps: of the whole run.
        examples: what the rows are of.
        settings: how.
        accelerator: of devices and processes.
    """
    tally = Tally()
    count = labels(step, examples)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = list(parts(step, rank, ranks, settings.rows_at_once))
    for index, rows in enumerate(mine):
        batch = _batch(rows or step[:1], examples, accelerator.device, real=bool(rows))
        moment = Moment(
            number,
            steps,
            settings,
            _generator(settings.seed, number, rank, index),
            _generator(settings.seed, number),
        )
        last = index + 1 == len(mine)
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(batch, moment)
            # Processes' gradients are averaged; a step's are a sum over its labels.
            accelerator.backward(loss * (ranks / count))
        assert student.losses is not None
        tally.add(student.losses)
    return _over_all(tally, accelerator)


def _batch(rows: list[Pack], examples: Sequence[Example], device: Any, *, real: bool) -> Batch:
    """Return the tensors of some rows; without labels where a process has no rows left."""
    made = collate(rows, examples)
    if not real:
        made = Batch(made.ids, made.positions, made.segments, made.labels.fill_(IGNORED))
    return made.to(device)


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator that is a function of these numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def _over_all(tally: Tally, accelerator: Accelerator) -> Tally:
    """Return the sums over all processes."""
    if accelerator.num_processes == 1:
        return tally
    keys = [("hard", d) for d in sorted(tally.hard)] + [("soft", d) for d in sorted(tally.soft)]
    values = [tally.total, *(getattr(tally, kind)[depth] for kind, depth in keys)]
    summed = accelerator.reduce(
        torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum"
    ).tolist()
    whole = Tally(total=summed[0])
    for (kind, depth), value in zip(keys, summed[1:], strict=True):
        getattr(whole, kind)[depth] = value
    return whole


def arithmetic(settings: Settings, device: torch.device) -> torch.autocast:
    """Return the context in which a net computes as precisely as its settings say.

    Not accelerate's: that is fixed for as long as the process lives.
    """
    lower = _multiplied_in(settings, device)
    return torch.autocast(device.type, lower or torch.bfloat16, enabled=lower is not None)


def _multiplied_in(settings: Settings, device: torch.device) -> torch.dtype | None:
    """Return what matrices are cast to before they are multiplied, or None if they are not."""
    bf16 = settings.precision == "bf16"
    if settings.precision == "auto":
        cuda = device.type == "cuda"
        bf16 = torch.cuda.is_bf16_supported(False) if cuda else multiplies_bf16()
    return torch.bfloat16 if bf16 else None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is drawn in here from a seed, and leave the process's own draws as they were.

    A run that is killed before its first state must begin with the same adapters and gates again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield
