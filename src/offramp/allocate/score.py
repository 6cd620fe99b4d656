"""Makes score tables: from one trace for all depths, or by running every way; adds features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from offramp.allocate.table import ScoreTable
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.cost import worth
from offramp.errors import UsageError
from offramp.model import Model, Output
from offramp.paths import prefix
from offramp.plan import ModelId, Plan
from offramp.router import look
from offramp.runs import Exit, Full, Path
from offramp.sample import Sampling
from offramp.text import Prompt
from offramp.trace import Trace

Score = Literal["loss", "match", "agreement"]
"""Scores that one full pass over a text gives for every depth, all teacher-forced.

``loss``: minus the mean cross-entropy of the text's own tokens, in nats. ``match``: share of the
text's own tokens that the depth would choose. ``agreement``: share of tokens on which it would
choose what the last layer does; of the full model it is 1 by definition.
"""

Judge = Callable[[int, Output], float]
"""``(index of the prompt, answer) -> score``, higher = better."""


def from_trace(trace: Trace, model: ModelId, score: Score, *, seed: int = 0) -> ScoreTable:
    """Return the table of the trace's exits and of full depth; texts are the trace's.

    A sub-model of the first d layers has, at every position, just the state that the full pass has
    there; so for one text given, these are its own scores, and not an approximation. What it would
    have written itself is another question (:func:`by_running`).

    ``halves`` are the scores on even and on odd tokens. ``null`` is the full model's score on P
    random draws, with replacement, of each text's own tokens: depths that differ by noise alone.

    Raises:
        UsageError: no exits, an unknown score, or a text with fewer than two counted tokens.
    """
    if min(trace.rows) < 2:
        raise UsageError(
            f"text {trace.rows.index(min(trace.rows)) + 1} has fewer than 2 tokens to score, and "
            "scores are compared between halves of a text; leave it out"
        )
    draw = torch.Generator().manual_seed(seed)
    values = _values(trace, score).double()
    parts = values.split(list(trace.rows))
    halves = [torch.stack([part[k::2].mean(0) for part in parts]) for k in (0, 1)]
    ways = len(trace.exits) + 1
    null = torch.stack([_redrawn(part[:, -1], ways, draw) for part in parts])
    depths = [*trace.exits, trace.num_layers]
    return ScoreTable(
        model=model,
        score=score,
        teacher_forced=True,
        runs=tuple(_first(depth, trace.num_layers) for depth in depths),
        costs=torch.tensor(depths, dtype=torch.float64),
        scores=torch.stack([part.mean(0) for part in parts]),
        halves=torch.stack(halves),
        null=null if score != "agreement" else None,  # which has no noise at full depth
    )


def _values(trace: Trace, score: Score) -> Tensor:
    """Return the score of each counted token at each exit and the end, ``[T, E + 1]``."""
    match score:
        case "loss":
            return -trace.loss
        case "agreement":
            return trace.chosen == trace.chosen[:, -1:]
        case "match":
            return trace.chosen == trace.targets[:, None]
    raise UsageError(f"there is no score {score!r}; there are loss, match and agreement")


def _redrawn(values: Tensor, times: int, draw: torch.Generator) -> Tensor:
    """Return the mean of ``times`` bootstrap samples of one text's tokens, ``[times]``."""
    index = torch.randint(len(values), (times, len(values)), generator=draw)
    return values[index].mean(1)


def _first(depth: int, num_layers: int) -> Full | Path:
    return Full() if depth == num_layers else Path(layers=prefix(depth, num_layers))


def by_running(
    model: Model,
    prompts: Sequence[Prompt],
    runs: Sequence[Full | Exit | Path],
    judge: Judge,
    *,
    name: str,
    sampling: Sampling | None = None,
    max_new_tokens: int = 64,
    raw: bool = False,
    batch_size: int = 8,
) -> ScoreTable:
    """Return the table of what each way writes itself, judged: the paper's own construction.

    A path costs its layers, halves by their weights; a plan that exits costs the mean depth it had
    here, to a hundredth. With sampling, ``null`` is the dearest way run P more times with other
    seeds; greedy runs have no seed, and no null.

    Args:
        model: what writes.
        prompts: what it is asked.
        runs: two ways or more, in any order.
        judge: scores one answer.
        name: what its score is called.
        sampling: how tokens are drawn, greedy by default.
        max_new_tokens: most new tokens of each answer.
        raw: leave out the chat template.
        batch_size: prompts at once.

    Raises:
        UsageError: a way that the model lacks, or a score that is no number.
    """

    def score(run: Full | Exit | Path, shift: int = 0) -> tuple[list[float], float]:
        drawn = replace(sampling, seed=sampling.seed + shift * len(prompts)) if sampling else None
        outputs = model.generate(
            prompts,
            plan=Plan(run=run),
            sampling=drawn,
            max_new_tokens=max_new_tokens,
            raw=raw,
            batch_size=batch_size,
        ).outputs
        depths = [depth for output in outputs for depth in output.depths]
        cost = worth(run.layers, shape) if isinstance(run, Path) else sum(depths) / len(depths)
        return [judge(i, output) for i, output in enumerate(outputs)], round(cost, 2)

    shape = model.backbone.shape
    for run in runs:
        Plan(run=run).check(model.backbone)
    # The last way is what is to be equalled; one that spares the full head runs as many layers.
    done = sorted(
        ((*score(run), run) for run in runs), key=lambda one: (one[1], not isinstance(one[2], Exit))
    )
    null = None
    if sampling is not None and sampling.temperature > 0:
        again = [score(done[-1][2], k)[0] for k in range(1, len(runs) + 1)]
        null = torch.tensor(again, dtype=torch.float64).T
    return ScoreTable(
        model=model.id,
        score=name,
        teacher_forced=False,
        runs=tuple(run for _, _, run in done),
        costs=torch.tensor([cost for _, cost, _ in done], dtype=torch.float64),
        scores=torch.tensor([scores for scores, _, _ in done], dtype=torch.float64).T,
        null=null,
    )


def features_of(
    backbone: Backbone,
    prompts: Iterable[Sequence[int]],
    exits: Sequence[int],
    *,
    batch_size: int = 8,
) -> Tensor:
    """Return what a router sees of each prompt (token ids) at these depths, ``[N, F]`` fp32."""
    rest, parts = iter(prompts), []
    while group := list(islice(rest, batch_size)):
        parts.append(_looked(backbone, group, exits))
    return torch.cat(parts)


def _looked(backbone: Backbone, prompts: Sequence[Sequence[int]], exits: Sequence[int]) -> Tensor:
    texts = [Text(list(ids), backbone.open()) for ids in prompts]
    try:
        return look(backbone, texts, exits)
    finally:
        for text in texts:
            backbone.close(text.slot)
