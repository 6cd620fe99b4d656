"""Answers and traces, kept beside the results batch by batch: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from narrow_arms import Arm, answer_all
from tqdm import tqdm

from offramp.adainfer.labels import joined
from offramp.backbone import Backbone
from offramp.files import write_text
from offramp.machine import versions
from offramp.meter import Meter
from offramp.trace import Trace, load_trace, record


@dataclass
class Kept:
    """What an arm wrote to some prompts, what the full model thinks of it, and the work."""

    prompts: list[list[int]] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)
    depths: list[list[int]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    """Cross-entropy of each answer under the model's own full depth, summed over its tokens."""
    counts: dict[str, int] = field(default_factory=dict)
    """The meter's, of the answers alone."""

    def __add__(self, other: Kept) -> Kept:
        names = self.counts.keys() | other.counts.keys()
        return Kept(
            self.prompts + other.prompts,
            self.written + other.written,
            self.depths + other.depths,
            self.loss + other.loss,
            {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names},
        )

    @property
    def work(self) -> Meter:
        """Return the work, without its tally by rows."""
        work = Meter()
        for name, count in self.counts.items():
            setattr(work, name, count)
        return work

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return (prompt tokens, new tokens) of each text."""
        return [(len(p), len(new)) for p, new in zip(self.prompts, self.written, strict=True)]

    @property
    def later(self) -> list[int]:
        """Return the depths of all tokens but each text's first, which comes from the prompt."""
        return [depth for text in self.depths for depth in text[1:]]


def answered(
    arm: Arm, prompts: Sequence[list[int]], count: int, batch_size: int, folder: Path
) -> Kept:
    """Return the arm's greedy answers of at most ``count`` tokens, those kept in ``folder`` first.

    Only the answers count as work; judging them does not.
    """
    found = Kept()
    for batch in _batches(prompts, batch_size, arm.name):
        run = arm.plan.run.model_dump(mode="json")
        path = folder / f"{_digest(arm.model.backbone, run, count, sorted(arm.model.eos), batch)}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(_answer(arm, batch, count)))
        found += Kept(batch, **json.loads(path.read_text(encoding="utf-8")))
    return found


def _answer(arm: Arm, batch: list[list[int]], count: int) -> dict[str, Any]:
    backbone = arm.model.backbone
    before = backbone.meter.copy()
    made = answer_all(arm, batch, count, (), len(batch))
    counts = (backbone.meter - before).as_dict()
    texts = [(p + new, len(p)) for p, new in zip(batch, made.written, strict=True)]
    judged = record(backbone, texts, ())
    loss = [part.sum().item() for part in judged.loss[:, -1].split(list(judged.rows))]
    return {"written": made.written, "depths": made.depths, "loss": loss, "counts": counts}


def traced(
    backbone: Backbone,
    texts: Sequence[tuple[list[int], int]],
    exits: Sequence[int],
    batch_size: int,
    folder: Path,
    *,
    keep_hidden: bool = False,
) -> Trace:
    """Return the trace of the texts at these exits, the parts kept in ``folder`` first."""
    parts = []
    for batch in _batches(texts, batch_size, "trace"):
        digest = _digest(backbone, "trace", list(exits), batch, keep_hidden)
        path = folder / f"{digest}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            record(backbone, batch, exits, keep_hidden=keep_hidden).save(path)
        parts.append(load_trace(path))
    return joined(parts)


def first_rows(rows: Sequence[int]) -> torch.Tensor:
    """Return ``[T]`` bool: which rows of a trace are the first of their text."""
    first = torch.zeros(sum(rows), dtype=torch.bool)
    first[torch.tensor([0, *rows[:-1]]).cumsum(0)] = True
    return first


def _batches(items: Sequence[Any], size: int, name: str) -> Iterator[list[Any]]:
    with tqdm(total=len(items), desc=name, unit="text", leave=False) as bar:
        for start in range(0, len(items), size):
            batch = list(items[start : start + size])
            yield batch
            bar.update(len(batch))


def _digest(backbone: Backbone, *facts: Any) -> str:
    """Return a digest of everything that an answer or a trace depends on, versions included."""
    own = (versions(), backbone.fingerprint, backbone.name, backbone.weights, backbone.build)
    return hashlib.sha256(json.dumps([*own, *facts]).encode()).hexdigest()[:32]
