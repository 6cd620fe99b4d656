"""Decoding with a path per text: the prompt's first layers say which, and are not run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.decode import Way, advance
from offramp.request import Pool, Request, Token, Writer
from offramp.router import RouterWeights, look


def route(
    backbone: Backbone,
    requests: Iterable[Request],
    router: RouterWeights,
    ways: Sequence[Way],
    *,
    price: float,
    batch_size: int = 8,
) -> Iterator[Token]:
    """Yield the new tokens of all requests, each text run in the way its prompt asks for.

    The first layers, which all ways share, run once over each prompt and say which way to take.
    The prompt waits there, and goes on with its last token along its own path. In each round the
    texts of one way share a step.

    Args:
        backbone: what runs the layers.
        requests: what to continue; read only when there is room for it.
        router: fitted on this model, for these ways.
        ways: what it chooses among, each beginning with the layers the router looks through.
        price: score that a layer per token has to be worth.
        batch_size: texts at once, of all ways together.
    """
    for way in ways:
        way.check(backbone.shape.num_layers)
    taken: dict[int, int] = {}
    for writers in Pool(backbone, requests, batch_size).rounds():
        fresh = [writer for writer in writers if writer.reading]
        if fresh:
            taken |= _routed(backbone, fresh, router, ways, price)
        for k, way in enumerate(ways):
            group = [writer for writer in writers if taken[writer.index] == k]
            if group:
                yield from advance(backbone, group, way)


def _routed(
    backbone: Backbone,
    writers: Sequence[Writer],
    router: RouterWeights,
    ways: Sequence[Way],
    price: float,
) -> dict[int, int]:
    """Look at new prompts, let them wait on their paths; return which way each request takes."""
    features = look(backbone, [writer.text for writer in writers], router.exits)
    chosen = router.choose(features, price)
    for writer, k in zip(writers, chosen, strict=True):
        path = ways[k].layers
        _put_on(backbone, writer.text, router.depth, range(backbone.shape.num_layers), path)
    return {writer.index: k for writer, k in zip(writers, chosen, strict=True)}


def _put_on(
    backbone: Backbone, text: Text, depth: int, every: Sequence[int], path: Sequence[int] | None
) -> None:
    """Let a prompt that waits at ``depth`` wait for what its path runs next.

    A step needs a new token, so the last one is taken back and runs these layers again: one row.
    """
    path = every if path is None else path
    *earlier, last = text.ids
    text.trim(len(earlier))
    backbone.trim(text.slot, len(earlier))
    text.ids.append(last)
    rows = text.waiting.pop(depth, None)
    if rows is not None and depth < len(path):
        text.waiting[path[depth]] = rows
    # No token has passed the exits behind this depth: their blocks lack none.
    text.blocks |= {stop for stop in backbone.blocks if stop > depth}
