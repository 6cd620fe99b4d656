"""What reads out the depths of one path: the last norm and head that all share, or an exit's own.

A block that an exit owns is one more decoder layer, with its own keys and values: every row that
passes the exit fills them, and only the rows that ask get its output (Balcony, Kangaroo).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Flow, Text
from offramp.errors import UsageError
from offramp.probe import Listed, Readout


@dataclass(frozen=True)
class At:
    """A readout as it is after ``depth`` of the model's layers, wherever its rows come from."""

    readout: Readout
    depth: int

    def __call__(self, hidden: Tensor, _depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]``."""
        return self.readout(hidden, self.depth)


def shared(backbone: Backbone, readout: Readout) -> At:
    """Return a readout as it is at full depth: by the model's own norm and head, and no exit's."""
    return At(readout, backbone.shape.num_layers)


class Exits:
    """The readouts along one path. Those of an exit apply where its first layers are the path's."""

    def __init__(self, backbone: Backbone, path: Sequence[int], asked: Sequence[int]) -> None:
        self._backbone = backbone
        self._first = next((i for i, layer in enumerate(path) if layer != i), len(path))
        stops = {*asked, len(path)}
        self.blocks = {
            depth: layer
            for depth, layer in backbone.blocks.items()
            if depth in stops and depth <= self._first
        }
        """Layer of each block to keep filled: of the exits asked at, and of the path's end."""

    def keep(self, texts: Sequence[Text]) -> None:
        """Note in each text which blocks hold its tokens from this step on.

        Raises:
            UsageError: a block would lack tokens that passed its exit in earlier steps.
        """
        for text in texts:
            missing = self.blocks.keys() - text.blocks
            if text.done and missing:
                raise UsageError(
                    f"exit {min(missing)} has a block of its own, which lacks the earlier tokens "
                    "of this text; use the exit from the first token on, or start a new text"
                )
            text.blocks = frozenset(self.blocks)

    def states(self, flow: Flow, depth: int, counts: Sequence[int]) -> Tensor:
        """Return what is read out after ``depth`` layers: the last ``counts[i]`` rows of each span.

        Where the exit owns a block, those run through it and the others fill its keys and values.
        """
        layer = self.blocks.get(depth)
        if layer is None:
            return flow.tails(counts)
        passing, asking = flow.cut(counts)
        if passing.spans:
            self._backbone.fill([layer], passing.hidden, passing.spans)
        if not asking.spans:
            return asking.hidden
        return self._backbone.run([layer], asking.hidden, asking.spans)

    def reader(self, readout: Readout, depth: int) -> Readout:
        """Return what reads out rows after ``depth`` layers; equal where one pass serves both."""
        if depth not in self._backbone.apart:
            return readout
        if isinstance(readout, Listed):
            return Listed(self.reader(readout.short, depth), readout.tokens)
        return At(readout, depth) if depth <= self._first else shared(self._backbone, readout)

    def own(self, asked: Sequence[int]) -> set[int]:
        """Return where no run may go past: own readouts to ask by, and blocks where none asks."""
        return {*self._backbone.apart.intersection(asked), *self.blocks.keys() - set(asked)}

    def deeper(self, depth: int) -> list[int]:
        """Return the layers of the blocks behind ``depth``."""
        return [layer for stop, layer in self.blocks.items() if stop > depth]
