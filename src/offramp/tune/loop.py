"""The training loop, on accelerate: one process and several are the same code."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)

from offramp.errors import OfframpError
from offramp.tune.data import Example
from offramp.tune.gradients import Student, Tally, add_gradients
from offramp.tune.log import Log
from offramp.tune.network import Net
from offramp.tune.settings import Settings
from offramp.tune.state import Run, find_state, load_state, save_state
from offramp.tune.steps import labels, plan_steps, tokens

Tracker = Literal["trackio", "tensorboard"]

_LONGEST_WAIT = timedelta(days=7)
"""Of one process for another: the first may generate answers for hours."""


def make_accelerator(
    settings: Settings, tracker: Tracker | None = None, folder: Path | None = None
) -> Accelerator:
    """Return what knows of devices, other processes, and a tracker of experiments.

    Args:
        settings: how is trained.
        tracker: who is told each step's figures, beside the log.
        folder: where such a tracker writes.

    Raises:
        OfframpError: it is told to shard the model, or the tracker is not installed.
    """
    if tracker is not None and find_spec(tracker) is None:
        raise OfframpError(f"--report-to {tracker} needs it: pip install {tracker}")
    # Exits that rest in a step, or are not let in yet, leave parameters without a gradient.
    resting = settings.each_step != "all" or settings.recipe == "layerskip"
    unused = DistributedDataParallelKwargs(find_unused_parameters=resting)
    patience = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    made = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[unused, patience],
        log_with=tracker,
        project_dir=folder,
    )
    kind = made.distributed_type
    if kind is not DistributedType.NO and not kind.name.startswith("MULTI_"):
        raise OfframpError(
            f"exits are taught by one process or by copies of the model (DDP), not with "
            f"{kind.value}: launch without it"
        )
    return made


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
    steps = plan_steps(examples, settings, alone=net.alone)
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
            tally = add_gradients(
                model, student, steps[number], number, len(steps), examples, settings, accelerator
            )
            norm = accelerator.clip_grad_norm_(list(trained.values()), settings.clip)
            # Both: a gradient may overflow where the loss does not, and would spoil the next state.
            if not math.isfinite(tally.total) or not math.isfinite(norm):
                raise OfframpError(
                    f"the loss is no number in step {number + 1} of {len(steps)}; "
                    f"{_kept(folder)}. Try a lower --learning-rate with another --out"
                )
            optimiser.step()
            optimiser.zero_grad()
            count = tokens(steps[number], examples)
            seen += count
            rows = labels(steps[number], examples)
            line = _line(number, seen, count, rate, start, tally, rows)
            if log is not None:
                log.add(line)
            accelerator.log(_flat(line), step=number + 1)
            if (number + 1) % save_every == 0 or number + 1 == len(steps):
                save_state(folder, run, number + 1, trained, inner, main)
    finally:
        if log is not None:
            log.close()
    return seen


def _rate(step: int, steps: int, settings: Settings) -> float:
    """Return the learning rate of a step: a climb, then a cosine down to nothing."""
    warm = max(round(settings.warmup * steps), 1)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(steps - warm, 1)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def _line(
    number: int, seen: int, count: int, rate: float, start: float, tally: Tally, rows: int
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


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """Return a log line as trackers want it: numbers by name."""
    numbers = {name: value for name, value in line.items() if name not in ("step", "losses")}
    return numbers | {f"loss/{depth}": value for depth, value in line["losses"].items()}


def _kept(folder: Path) -> str:
    place = find_state(folder)
    return f"the last good state is kept in {place}" if place else "no state was written yet"
