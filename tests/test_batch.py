"""Texts in flight: whoever leaves waits in the right queue, in order, until someone passes by.

The rows of these tests are ``[text, position]``, so that every row says where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.batch import Flow, Span, Text

LAYERS = 6
LAW = settings(max_examples=100, deadline=None)


@dataclass
class Book:
    """What must be true of one text: how many layers each of its tokens has run."""

    number: int
    text: Text = field(default_factory=lambda: Text([], None))
    depths: list[int] = field(default_factory=list)

    def write(self, count: int) -> Span:
        """Add tokens, and return the rows that have not run."""
        self.text.ids += range(len(self.text.ids), len(self.text.ids) + count)
        return Span(self.text, self.text.done, len(self.text.ids))

    def ran(self, depth: int) -> None:
        """Note a step: the new tokens get this deep, and so do those who waited less deep."""
        new = len(self.text.ids) - len(self.depths)
        self.depths = [max(d, depth) for d in self.depths] + [depth] * new

    def trim(self, length: int) -> None:
        """Forget the newest tokens."""
        self.text.trim(length)
        del self.depths[length:]

    def check(self) -> None:
        """Compare the text with what must be true of it."""
        waiting: dict[int, list[list[float]]] = {}
        for position, depth in enumerate(self.depths):
            if depth < LAYERS:
                waiting.setdefault(depth, []).append([self.number, position])
        assert waiting == {layer: rows.tolist() for layer, rows in self.text.waiting.items()}
        assert len(self.depths) == self.text.done
        assert sum(map(len, waiting.values())) == self.text.num_waiting
        deepest_first = [row for depth in sorted(waiting, reverse=True) for row in waiting[depth]]
        last = range(self.text.done - self.text.num_waiting, self.text.done)
        assert [[self.number, position] for position in last] == deepest_first


def rows_of(book: Book, span: Span) -> Tensor:
    """The rows of a span, ``[m, 2]``."""
    positions = range(span.start, span.stop)
    return torch.tensor([[book.number, p] for p in positions], dtype=torch.float32).reshape(-1, 2)


def flow_of(books: Sequence[Book], spans: Sequence[Span]) -> Flow:
    """The flow of these spans, as a backbone embeds them."""
    hidden = torch.cat([rows_of(book, span) for book, span in zip(books, spans, strict=True)])
    return Flow(hidden, tuple(spans), tuple(range(len(spans))))


def check_rows(flow: Flow, books: Sequence[Book]) -> None:
    """Every row is where its span says, in order."""
    expected = [rows_of(books[m], s) for m, s in zip(flow.members, flow.spans, strict=True)]
    assert [rows.tolist() for rows in expected] == [rows.tolist() for rows in flow.rows()]
    assert [id(books[m].text) for m in flow.members] == [id(span.text) for span in flow.spans]


def step(books: Sequence[Book], counts: Sequence[int], depths: Sequence[int]) -> None:
    """Write and run new tokens, each text as deep as it is told, and compare at every layer."""
    spans = [book.write(count) for book, count in zip(books, counts, strict=True)]
    flow = flow_of(books, spans)
    for book in books:
        book.text.done = len(book.text.ids)
    for layer in range(LAYERS):
        gone = flow.select(i for i, m in enumerate(flow.members) if depths[m] == layer)
        for span, rows in zip(gone.spans, gone.rows() if gone.spans else (), strict=True):
            span.text.wait(layer, rows)
        flow = flow.select(i for i, m in enumerate(flow.members) if depths[m] > layer)
        if not flow.spans:
            break
        flow = flow.drain(layer)
        check_rows(flow, books)
    for book, depth in zip(books, depths, strict=True):
        book.ran(depth)
        book.check()


depth = st.integers(1, LAYERS)
counts = st.integers(1, 3)


@LAW
@given(st.integers(1, 3), st.data())
def test_tokens_wait_where_they_left_and_go_on_in_order(number: int, data: st.DataObject) -> None:
    """Over any steps and trims of several texts, a token waits after the layers that it ran."""
    books = [Book(i) for i in range(number)]
    for _ in range(data.draw(st.integers(1, 8))):
        together = st.lists(st.sampled_from(books), min_size=1, unique_by=id)
        chosen: list[Book] = data.draw(together)
        if data.draw(st.booleans()):
            news = [data.draw(counts) for _ in chosen]
            step(chosen, news, [data.draw(depth) for _ in chosen])
        else:
            for book in chosen:
                book.trim(data.draw(st.integers(0, len(book.text.ids) + 1)))
                book.check()


@LAW
@given(st.lists(depth, min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 3))
def test_trim_forgets_exactly_the_newest_tokens(
    depths: list[int], length: int, drafted: int
) -> None:
    """The oldest tokens keep their places; those proposed but not run are forgotten, too."""
    book = Book(0)
    for deep in depths:
        step([book], [1], [deep])
    kept = book.depths[:length]
    book.write(drafted)
    book.trim(length)
    book.check()
    assert kept == book.depths
    assert list(range(min(length, len(depths) + drafted))) == book.text.ids


@LAW
@given(st.lists(depth, min_size=1, max_size=8))
def test_one_full_step_leaves_nobody_waiting(depths: list[int]) -> None:
    """A token that runs every layer takes all the others of its text along."""
    book = Book(0)
    for deep in depths:
        step([book], [1], [deep])
    step([book], [1], [LAYERS])
    assert (book.text.waiting, book.text.num_waiting) == ({}, 0)


@LAW
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_a_queue_holds_rows_oldest_first(sizes: list[int]) -> None:
    """Rows that join a queue come after those already there."""
    text = Text([], None)
    rows = torch.arange(sum(sizes), dtype=torch.float32)[:, None]
    for part in rows.split(sizes):
        text.wait(3, part)
    assert {3: rows.tolist()} == {layer: queue.tolist() for layer, queue in text.waiting.items()}
    assert len(rows) == text.num_waiting


@LAW
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_drained_rows_come_before_those_that_drain_them(old: int, new: int, other: int) -> None:
    """A text's older tokens come first, and texts whose tokens wait elsewhere are left alone."""
    books = [Book(0), Book(1), Book(2)]
    step(books[:1], [old], [2])
    step(books[1:2], [old], [2 + other])
    queue = dict(books[1].text.waiting)
    spans = [book.write(new) for book in books]
    flow = flow_of(books, spans).drain(2)
    check_rows(flow, books)
    assert [0, 0 if other == 0 else old, 0] == [span.start for span in flow.spans]
    assert [old + new, old + new, new] == [span.stop for span in flow.spans]
    assert not books[0].text.waiting
    assert (queue if other else {}) == books[1].text.waiting


