"""What a signal or a policy may look at after an exit. Knows no model and no loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from offramp.errors import UsageError

Readout = Callable[[Tensor, int], Tensor]
"""``(hidden [S, D], depth) -> logits [S, V]``: norm, head and post-processing of that depth."""


@dataclass(frozen=True)
class Listed:
    """A readout of some vocabulary entries, each in its own place: all others are impossible."""

    short: Readout
    """Their logits side by side, ``[N, len(tokens)]``."""
    tokens: Tensor = field(compare=False)
    """Token ids, ascending, ``[len(tokens)]`` int64."""

    def __call__(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, largest token + 1]`` of states ``[N, D]``."""
        return self.spread(self.short(hidden, depth))

    def spread(self, found: Tensor) -> Tensor:
        """Return logits side by side, ``[N, len(tokens)]``, each in its own place."""
        logits = found.new_full((len(found), int(self.tokens[-1]) + 1), -math.inf)
        return logits.index_copy_(1, self.tokens.to(found.device), found)


@dataclass(frozen=True, eq=False)
class Probe:
    """The rows that ask to leave at one exit.

    ``scores`` holds the signals already known for these rows: what an earlier question computed,
    or a column of a trace. A probe out of a trace without hidden states has nothing else.
    """

    depth: int
    num_layers: int
    hidden: Tensor | None  # [S, D]
    readout: Readout | None
    previous: Probe | None = None
    """The same rows at the exit before."""
    scores: dict[str, Tensor] = field(default_factory=dict)  # each [S]
    look: Readout | None = None
    """What the check sees in place of the full head's logits; None: those themselves."""

    @property
    def rows(self) -> Tensor:
        """Return anything with one entry per row: its length and device are the probe's."""
        return next(iter(self.scores.values())) if self.hidden is None else self.hidden

    @cached_property
    def logits(self) -> Tensor:
        """Return those that choose the token of a row that leaves, the full head's ``[S, V]``.

        Computed only when asked for, and reused where the check looked at them.
        """
        if self.hidden is None or self.readout is None:
            raise UsageError(
                "this policy looks at hidden states or logits, which the trace did not keep; "
                "record it with keep_hidden=True, and replay it with the backbone"
            )
        listed = self._listed
        return self.readout(self.hidden, self.depth) if listed is None else listed.spread(self.seen)

    @property
    def is_read(self) -> bool:
        """Return whether what chooses the tokens has read these rows."""
        known = self.__dict__  # where ``cached_property`` keeps its result
        return "logits" in known or ("seen" in known and self._listed is not None)

    @property
    def _listed(self) -> Listed | None:
        """Return what chooses, if it is what the check sees with every entry in its place."""
        if isinstance(self.readout, Listed) and self.readout.short == self.look:
            return self.readout
        return None

    @cached_property
    def seen(self) -> Tensor:
        """Return the logits that the check looks at, ``[S, W]``: all, some, or approximate."""
        if self.hidden is None or self.look is None:
            return self.logits
        return self.look(self.hidden, self.depth)

    def show(self, seen: Tensor) -> None:
        """Take the logits that the check looks at, ``[S, W]``, from who has computed them."""
        self.__dict__["logits" if self.look is None else "seen"] = seen

    @cached_property
    def top(self) -> Tensor:
        """Return the index of each row's largest logit seen, ``[S]``."""
        return self.seen.argmax(-1)

    @cached_property
    def probabilities(self) -> Tensor:
        """Return those of the logits seen, ``[S, W]`` in fp32."""
        return torch.softmax(self.seen.float(), -1)

    def take(self, rows: Sequence[int]) -> Probe:
        """Return the probe of these rows, with what was computed for them."""
        index = torch.tensor(rows, dtype=torch.long, device=self.rows.device)
        taken = Probe(
            self.depth,
            self.num_layers,
            None if self.hidden is None else self.hidden[index],
            self.readout,
            None if self.previous is None else self.previous.take(rows),
            {name: score[index] for name, score in self.scores.items()},
            self.look,
        )
        # ``cached_property`` keeps its result in ``__dict__``: hand it on, not compute it twice.
        for name in ("logits", "seen", "top", "probabilities"):
            if name in self.__dict__:
                taken.__dict__[name] = self.__dict__[name][index]
        return taken
