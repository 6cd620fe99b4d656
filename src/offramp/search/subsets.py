"""Which layers to keep: evenly spread ones, or what is left when the least useful go one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import UsageError
from offramp.paths import unified_skip
from offramp.search.passes import Judgement, Passes, Texts, opened
from offramp.search.scores import cosines

By = Literal["uls", "cosine", "loss"]
Told = Callable[[float], object]
"""Is called with the share of the search that is done, 0 to 1."""

FEWEST = 6
"""Texts that a search needs; one in three is held out."""


@dataclass(frozen=True)
class Step:
    """A path on the way from all layers to few."""

    layers: tuple[int, ...]
    removed: int | None
    """The layer that was taken out last; None of a path that was not made so."""
    searched: Judgement
    """On the texts that it was chosen by."""
    held_out: Judgement
    """On texts that had no say."""


def split(texts: Texts) -> tuple[Texts, Texts]:
    """Return the texts to search on, and every third one, which is held out.

    Raises:
        UsageError: they are too few.
    """
    check_count(len(texts))
    return [text for i, text in enumerate(texts) if i % 3 != 2], texts[2::3]


def check_keep(keep: int, num_layers: int) -> None:
    """Refuse a number of layers that leaves nothing out, or nothing.

    Raises:
        UsageError: it is not 1 to L - 1.
    """
    if not 1 <= keep < num_layers:
        raise UsageError(
            f"a search keeps some of the {num_layers} layers, 1 to {num_layers - 1}, not {keep}"
        )


def check_count(count: int) -> None:
    """Refuse so few texts that what is found would say nothing.

    Raises:
        UsageError: they are fewer than ``FEWEST``.
    """
    if count < FEWEST:
        raise UsageError(
            f"a search needs {FEWEST} texts or more, one in three held out, not {count}"
        )


def search(
    backbone: Backbone, texts: Texts, keep: int, by: By, told: Told = lambda _share: None
) -> list[Step]:
    """Return the paths found, from all layers to ``keep`` of them; layer 0 always stays.

    Evenly spread layers (``"uls"``) are found at once, and all layers are given beside them. The
    others take one layer after the other out of the path: the one whose output is most like its
    input by cosine, or the one without which the loss is least. What runs in front of that layer
    is kept, so a candidate costs only the layers behind it.

    Args:
        backbone: what runs the layers.
        texts: each with the number of leading tokens that are not counted.
        keep: how many layers to keep, 1 to L - 1.
        by: how to choose.
        told: hears how far it is.

    Raises:
        UsageError: too few texts, a text with nothing to predict, or more layers than there are.
        OfframpError: a score is no number.
    """
    depth = backbone.shape.num_layers
    check_keep(keep, depth)
    searched, held_out = split(texts)
    with opened(backbone, searched) as passes, opened(backbone, held_out) as others:

        def step(path: Sequence[int], removed: int | None, found: Judgement) -> Step:
            ends = others.run(path, others.inputs)
            return Step(tuple(path), removed, found, others.judge(path, ends))

        shrinking = Shrinking(passes)
        steps = [step(shrinking.path, None, passes.judge(range(depth), shrinking.end))]
        if by == "uls":
            path = unified_skip(keep, depth)
            steps.append(step(path, None, passes.judge(path, passes.run(path, passes.inputs))))
        while by != "uls" and len(shrinking.path) > keep:
            done, whole = depth - len(shrinking.path), depth - keep
            find = shrinking.most_alike if by == "cosine" else shrinking.least_missed
            place, found = find(partial(_tell, told, done, whole))
            removed = shrinking.remove(place)
            steps.append(step(shrinking.path, removed, found))
        told(1.0)
        return steps


def _tell(told: Told, done: int, whole: int, share: float) -> None:
    told((done + share) / whole)


class Shrinking:
    """A path that loses one layer after the other, and the state in front of each that is left."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.path: list[int] = []
        self._inputs: list[Tensor] = []
        self._cosines: list[float] = []
        self.end = passes.inputs
        self._follow(range(passes.depth), passes.inputs)

    def remove(self, place: int) -> int:
        """Take out the layer at this place of the path, and return it."""
        removed, behind = self.path[place], self.path[place + 1 :]
        before = self._inputs[place]
        for kept in (self.path, self._inputs, self._cosines):
            del kept[place:]
        self._follow(behind, before)
        return removed

    def most_alike(self, told: Told) -> tuple[int, Judgement]:
        """Return the place, from 1 on, whose layer changes its states least, and what is left."""
        place = max(range(1, len(self.path)), key=self._cosines.__getitem__)
        told(0.5)
        return place, self._without(place)

    def least_missed(self, told: Told) -> tuple[int, Judgement]:
        """Return the place, from 1 on, without whose layer the loss is least, and what is left."""
        found: dict[int, Judgement] = {}
        for place in range(1, len(self.path)):
            found[place] = self._without(place)
            told(place / len(self.path))
        best = min(found, key=lambda place: found[place].loss)
        return best, found[best]

    def _without(self, place: int) -> Judgement:
        behind = self.path[place + 1 :]
        end = self.passes.run(behind, self._inputs[place])
        return self.passes.judge([*self.path[:place], *behind], end)

    def _follow(self, layers: Sequence[int], hidden: Tensor) -> None:
        """Append these layers, which start from this state."""
        found, inputs, self.end = cosines(self.passes, layers, hidden)
        self.path += layers
        self._inputs += inputs
        self._cosines += found
