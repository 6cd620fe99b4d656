"""Texts in flight: their token ids, how far each layer got, and which tokens wait where.

Knows nothing of models. The rows of a step lie flat, ``hidden [N, D]``; a tuple of spans says which
sequence and which positions they belong to, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Text:
    """One sequence being read or written.

    ``waiting[layer]`` holds the inputs ``[m, D]`` of the first layer that those tokens did not run,
    oldest first. Tokens only ever leave, so a deeper queue holds older tokens, and all queues
    together are the last positions before ``done``.
    """

    ids: list[int]
    slot: Any
    """Where the backbone keeps this text's keys and values."""
    done: int = 0
    """Tokens that went through the first layer."""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    blocks: frozenset[int] = frozenset()
    """Exits whose own blocks hold every token that passed them."""

    @property
    def num_waiting(self) -> int:
        """Number of tokens that have not run every layer."""
        return sum(len(rows) for rows in self.waiting.values())

    def wait(self, layer: int, rows: Tensor) -> None:
        """Queue ``rows [m, D]`` in front of ``layer``."""
        earlier = self.waiting.get(layer)
        self.waiting[layer] = rows if earlier is None else torch.cat((earlier, rows))

    def trim(self, length: int) -> None:
        """Forget every token from position ``length`` on (the backbone trims its own keys)."""
        surplus = max(self.done - length, 0)
        self.done -= surplus
        del self.ids[length:]
        for layer in sorted(self.waiting):  # the newest tokens wait in the shallowest queue
            rows = self.waiting[layer]
            kept = max(len(rows) - surplus, 0)
            surplus -= len(rows) - kept
            if kept:
                self.waiting[layer] = rows[:kept]
            else:
                del self.waiting[layer]


@dataclass(frozen=True, slots=True)
class Span:
    """Positions ``start`` to ``stop`` (exclusive) of one text: consecutive rows of a step."""

    text: Text
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def ids(self) -> list[int]:
        """Return the token ids of these rows."""
        return self.text.ids[self.start : self.stop]


def divided(spans: Iterable[Span], rows: Sequence[int]) -> tuple[list[Span], list[Span]]:
    """Return the spans of these rows, each the last row of its own span, and those of the rest."""
    taken, rest, end = [], [], 0
    for span in spans:
        end += len(span)
        last = end - 1 in rows
        if last:
            taken.append(Span(span.text, span.stop - 1, span.stop))
        if len(span) > last:
            rest.append(Span(span.text, span.start, span.stop - last))
    return taken, rest


@dataclass(frozen=True, slots=True)
class Flow:
    """The rows now flowing through the layers.

    ``members[i]`` is the index, in the step's list of texts, of the text that ``spans[i]`` belongs
    to.
    """

    hidden: Tensor  # [N, D]
    spans: tuple[Span, ...]
    members: tuple[int, ...]

    def rows(self) -> tuple[Tensor, ...]:
        """Return each span's rows, ``[m_i, D]``."""
        return tuple(self.hidden.split([len(span) for span in self.spans]))

    def tails(self, counts: Sequence[int]) -> Tensor:
        """Return the last ``counts[i]`` rows of each span, joined."""
        if sum(counts) == self.hidden.shape[0]:
            return self.hidden
        ends = zip(self._ends(), counts, strict=True)
        return self._joined(range(end - n, end) for end, n in ends)

    def last(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """Return the index of the last row of each of these spans."""
        ends = self._ends()
        return tuple(ends[i] - 1 for i in chosen)

    def cut(self, counts: Sequence[int]) -> tuple[Flow, Flow]:
        """Return the flow without the last ``counts[i]`` rows of each span, and that of those."""
        if all(len(span) == n for span, n in zip(self.spans, counts, strict=True)):
            return self.select(()), self
        before, after = [], []
        for span, member, end, n in zip(
            self.spans, self.members, self._ends(), counts, strict=True
        ):
            middle, cut = span.stop - n, end - n
            before.append(
                (range(end - len(span), cut), Span(span.text, span.start, middle), member)
            )
            after.append((range(cut, end), Span(span.text, middle, span.stop), member))
        return self._of(before), self._of(after)

    def select(self, chosen: Iterable[int]) -> Flow:
        """Return the flow of the spans with these indices."""
        chosen = tuple(chosen)
        if len(chosen) == len(self.spans):
            return self
        ends = self._ends()
        return self._of(
            [
                (range(ends[i] - len(self.spans[i]), ends[i]), self.spans[i], self.members[i])
                for i in chosen
            ]
        )

    def _ends(self) -> list[int]:
        """Return where the rows of each span end."""
        return list(accumulate(len(span) for span in self.spans))

    def _of(self, parts: Sequence[tuple[range, Span, int]]) -> Flow:
        """Return the flow of these rows, whose they are and their members, without empty ones."""
        parts = [part for part in parts if part[0]]
        return Flow(
            self._joined(rows for rows, _, _ in parts),
            tuple(span for _, span, _ in parts),
            tuple(member for _, _, member in parts),
        )

    def _joined(self, rows: Iterable[range]) -> Tensor:
        """Return these rows: by one index, for a view of each takes as long as a small matrix."""
        index = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
        return self.hidden.index_select(0, index.to(self.hidden.device))

    def drain(self, layer: int) -> Flow:
        """Let the tokens that wait in front of ``layer`` go on with these rows."""
        if not any(layer in span.text.waiting for span in self.spans):
            return self
        joined, spans = [], []
        for span, rows in zip(self.spans, self.rows(), strict=True):
            queue = span.text.waiting.pop(layer, None)
            joined += [rows] if queue is None else [queue, rows]
            spans.append(
                Span(span.text, span.start - (0 if queue is None else len(queue)), span.stop)
            )
        return Flow(torch.cat(joined), tuple(spans), self.members)
