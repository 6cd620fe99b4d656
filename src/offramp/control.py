"""Speculation that watches itself: draft or not, from where and how far, chosen while decoding.

Each round takes the draft with the most tokens expected per second, from what was confirmed so far
and what rounds took, or none. What drafts may lose is kept in a *purse*, filled by a small share of
the time: a draft that could lose more than is in it is not tried (a conservative bandit, Wu et al.
2016). So decoding is never slower than plain by more than that share, once the purse it began with
is spent.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import median
from weakref import WeakKeyDictionary

from offramp.backbone import Backbone, must_halve
from offramp.cost import speculation_ratio, worth
from offramp.errors import UsageError
from offramp.speculate import Draft, Round
from offramp.timing import known

SHARE = 0.01
"""What trying drafts may cost, as a share of the time of plain decoding."""
PURSE = 4.0
"""What they may cost at first, and at most at once, in plain rounds."""
KEEP = 0.98
"""What a round leaves of what was learnt before: texts change."""
_SEEN = 15
"""Rounds whose median is what a round takes."""
_AGAIN = 32
"""Rounds after which plain decoding is timed again: the machine changes, and contexts grow."""
_KEPT: WeakKeyDictionary[Backbone, dict[object, Control]] = WeakKeyDictionary()
"""What :func:`remembered` made, for as long as its backbone lives."""


class _Belief:
    """How often a draft's tokens are right: counts of a Beta distribution, fading to its prior."""

    def __init__(self) -> None:
        self._right = self._wrong = 0.0
        self.learn(0, 0)

    def learn(self, right: int, wrong: int) -> None:
        """Add what a round told."""
        self._right, self._wrong = self._right + right, self._wrong + wrong
        a, b = 1 + self._right, 1 + self._wrong
        mean = a / (a + b)
        # The mean and one standard deviation: what little is known of is worth a try.
        self._chance = min(mean + math.sqrt(mean * (1 - mean) / (a + b + 1)), 1 - 1e-9)

    def fade(self) -> None:
        """Forget some of it: texts change."""
        self._right, self._wrong = KEEP * self._right, KEEP * self._wrong
        self.learn(0, 0)

    def hoped(self, drafted: int) -> float:
        """Return how many tokens a round may hope for: right drafts, and one of the full model."""
        return (1 - self._chance ** (drafted + 1)) / (1 - self._chance)


class _Costs:
    """What rounds with some number of texts take, a plain one = 1: predicted until measured."""

    def __init__(self, predicted: Sequence[float]) -> None:
        self.drafts = [*predicted]
        self._seen: dict[int | None, deque[float]] = defaultdict(lambda: deque(maxlen=_SEEN))
        self._took: dict[int | None, float] = {}

    @property
    def measured(self) -> bool:
        """Return whether a plain round was timed: there is something to compare with."""
        return None in self._took

    def update(self, draft: int | None, seconds: float) -> None:
        """Take in a round, with a draft of this index or a plain one."""
        self._seen[draft].append(seconds)
        self._took[draft] = median(self._seen[draft])
        for one, took in self._took.items():
            if one is not None:
                self.drafts[one] = took / self._took[None]


class Control:
    """Chooses the draft of each round, one for all texts of a batch; :func:`controlled` makes one.

    The same rounds on the same clock give the same choices. Whatever it chooses, the tokens are
    those of plain decoding.
    """

    def __init__(
        self,
        drafts: Sequence[Draft],
        predicted: Sequence[float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Know nothing but what rounds with these drafts are predicted to take, a plain one = 1."""
        self.drafts = tuple(drafts)
        self.clock = clock
        self.purse = PURSE
        """What drafts may lose now, in plain rounds."""
        self._beliefs = {draft.layers: _Belief() for draft in drafts}
        self._each = [self._beliefs[draft.layers] for draft in drafts]
        self._costs: dict[int, _Costs] = defaultdict(lambda: _Costs(predicted))
        """By the number of texts."""
        self._since = 0

    def choose(self, texts: int, reading: int) -> Draft | None:
        """Return the draft for a round of so many texts, or None for plain decoding.

        Rounds that read prompts, and the first of a batch of another size, are plain.
        """
        costs = self._costs[texts]
        if reading or not costs.measured or self._since >= _AGAIN:
            return None
        best, most = None, 1.0
        for draft, cost, belief in zip(self.drafts, costs.drafts, self._each, strict=True):
            # Most rounds end at the price, where drafts do not pay: this has to take no time.
            if cost - 1 <= self.purse and (rate := belief.hoped(draft.tokens) / cost) > most:
                best, most = draft, rate
        return best

    def learn(self, done: Round) -> None:
        """Take in what a round did and how long it took."""
        if done.reading:
            return
        costs = self._costs[done.texts]
        for belief in self._beliefs.values():
            belief.fade()
        if done.draft is None:
            costs.update(None, done.seconds)
            self._since = 0
            self.purse = min(self.purse + SHARE, PURSE)
            return
        self._since += 1
        index = self.drafts.index(done.draft)
        costs.update(index, done.seconds)
        right = sum(right for _, right in done.confirmed)
        wrong = sum(right < drafted for drafted, right in done.confirmed)
        self._beliefs[done.draft.layers].learn(right, wrong)
        cost = costs.drafts[index]
        gained = right / done.texts + 1
        self.purse = min(self.purse + SHARE * cost + gained - cost, PURSE)


def controlled(
    backbone: Backbone,
    drafts: Sequence[Draft],
    *,
    head: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Control:
    """Return what chooses among these drafts on this backbone.

    Args:
        backbone: what runs the layers; where it was timed on this machine, a draft's first cost is
            predicted in seconds, else in weights read.
        drafts: what to choose from, beside plain decoding.
        head: what choosing a drafted token costs, the full head = 1.
        clock: seconds, from any moment.

    Raises:
        UsageError: no draft, one that the model cannot make, or one of several leaves at an exit
            that owns a block.
    """
    return Control(drafts, _predicted(backbone, drafts, head), clock)


def remembered(backbone: Backbone, drafts: Sequence[Draft], *, head: float = 1.0) -> Control:
    """Return what :func:`controlled` does, the same for every call with the same predictions.

    What drafts may lose at first they lose once, not at the beginning of every answer.
    """
    predicted = _predicted(backbone, drafts, head)
    kept = _KEPT.setdefault(backbone, {})
    return kept.setdefault((tuple(drafts), predicted), Control(drafts, predicted))


def _predicted(backbone: Backbone, drafts: Sequence[Draft], head: float) -> tuple[float, ...]:
    """Return what a round with each of these drafts should take, a plain one = 1."""
    check_drafts(backbone, drafts)
    shape, constants = backbone.shape, known(backbone)
    return tuple(
        speculation_ratio(
            *(shape, worth(draft.layers, shape), draft.tokens, 0.0, constants),
            head=head,
            shared=draft.shared,
        )
        for draft in drafts
    )


def check_drafts(backbone: Backbone, drafts: Sequence[Draft]) -> None:
    """Refuse what cannot be chosen from on this model.

    Raises:
        UsageError: no draft, one that the model cannot make, or one of several leaves at an exit
            that owns a block.
    """
    if not drafts:
        raise UsageError("there is no draft to choose")
    for draft in drafts:
        draft.check(backbone.shape.num_layers)
        must_halve(backbone, draft.layers)
    owning = sorted({d.shared for d in drafts if d.kept.exits} & backbone.blocks.keys())
    if owning and len({draft.layers for draft in drafts}) > 1:
        raise UsageError(
            f"exit {owning[0]} owns a block that every token must pass, so it is no choice beside "
            "others; give it alone"
        )
