"""What is asked for and what comes back, in token ids; and the pool of texts being written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import UsageError
from offramp.sample import Choose, Sampling

GREEDY = Sampling().chooser()

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    ids: list[int]
    max_new_tokens: int
    choose: Choose = GREEDY
    eos: frozenset[int] = frozenset()
    """Tokens that end the text; the one that did is its last token."""
    stops: Callable[[list[int]], bool] | None = None
    """Whether the new tokens so far complete a stop string."""


@dataclass(frozen=True)
class Token:
    """One new token of one text."""

    index: int
    """Which request it belongs to, in the order given."""
    id: int
    depth: int
    """Layers that chose it."""
    accepted: bool = False
    """Whether a draft had proposed it."""
    finish: Finish | None = None
    """Why the text ends here, if it does."""


def check_request(request: Request, context: int) -> None:
    """Refuse what cannot be generated.

    Raises:
        UsageError: an empty prompt, one that fills the context, or no token asked for.
    """
    if not request.ids:
        raise UsageError("the prompt is empty")
    # A fraction would never be counted down to 0, and the text never end.
    if request.max_new_tokens < 1 or request.max_new_tokens % 1:
        raise UsageError(
            f"max-new-tokens must be a whole number, 1 or more, not {request.max_new_tokens}"
        )
    if len(request.ids) >= context:
        raise UsageError(
            f"the prompt has {len(request.ids)} tokens, and the model reads at most {context} "
            "including its answer; shorten it"
        )


class Writer:
    """One text being written: the request, its tokens so far, whether it has ended."""

    def __init__(self, index: int, request: Request, backbone: Backbone) -> None:
        check_request(request, backbone.shape.context)
        self.index = index
        self.request = request
        self.text = Text(list(request.ids), backbone.open())
        self.room = min(request.max_new_tokens, backbone.shape.context - len(request.ids))
        """Tokens it may still write."""
        self.new: list[int] = []
        self.finished = False

    @property
    def reading(self) -> bool:
        """Whether the prompt has not been answered yet."""
        return len(self.text.ids) == len(self.request.ids)

    def emit(self, token: int, depth: int, *, accepted: bool = False) -> Token:
        """Record the next token and say whether it is the last one."""
        self.new.append(token)
        self.room -= 1
        finish: Finish | None = None
        if token in self.request.eos or (self.request.stops and self.request.stops(self.new)):
            finish = "stop"
        elif self.room == 0:
            finish = "length"
        self.finished = finish is not None
        return Token(self.index, token, depth, accepted, finish)


class Pool:
    """At most ``size`` texts at once; a text that ends makes room for the next request."""

    def __init__(self, backbone: Backbone, requests: Iterable[Request], size: int) -> None:
        if size < 1:
            raise UsageError(f"batch-size must be 1 or more, not {size}")
        self.backbone = backbone
        self.size = size
        self.active: list[Writer] = []
        self._queue = enumerate(requests)

    def rounds(self) -> Iterator[list[Writer]]:
        """Yield the texts to go on with until none is left; always frees their keys and values."""
        try:
            while True:
                self._release(writer for writer in self.active if writer.finished)
                self.active = [writer for writer in self.active if not writer.finished]
                for i, request in islice(self._queue, self.size - len(self.active)):
                    self.active.append(Writer(i, request, self.backbone))
                if not self.active:
                    return
                yield self.active
        finally:
            self._release(self.active)

    def _release(self, writers: Iterable[Writer]) -> None:
        for writer in writers:
            self.backbone.close(writer.text.slot)
