"""Which layers to keep: evenly spread ones, or what is left when the least useful go one by one.

Or halves of layers: then a layer may lose its attention or its MLP alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from offramp.backbone import Backbone, must_halve
from offramp.cost import worth
from offramp.errors import UsageError
from offramp.paths import ATTENTION, MLP, Part, is_whole, layer_of, unified_skip
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

    layers: tuple[Part, ...]
    removed: Part | None
    """What was taken out last; None of a path that was not made so."""
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
    backbone: Backbone,
    texts: Texts,
    keep: int,
    by: By,
    told: Told = lambda _share: None,
    *,
    halves: bool = False,
) -> list[Step]:
    """Return the paths found, from all layers to ``keep`` of them; layer 0 always stays.

    Evenly spread layers (``"uls"``) are found at once, and all layers are given beside them. The
    others take one layer after the other out of the path: the one whose output is most like its
    input by cosine, or the one without which the loss is least. What runs in front of that layer
    is kept, so a candidate costs only the layers behind it. With ``halves`` attention and MLP of a
    layer are candidates, too, and that goes first whose weights cost the least loss each, until
    what is left weighs no more than ``keep`` layers.

    Args:
        backbone: what runs the layers.
        texts: each with the number of leading tokens that are not counted.
        keep: how many layers to keep, 1 to L - 1.
        by: how to choose.
        told: hears how far it is.
        halves: whether halves of layers may go; only by loss.

    Raises:
        UsageError: too few texts, a text with nothing to predict, more layers than there are, or
            halves of a model whose layers have none, or by something else than loss.
        OfframpError: a score is no number.
    """
    depth = backbone.shape.num_layers
    check_keep(keep, depth)
    if halves:
        check_halves(backbone, by)
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
        while by != "uls" and (left := worth(shrinking.path, backbone.shape)) > keep:
            tell = partial(_tell, told, depth - left, depth - keep)
            if by == "cosine":
                removed, found = shrinking.most_alike(tell)
            else:
                removed, found = shrinking.least_missed(tell, halves=halves)
            shrinking.remove(removed)
            steps.append(step(shrinking.path, removed, found))
        told(1.0)
        return steps


def check_halves(backbone: Backbone, by: By) -> None:
    """Refuse to look for halves where there are none to be found.

    Raises:
        UsageError: the layers run only as wholes, or candidates are not judged by loss.
    """
    if by != "loss":
        raise UsageError(f"halves of layers are looked for by loss, not by {by}")
    must_halve(backbone, [1 | MLP])


def _tell(told: Told, done: float, whole: float, share: float) -> None:
    told(min((done + share) / whole, 1.0))


class Shrinking:
    """A path that loses one part after the other, and the state in front of each that is left."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.path: list[int] = []
        self._inputs: list[Tensor] = []
        self._cosines: list[float] = []
        self.end = passes.inputs
        self._follow(range(passes.depth), passes.inputs)

    def remove(self, removed: int) -> None:
        """Take a part of the path out, or half of one."""
        place, behind = self._behind(removed)
        before = self._inputs[place]
        for kept in (self.path, self._inputs, self._cosines):
            del kept[place:]
        self._follow(behind, before)

    def most_alike(self, told: Told) -> tuple[int, Judgement]:
        """Return what, but for the first, changes its states least, and what is left without it."""
        place = max(range(1, len(self.path)), key=self._cosines.__getitem__)
        told(0.5)
        return self.path[place], self._without(self.path[place])

    def least_missed(self, told: Told, *, halves: bool = False) -> tuple[int, Judgement]:
        """Return what, but for the first, costs least loss for its weights, and what is left."""
        now, shape = self.passes.judge(self.path, self.end).loss, self.passes.backbone.shape
        parts = [
            part
            for whole in self.path[1:]
            for part in ((whole, whole | ATTENTION, whole | MLP) if halves else (whole,))
            if part == whole or is_whole(whole)
        ]
        found: dict[int, Judgement] = {}
        for part in parts:
            found[part] = self._without(part)
            told(len(found) / len(parts))
        best = min(found, key=lambda part: (found[part].loss - now) / worth([part], shape))
        return best, found[best]

    def _without(self, removed: int) -> Judgement:
        place, behind = self._behind(removed)
        end = self.passes.run(behind, self._inputs[place])
        return self.passes.judge([*self.path[:place], *behind], end)

    def _behind(self, removed: int) -> tuple[int, list[int]]:
        """Return the place of a part, and what follows there once it, or half of it, is out."""
        place = [*map(layer_of, self.path)].index(layer_of(removed))
        left = [] if removed == self.path[place] else [removed ^ (ATTENTION | MLP)]
        return place, [*left, *self.path[place + 1 :]]

    def _follow(self, layers: Sequence[int], hidden: Tensor) -> None:
        """Append these layers, which start from this state."""
        found, inputs, self.end = cosines(self.passes, layers, hidden)
        self.path += layers
        self._inputs += inputs
        self._cosines += found
