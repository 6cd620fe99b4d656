"""The training loop, on accelerate: one machine, several processes and shards are the same code."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.tune.data import Example
from offramp.tune.log import Log
from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import IGNORED, Batch, Pack, collate
from offramp.tune.recipes import Moment, find
from offramp.tune.settings import Settings
from offramp.tune.state import Run, find_state, load_state, save_state
from offramp.tune.steps import labels, parts, plan_steps, tokens


class Student(nn.Module):
    """A net and its recipe as one module whose forward is the loss, as accelerate wants it."""

    def __init__(self, net: Net, settings: Settings) -> None:
        super().__init__()
        self.net = net
        self._recipe = find(settings.recipe)
        net.requires_grad_(False)
        self._recipe.trainable(net)
        self.losses: Losses | None = None
        """Of the last forward."""

    def forward(self, batch: Batch, moment: Moment) -> Tensor:
        """Return the loss, summed over the labelled rows."""
        self.losses = self._recipe.loss(self.net, batch, moment)
        return self.losses.total

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}


@dataclass
class _Tally:
    """Sums over a step, to be divided by its labels."""

    hard: dict[int, float] = field(default_factory=dict)
    soft: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, losses: Losses) -> None:
        self.total += losses.total.item()
        for kept, new in ((self.hard, losses.hard), (self.soft, losses.soft)):
            for depth, value in new.items():
                kept[depth] = kept.get(depth, 0.0) + value


def make_accelerator(settings: Settings) -> Accelerator:
    """Return what knows of devices and other processes."""
    # Exits that rest in a step leave parameters without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=settings.each_step != "all")
    precision = "bf16" if settings.precision == "bf16" else "no"
    return Accelerator(mixed_precision=precision, kwargs_handlers=[unused])


def train(
    net: Net,
    examples: Sequence[Example],
    settings: Settings,
    run: Run,
    folder: Path,
    accelerator: Accelerator,
    *,
    save_every: int = 25,
) -> int:
    """Train until the plan's last step, from the last state in the folder if there is one.

    Args:
        net: the model with its exits; changed in place.
        examples: what to train on.
        settings: how.
        run: what the run is, for its states.
        folder: where states and log are kept.
        accelerator: of devices and processes.
        save_every: steps between states.

    Returns:
        The tokens seen by all steps.

    Raises:
        OfframpError: a state or the log cannot be read or written, the state is of another run, or
            the loss is no number any more.
    """
    steps = plan_steps(examples, settings, alone=net.isolation == "rows")
    student = Student(net, settings)
    trained = student.trained()
    optimiser = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    model, optimiser = accelerator.prepare(student, optimiser)
    trained = {n: p for n, p in student.net.named_parameters() if p.requires_grad}
    inner: Any = optimiser.optimizer
    place = find_state(folder)
    done = 0 if place is None else load_state(place, run, trained, inner)
    seen = sum(tokens(step, examples) for step in steps[:done])
    main: bool = accelerator.is_main_process
    log = Log(folder, len(steps), done, show=main) if main else None
    try:
        for number in range(done, len(steps)):
            start = time.perf_counter()
            rate = _rate(number, len(steps), settings)
            for group in inner.param_groups:
                group["lr"] = rate
            tally = _step(
                model, student, steps[number], number, len(steps), examples, settings, accelerator
            )
            if not math.isfinite(tally.total):
                raise OfframpError(
                    f"the loss is no number in step {number + 1} of {len(steps)}; "
                    f"{_kept(folder)}. Try a lower --learning-rate"
                )
            accelerator.clip_grad_norm_(list(trained.values()), settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            count = tokens(steps[number], examples)
            seen += count
            if log is not None:
                log.add(
                    _line(number, seen, count, rate, start, tally, labels(steps[number], examples))
                )
            if (number + 1) % save_every == 0 or number + 1 == len(steps):
                save_state(folder, run, number + 1, trained, inner, main)
    finally:
        if log is not None:
            log.close()
    return seen


def _step(
    model: Any,
    student: Student,
    step: list[Pack],
    number: int,
    steps: int,
    examples: Sequence[Example],
    settings: Settings,
    accelerator: Accelerator,
) -> _Tally:
    """Add up the gradients of one step, part by part, and return its losses."""
    tally = _Tally()
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
    return Batch(
        *(part.to(device) for part in (made.ids, made.positions, made.segments, made.labels))
    )


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator that is a function of these numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def _over_all(tally: _Tally, accelerator: Accelerator) -> _Tally:
    """Return the sums over all processes."""
    if accelerator.num_processes == 1:
        return tally
    keys = [("hard", d) for d in sorted(tally.hard)] + [("soft", d) for d in sorted(tally.soft)]
    values = [tally.total, *(getattr(tally, kind)[depth] for kind, depth in keys)]
    summed = accelerator.reduce(
        torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum"
    ).tolist()
    whole = _Tally(total=summed[0])
    for (kind, depth), value in zip(keys, summed[1:], strict=True):
        getattr(whole, kind)[depth] = value
    return whole


def _rate(step: int, steps: int, settings: Settings) -> float:
    """Return the learning rate of a step: a climb, then a cosine down to nothing."""
    warm = max(round(settings.warmup * steps), 1)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(steps - warm, 1)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def _line(
    number: int, seen: int, count: int, rate: float, start: float, tally: _Tally, rows: int
) -> dict[str, Any]:
    losses = {**tally.hard, **tally.soft}  # an exit that learns from both shows the divergence
    return {
        "step": number + 1,
        "seen": seen,
        "loss": tally.total / rows,
        "losses": {str(depth): losses[depth] / rows for depth in sorted(losses)},
        "learning_rate": rate,
        "tokens_per_second": count / (time.perf_counter() - start),
    }


def _kept(folder: Path) -> str:
    place = find_state(folder)
    return f"the last good state is kept in {place}" if place else "no state was written yet"
