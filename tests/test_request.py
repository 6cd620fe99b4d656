"""Requests: what cannot be asked for, why a text ends, and a pool that frees whatever it opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.backbone import Backbone
from offramp.decode import decode
from offramp.errors import UsageError
from offramp.meter import Meter
from offramp.request import Pool, Request, Token, Writer, check_request
from offramp.watch import Ran

CONTEXT = 12
LAW = settings(max_examples=100, deadline=None)


class Slots:
    """The part of a backbone that opens and closes slots, and remembers each of them."""

    def __init__(self) -> None:
        self.shape = SimpleNamespace(context=CONTEXT, num_layers=2)
        self.meter = Meter()
        self.blocks, self.apart = dict[int, int](), frozenset[int]()
        self.opened: list[object] = []
        self.closed: list[object] = []
        self.most = 0

    def open(self) -> object:
        """Return a new slot."""
        slot = object()
        self.opened.append(slot)
        self.most = max(self.most, len(self.opened) - len(self.closed))
        return slot

    def close(self, slot: object) -> None:
        """Take back a slot that is open."""
        assert slot in self.opened, "closed without having been opened"
        assert slot not in self.closed, "closed twice"
        self.closed.append(slot)

    @property
    def backbone(self) -> Backbone:
        """Return this in the role of a backbone."""
        return cast("Backbone", self)

    def check_all_closed(self) -> None:
        """Every slot that was opened was closed, once."""
        assert set(map(id, self.opened)) == set(map(id, self.closed))


class Running(Slots):
    """Slots of a backbone that runs, too, and may break down."""

    def __init__(self, steps: int = 99) -> None:
        super().__init__()
        self.steps, self.worked = steps, 0

    def embed(self, spans: Any) -> torch.Tensor:
        """Return empty states as long as it works."""
        if self.worked == self.steps:
            raise RuntimeError("out of memory")
        self.worked += 1
        return torch.zeros(sum(map(len, spans)), 1)

    def trim(self, _slot: object, _length: int, *, first_layer: int = 0) -> None:
        """Forget nothing: there are no keys."""

    def run(self, _layers: Any, hidden: torch.Tensor, _spans: Any) -> torch.Tensor:
        """Change nothing."""
        return hidden

    def run_until(self, segments: Any, hidden: torch.Tensor, spans: Any, _watch: Any) -> Ran:
        """Run the first segment."""
        return Ran(self.run(segments[0], hidden, spans))

    def readout(self, hidden: torch.Tensor, _depth: int) -> torch.Tensor:
        """Return the same logits for every row."""
        return torch.zeros(len(hidden), 3)


def read(requests: Iterable[Request], seen: list[Request]) -> Iterator[Request]:
    """Hand on requests, and note which have been read."""
    for request in requests:
        seen.append(request)
        yield request


# -- what can be asked for


@pytest.mark.parametrize(
    ("prompt", "new", "complaint"),
    [
        (0, 1, "the prompt is empty"),
        (1, 0, "max-new-tokens must be a whole number, 1 or more, not 0"),
        (1, -1, "max-new-tokens must be a whole number, 1 or more, not -1"),
        (CONTEXT, 1, f"the prompt has {CONTEXT} tokens, .* at most {CONTEXT} .*shorten"),
        (CONTEXT + 1, 1, f"the prompt has {CONTEXT + 1} tokens, .* at most {CONTEXT} .*shorten"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt: int, new: int, complaint: str) -> None:
    """No prompt, no room for an answer, or no answer wanted: refused before a slot is opened."""
    slots = Slots()
    with pytest.raises(UsageError, match=complaint):
        check_request(Request([1] * prompt, new), CONTEXT)
    with pytest.raises(UsageError, match=complaint):
        Writer(0, Request([1] * prompt, new), slots.backbone)
    assert not slots.opened


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (CONTEXT - 1, 1), (1, 10 * CONTEXT)])
def test_what_can_be_generated_is_accepted(prompt: int, new: int) -> None:
    """One token of room is enough, and more tokens than fit may be asked for."""
    check_request(Request([1] * prompt, new), CONTEXT)


# -- why a text ends


def written(request: Request, tokens: Iterable[int]) -> list[Token]:
    """What is emitted when the model chooses these tokens, until it ends."""
    writer, emitted = Writer(3, request, Slots().backbone), list[Token]()
    for token in tokens:
        emitted.append(writer.emit(token, 2, accepted=bool(token % 2)))
        assert (emitted[-1].finish is not None) == writer.finished
        if writer.finished:
            break
    assert writer.finished
    return emitted


@LAW
@given(
    st.integers(1, CONTEXT - 1),
    st.integers(1, CONTEXT),
    st.none() | st.integers(0, CONTEXT),
    st.none() | st.integers(1, CONTEXT),
)
def test_a_text_ends_at_the_first_reason(
    prompt: int, most: int, end: int | None, stop: int | None
) -> None:
    """An end token, a stop string, the wanted length and the context: whichever comes first."""
    calls: list[list[int]] = []

    def stops(new: list[int]) -> bool:
        calls.append(list(new))
        return stop is not None and len(new) >= stop

    eos = frozenset() if end is None else frozenset({100 + end, 7})
    request = Request([7] * prompt, most, eos=eos, stops=stops)
    room = min(most, CONTEXT - prompt)
    ends = [at for at in (None if end is None else end + 1, stop) if at is not None and at <= room]
    count = min([room, *ends])
    ids = [100 + i for i in range(count)]
    finish = [None] * (count - 1) + ["stop" if ends else "length"]
    emitted = written(request, [100 + i for i in range(2 * CONTEXT)])
    assert ids == [token.id for token in emitted]
    assert finish == [token.finish for token in emitted]
    assert all(call == ids[: len(call)] for call in calls)
    assert {3} == {token.index for token in emitted}
    assert [(2, bool(i % 2)) for i in ids] == [(token.depth, token.accepted) for token in emitted]


def test_a_prompt_is_read_once() -> None:
    """A writer reads its prompt in the first step, copies it, and knows how much room there is."""
    request = Request([1, 2, 3], 99)
    writer = Writer(0, request, Slots().backbone)
    assert (writer.reading, writer.room, writer.finished) == (True, CONTEXT - 3, False)
    writer.text.done = 3
    writer.text.ids.append(9)
    assert (writer.reading, request.ids) == (False, [1, 2, 3])


# -- the pool

lengths = st.lists(st.integers(1, 4), max_size=8)
sizes = st.integers(1, 4)


@LAW
@given(lengths, sizes)
def test_a_pool_is_full_as_long_as_there_are_requests(wanted: list[int], size: int) -> None:
    """It never exceeds its size, refills at once, keeps the order, and closes each slot once."""
    slots, left, seen, reached = Slots(), list(wanted), list[Request](), 0
    pool = Pool(slots.backbone, read([Request([1], new) for new in wanted], seen), size)
    for writers in pool.rounds():
        unfinished = [i for i, count in enumerate(left) if count]
        assert unfinished[:size] == [writer.index for writer in writers]
        assert len(slots.opened) - len(slots.closed) == len(writers)
        reached = max(reached, unfinished[:size][-1] + 1)
        assert reached == len(seen), "read before there was room"
        for writer in writers:
            left[writer.index] -= 1
            assert (left[writer.index] == 0) == (writer.emit(5, 2).finish == "length")
    assert [0] * len(wanted) == left
    assert len(wanted) == len(slots.opened)
    assert slots.most <= size
    slots.check_all_closed()


Stop = Callable[[Iterator[list[Writer]]], None]


def close(rounds: Iterator[list[Writer]]) -> None:
    """Stop asking."""
    cast("Any", rounds).close()


def throw(rounds: Iterator[list[Writer]]) -> None:
    """Break down inside the loop over the rounds."""
    with pytest.raises(RuntimeError, match="out of memory"):
        cast("Any", rounds).throw(RuntimeError("out of memory"))


@pytest.mark.parametrize("stop", [close, throw])
@LAW
@given(lengths, sizes, st.integers(1, 5), st.booleans())
def test_a_pool_frees_its_slots_when_the_consumer_stops(
    stop: Stop, wanted: list[int], size: int, after: int, before_emitting: bool
) -> None:
    """After any round, with texts just finished or not, every open slot is closed, once."""
    slots = Slots()
    rounds = Pool(slots.backbone, [Request([1], new) for new in wanted], size).rounds()
    for count, writers in enumerate(rounds, 1):
        if count == after and before_emitting:
            break
        for writer in writers:
            writer.emit(5, 2)
        if count == after:
            break
    stop(rounds)
    slots.check_all_closed()


@LAW
@given(lengths, sizes, st.integers(1, 5))
def test_decoding_frees_its_slots_when_the_consumer_stops(
    wanted: list[int], size: int, after: int
) -> None:
    """Whoever breaks out of the loop over tokens, in mid-round too, leaves nothing behind."""
    running = Running()
    requests = [Request([1], new) for new in wanted]
    for count, _ in enumerate(decode(running.backbone, requests, batch_size=size), 1):
        if count == after:
            break
    running.check_all_closed()


@LAW
@given(lengths.filter(len), sizes, st.data())
def test_decoding_frees_its_slots_when_the_model_breaks_down(
    wanted: list[int], size: int, data: st.DataObject
) -> None:
    """A step that fails closes every slot, and its error goes on to the caller."""
    requests, whole = [Request([1], new) for new in wanted], Running()
    assert sum(wanted) == len(list(decode(whole.backbone, requests, batch_size=size)))
    whole.check_all_closed()
    running = Running(data.draw(st.integers(0, whole.worked - 1)))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(decode(running.backbone, requests, batch_size=size))
    running.check_all_closed()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_refused_request_frees_every_slot(good: int, size: int) -> None:
    """A request that cannot be generated, among others, stops the pool and leaves nothing open."""
    slots = Slots()
    requests = [*[Request([1], 2)] * good, Request([], 2)]
    with pytest.raises(UsageError, match="empty"):
        finish_all(Pool(slots.backbone, requests, size))
    slots.check_all_closed()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_requests_that_fail_to_come_free_every_slot(good: int, size: int) -> None:
    """Requests may be read from anywhere; when that fails, nothing stays open."""

    def requests() -> Iterator[Request]:
        yield from [Request([1], 2)] * good
        raise ConnectionError("lost")

    slots = Slots()
    with pytest.raises(ConnectionError, match="lost"):
        finish_all(Pool(slots.backbone, requests(), size))
    slots.check_all_closed()


def finish_all(pool: Pool) -> None:
    """Write every text of a pool to its end."""
    for writers in pool.rounds():
        for writer in writers:
            writer.emit(5, 2)


def test_half_a_token_is_refused() -> None:
    """It would never be counted down to nothing."""
    with pytest.raises(UsageError, match=r"not 1\.5"):
        check_request(Request([1], cast("int", 1.5)), CONTEXT)
