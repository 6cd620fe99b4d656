"""What a trace's JSON says: each exit's means with intervals, and texts token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from offramp.plan import Plan
from offramp.reliability import Bins, share_interval
from offramp.runs import Exit
from offramp.text import Prompt, pieces
from offramp.trace import Replay, Trace

_MOST_CELLS = 200_000
"""Tokens times exits written out token by token: what a page of a few megabytes can show."""


def exit_rows(recorded: Trace) -> list[dict[str, Any]]:
    """Return the means of each exit, and of the last layer."""
    rows: list[dict[str, Any]] = [
        {
            "depth": depth,
            "agreement": recorded.agrees[:, i].float().mean().item(),
            "loss": recorded.loss[:, i].mean().item(),
            **{name: column[:, i].mean().item() for name, column in recorded.scores.items()},
            "reliability": _reliability(recorded, i),
        }
        for i, depth in enumerate(recorded.exits)
    ]
    last = {
        "depth": recorded.num_layers,
        "agreement": 1.0,
        "loss": recorded.loss[:, -1].mean().item(),
    }
    return [*rows, dict.fromkeys(recorded.scores, float("nan")) | last]


def _reliability(recorded: Trace, column: int) -> list[dict[str, Any]]:
    bins = Bins()
    bins.add(recorded.scores["max_prob"][:, column].double(), recorded.agrees[:, column].double())
    return bins.curve()


def curve(recorded: Trace, done: Replay | None) -> dict[str, Any]:
    """Return agreement against layers run: of leaving everywhere at one exit, and of the plan."""
    points = [
        _point(recorded, f"all at {depth}", depth / recorded.num_layers, recorded.agrees[:, i])
        for i, depth in enumerate(recorded.exits)
    ]
    if done is not None:
        share = done.depths.float().mean().item() / recorded.num_layers
        points.append(_point(recorded, "this plan", share, done.chosen == recorded.chosen[:, -1]))
    return {
        "quality": "tokens on which the choice is the full model's",
        "cost": "layers run to choose a token / all layers",
        "points": points,
        "full": {"name": "full depth", "cost": 1.0, "quality": 1.0},
    }


def _point(recorded: Trace, name: str, cost: float, right: Tensor) -> dict[str, Any]:
    texts = [(int(part.sum()), len(part)) for part in right.split(list(recorded.rows))]
    low, high = share_interval(texts) or (None, None)
    quality = right.float().mean().item()
    return {"name": name, "cost": cost, "quality": quality, "low": low, "high": high}


def signal_of(plan: Plan) -> str | None:
    """Return the signal that a plan looks at, if it does."""
    return plan.run.signal if isinstance(plan.run, Exit) else None


def details(
    recorded: Trace,
    done: Replay | None,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    signal: str | None,
) -> dict[str, Any]:
    """Return the first texts token by token, and what the ids in them say."""
    names = [name for name in dict.fromkeys(("max_prob", signal)) if name in recorded.scores]
    texts, said = [], set[int]()
    for (ids, rows), prompt in zip(_within(recorded), prompts, strict=False):
        count = rows.stop - rows.start
        chosen = recorded.chosen[rows].tolist()
        said.update(token for row in chosen for token in row)
        texts.append(
            {
                "prompt": prompt,
                "token_ids": ids[-count:] if count else [],
                "pieces": pieces(tokenizer, ids)[-count:] if count else [],
                "depths": None if done is None else done.depths[rows].tolist(),
                "chosen": chosen,
                "scores": {name: _rounded(recorded.scores[name][rows]) for name in names},
            }
        )
    words = tokenizer.batch_decode([[token] for token in sorted(said)])
    vocabulary = {str(token): word for token, word in zip(sorted(said), words, strict=True)}
    return {"texts": texts, "vocabulary": vocabulary}


def _within(recorded: Trace) -> Iterator[tuple[list[int], slice]]:
    """Yield ids and counted rows of the texts that fit; the first one always does."""
    start = cells = 0
    parts = recorded.ids.split(list(recorded.lengths))
    for ids, rows in zip(parts, recorded.rows, strict=True):
        cells += rows * (len(recorded.exits) + 1)
        if start and cells > _MOST_CELLS:
            return
        yield ids.tolist(), slice(start, start + rows)
        start += rows


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[float(f"{score:.3g}") for score in row] for row in scores.tolist()]