def test_nothing_is_copied_where_nobody_waits() -> None:
    """Draining an empty queue and choosing every text give the flow itself."""
    books = [Book(0), Book(1)]
    step(books[:1], [2], [3])
    flow = flow_of(books, [book.write(2) for book in books])
    assert flow is flow.drain(2)
    assert flow is flow.select(range(2))
    assert flow is not flow.drain(3)


spans_of_texts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5)


def some_flow(places: Sequence[tuple[int, int]]) -> tuple[list[Book], Flow]:
    """The flow of one span per text, each with its start and its number of rows."""
    books = [Book(i, Text(list(range(9)), None)) for i in range(len(places))]
    spans = [
        Span(book.text, start, start + size)
        for book, (start, size) in zip(books, places, strict=True)
    ]
    return books, flow_of(books, spans)


@LAW
@given(spans_of_texts, st.data())
def test_chosen_texts_keep_their_rows(places: list[tuple[int, int]], data: st.DataObject) -> None:
    """Any texts go on with their own rows, spans and indices; two choices make one."""
    books, flow = some_flow(places)
    first = sorted(data.draw(st.sets(st.sampled_from(range(len(places))))))
    chosen = flow.select(first)
    assert tuple(first) == chosen.members
    assert tuple(flow.spans[i] for i in first) == chosen.spans
    assert sum(places[i][1] for i in first) == len(chosen.hidden)
    if first:
        check_rows(chosen, books)
        second = sorted(data.draw(st.sets(st.sampled_from(range(len(first))))))
        expected = flow.select([first[i] for i in second])
        assert expected.hidden.tolist() == chosen.select(second).hidden.tolist()
        assert expected.members == chosen.select(second).members


@LAW
@given(spans_of_texts, st.data())
def test_tails_are_the_last_rows_of_each_text(
    places: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each text gives as many of its last rows as asked for, none or all of them included."""
    _, flow = some_flow(places)
    wanted = [data.draw(st.integers(0, size)) for _, size in places]
    expected = [
        [number, position]
        for number, ((start, size), count) in enumerate(zip(places, wanted, strict=True))
        for position in range(start + size - count, start + size)
    ]
    assert expected == flow.tails(wanted).tolist()


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_span_is_a_slice_of_its_text(start: int, size: int) -> None:
    """A span knows its length and its tokens."""
    text = Text(list(range(100, 120)), None)
    span = Span(text, start, start + size)
    assert (size, list(range(100 + start, 100 + start + size))) == (len(span), span.ids)


@pytest.mark.parametrize("length", [0, 3, 5, 9])
def test_a_text_that_ran_no_token_can_be_trimmed(length: int) -> None:
    """Trimming beyond the end, or before anything ran, forgets tokens and nothing else."""
    text = Text(list(range(5)), None)
    text.trim(length)
    assert (min(length, 5), 0, 0) == (len(text.ids), text.done, text.num_waiting)
