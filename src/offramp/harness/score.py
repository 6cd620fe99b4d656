"""What a plan thinks of a given continuation: each token at the depth where it would leave.

Three ways, one meaning. A plan whose tokens are all read out after the same layers needs one pass.
One whose tokens leave and wait (``kv="exact"``) is replayed on one full pass, as exactly as
:mod:`offramp.trace` replays anything. What no pass can replay, because later tokens see what an
early exit left behind, is run: the plan's own loop, told at each step what to say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.checks import FullHead, Refined
from offramp.errors import UsageError
from offramp.gate import Gate
from offramp.plan import execute
from offramp.request import Request
from offramp.runs import Adapt, Exit, Full, Path, Run, Speculate
from offramp.step import step
from offramp.trace import record, replay

Method = Literal["pass", "replay", "loop"]
"""How a plan's own scores are found."""

_WHOLE = FullHead | Refined
"""Heads that score as the full one: a refined one is it, where more than the largest is asked."""
_BUDGET = 2**26
"""Logits kept at once, in elements (256 MiB in fp32)."""


@dataclass(frozen=True)
class Item:
    """What is to be scored, in token ids, neither part empty."""

    given: list[int]
    said: list[int]


@dataclass(frozen=True)
class Score:
    """What the plan thinks of one continuation."""

    logprob: float
    """Sum over its tokens of the natural logarithm of their probabilities."""
    greedy: bool
    """Whether each token is the plan's own first choice."""
    depths: list[int]
    """Layers that judged each token."""


def method(run: Run) -> Method:
    """Return how scores of this kind of plan are found.

    Drafts are confirmed by every layer: the full model's scores are those of speculation.
    """
    match run:
        case Full() | Speculate() | Adapt():
            return "pass"
        case Path() if isinstance(run.head, _WHOLE):
            return "pass"
        case Exit() if run.kv == "exact" and isinstance(run.head, _WHOLE):
            return "replay"
        case _:
            return "loop"


def score(
    backbone: Backbone,
    run: Run,
    items: Sequence[Item],
    *,
    eos: Collection[int] = (),
    batch_size: int = 8,
) -> Iterator[tuple[int, Score]]:
    """Yield (index, score) of every item, as they are found.

    Args:
        backbone: what runs the layers.
        run: how; it must fit the backbone.
        items: what to score; a text and its continuation have to fit the context.
        eos: tokens that end a text; a head of few tokens can always say them.
        batch_size: texts at once, where texts share passes: a replay takes them one by one.

    Raises:
        UsageError: a text longer than the context, or a continuation the plan could never say.
    """
    context = backbone.shape.context
    longest = max((len(item.given) + len(item.said) for item in items), default=0)
    if longest > context:
        raise UsageError(f"a text to score has {longest} tokens, and the model reads {context}")
    match method(run), run:
        case "replay", Exit():
            return ((i, _replayed(backbone, run, item)) for i, item in enumerate(items))
        case "loop", _:
            return _run(backbone, run, items, frozenset(eos), batch_size)
        case _:
            layers = run.layers if isinstance(run, Path) else None
            return _passed(backbone, layers, items, batch_size)


def _passed(
    backbone: Backbone, layers: Sequence[int] | None, items: Sequence[Item], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Score by one pass over each text, several texts at once."""
    for batch in _batches(items, batch_size, backbone.shape.vocab_size):
        texts: list[Text] = []
        try:
            for i in batch:
                ids = [*items[i].given, *items[i].said[:-1]]  # the last one predicts nothing asked
                texts.append(Text(ids, backbone.open()))
            counts = [len(items[i].said) for i in batch]
            found = step(backbone, texts, layers=layers, tails=counts)
        finally:
            for text in texts:
                backbone.close(text.slot)
        for i, logits, depth in zip(batch, found.rows, found.depths, strict=True):
            logprobs, greedy = _judged(logits, items[i].said)
            depths = [depth] * len(logprobs)
            yield i, Score(float(logprobs.sum()), bool(greedy.all()), depths)


def _batches(items: Sequence[Item], size: int, vocab: int) -> Iterator[list[int]]:
    """Yield the indices of items that share a pass: so many, or fewer where logits are many."""
    batch: list[int] = []
    rows = 0
    for i, item in enumerate(items):
        if batch and (len(batch) == size or (rows + len(item.said)) * vocab > _BUDGET):
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(item.said)
    if batch:
        yield batch


def _judged(logits: Tensor, said: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and whether they are the largest, of one token per row ``[n, V]``.

    A head of few tokens gives the others no probability, and its logits may end before them.
    """
    targets = torch.tensor(said, device=logits.device)
    inside = targets < logits.shape[1]
    columns = targets.where(inside, 0)[:, None]
    logprobs = torch.log_softmax(logits.float(), -1).gather(1, columns)[:, 0]
    greedy = logits.argmax(-1) == targets
    return logprobs.masked_fill(~inside, -math.inf).cpu(), greedy.cpu()


def _replayed(backbone: Backbone, run: Exit, item: Item) -> Score:
    """Score by a full pass that keeps what the exits see, and the policy's decisions on it."""
    by_state = isinstance(run.policy, Gate)  # other policies look at recorded scores
    trace = record(
        backbone,
        [([*item.given, *item.said], len(item.given))],
        run.policy.exits,
        keep_hidden=by_state,
        check=run.sees,
    )
    found = replay(
        trace,
        run.policy,
        max_waiting=run.max_waiting,
        exit_prompt=run.exit_prompt,
        check=run.sees,
        backbone=backbone if by_state else None,
    )
    greedy = bool((found.chosen == torch.tensor(item.said)).all())
    return Score(-float(found.loss.sum()), greedy, found.depths.tolist())


@dataclass
class _Told:
    """A chooser that says what it is told, and remembers what the logits thought of it."""

    item: Item
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        start = first - len(self.item.given)
        said = self.item.said[start : start + len(logits)]
        logprobs, greedy = _judged(logits, said)
        if not bool(logprobs.isfinite().all()):
            raise UsageError(
                f"the plan's head can never say token {said[int(logprobs.argmin())]}, which the "
                "harness asks about; score with a plan whose head is the full one"
            )
        self.logprobs += logprobs.tolist()
        self.greedy &= bool(greedy.all())
        return said


def _run(
    backbone: Backbone, run: Run, items: Sequence[Item], eos: frozenset[int], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Score by the plan's own loop."""
    if any(eos.intersection(item.said[:-1]) for item in items):
        raise UsageError(
            "a continuation goes on after the token that ends a text, where this plan would have "
            "stopped; score it with a plan that can be replayed (kv exact and the full head)"
        )
    told = [_Told(item) for item in items]
    depths: list[list[int]] = [[] for _ in items]
    requests = [Request(one.item.given, len(one.item.said), one, eos) for one in told]
    for token in execute(backbone, requests, run, batch_size=batch_size):
        depths[token.index].append(token.depth)
        if token.finish is not None:
            one = told[token.index]
            yield token.index, Score(math.fsum(one.logprobs), one.greedy, depths[token.index])
