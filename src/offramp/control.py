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
from dataclasses import dataclass, field
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


@dataclass
class _Belief:
    """How often a draft's tokens are right: counts of a Beta distribution, fading to its prior."""

    right: float = 0.0
    wrong: float = 0.0

    def learn(self, right: int, wrong: int) -> None:
        self.right += right
        self.wrong += wrong

    def fade(self) -> None:
        self.right *= KEEP
        self.wrong *= KEEP

    @property
    def hoped(self) -> float:
        """Return the mean and one standard deviation: what little is known of is worth a try."""
        a, b = 1 + self.right, 1 + self.wrong
        mean = a / (a + b)
        return min(mean + math.sqrt(mean * (1 - mean) / (a + b + 1)), 1.0)


@dataclass
class Control:
    """Chooses the draft of each round, one for all texts of a batch; :func:`controlled` makes one.

    The same rounds on the same clock give the same choices. Whatever it chooses, the tokens are
    those of plain decoding.
    """

    drafts: tuple[Draft, ...]
    predicted: dict[Draft, float]
    """Time of a round with this draft, a plain one = 1: believed until it is measured."""
    clock: Callable[[], float] = time.perf_counter
    purse: float = PURSE
    """What drafts may lose now, in plain rounds."""
    _beliefs: dict[tuple[int, ...], _Belief] = field(default_factory=lambda: defaultdict(_Belief))
    _times: dict[tuple[int, Draft | None], deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_SEEN))
    )
    _took: dict[tuple[int, Draft | None], float] = field(default_factory=dict)
    """Their medians: one changes in a round, and every draft is weighed in each."""
    _since: int = 0

    def choose(self, texts: int, reading: int) -> Draft | None:
        """Return the draft for a round of so many texts, or None for plain decoding.

        Rounds that read prompts, and the first of a batch of another size, are plain.
        """
        if reading or (texts, None) not in self._took or self._since >= _AGAIN:
            return None
        best, most = None, 1.0
        for draft in self.drafts:
            cost = self._cost(texts, draft)
            rate = self._hoped(draft) / cost
            if rate > most and cost - 1 <= self.purse:
                best, most = draft, rate
        return best

    def learn(self, done: Round) -> None:
        """Take in what a round did and how long it took."""
        if done.reading:
            return
        key = done.texts, done.draft
        self._times[key].append(done.seconds)
        self._took[key] = median(self._times[key])
        for belief in self._beliefs.values():
            belief.fade()
        self._since += 1
        if done.draft is None:
            self._since = 0
            self.purse = min(self.purse + SHARE, PURSE)
            return
        belief = self._beliefs[done.draft.layers]
        for drafted, right in done.confirmed:
            belief.learn(right, int(right < drafted))
        cost = self._cost(done.texts, done.draft)
        gained = sum(right + 1 for _, right in done.confirmed) / done.texts
        self.purse = min(self.purse + SHARE * cost + gained - cost, PURSE)

    def _cost(self, texts: int, draft: Draft) -> float:
        """Return what a round with this draft takes, a plain one = 1."""
        took = self._took.get((texts, draft))
        return self.predicted[draft] if took is None else took / self._took[texts, None]

    def _hoped(self, draft: Draft) -> float:
        """Return how many tokens a text may hope for."""
        right = self._beliefs[draft.layers].hoped
        return sum(right**i for i in range(draft.tokens + 1))


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
    check_drafts(backbone, drafts)
    shape, constants = backbone.shape, known(backbone)
    predicted = {
        draft: speculation_ratio(
            *(shape, worth(draft.layers, shape), draft.tokens, 0.0, constants),
            head=head,
            shared=draft.shared,
        )
        for draft in drafts
    }
    return Control(tuple(drafts), predicted, clock)


def remembered(backbone: Backbone, drafts: Sequence[Draft], *, head: float = 1.0) -> Control:
    """Return what :func:`controlled` does, the same for every call with the same predictions.

    What drafts may lose at first they lose once, not at the beginning of every answer.
    """
    new = controlled(backbone, drafts, head=head)
    return _KEPT.setdefault(backbone, {}).setdefault(tuple(new.predicted.items()), new)


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
