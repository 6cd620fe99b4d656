"""The layer-by-token grid: what every exit would have said, and where tokens left."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from offramp.report.svg import INK, PAPER, SOFT, STEPS, document, rule, tag, words
from offramp.report.tokens import signs

CELL, ROW, LEFT, TOP = 16, 10, 44, 8
"""Pixels: a token's width, an exit's height, where the cells begin; the script knows them, too."""
_LABEL = 96


def draw_grid(
    pieces: Sequence[str],
    exits: Sequence[int],
    num_layers: int,
    confidence: Sequence[Sequence[float]],
    chosen: Sequence[Sequence[int]],
    depths: Sequence[int] | None,
) -> Markup:
    """Draw exits bottom-up by tokens: colour is confidence, a dot disagrees with the last layer.

    Args:
        pieces: what each token says, ``[T]``.
        exits: depths looked at, ``[E]``.
        num_layers: of the model.
        confidence: of each token at each exit, ``[T][E]``, 0 to 1.
        chosen: token id at each exit and at the last layer, ``[T][E + 1]``.
        depths: layers that chose each token, where that is known; draws the stair.
    """
    rows = len(exits) + 1
    wide, high = len(pieces) * CELL, rows * ROW
    parts = [
        *_cells(confidence, rows),
        tag(
            "path", d=_wrong(chosen, rows), class_="wrong", fill=PAPER, stroke=INK, stroke_width=0.6
        ),
    ]
    if depths is not None:
        tops = [_top(depth, exits) if depth < num_layers else 0 for depth in depths]
        parts += [_unrun(tops), *_stair(tops)]
    parts += [_depth_label(i, depth, rows) for i, depth in enumerate([*exits, num_layers])
              if i in _labelled(rows)]  # fmt: skip
    parts += [_piece(t, piece, high) for t, piece in enumerate(pieces)]
    parts.append(_key(TOP + high + _LABEL - 12))
    label = f"grid of {rows} depths by {len(pieces)} tokens"
    return document(max(LEFT + wide + 40, 330), TOP + high + _LABEL, parts, label)


def _cells(confidence: Sequence[Sequence[float]], rows: int) -> list[Markup]:
    """Return a path per colour; neighbours of one colour in one rectangle."""
    paths: list[list[str]] = [[] for _ in STEPS]
    for row in range(rows - 1):
        start, last = 0, -1
        steps = [min(int(token[row] * len(STEPS)), len(STEPS) - 1) for token in confidence]
        for t, step in enumerate([*steps, -1]):
            if step != last and t:
                paths[last].append(_box(start, rows - 1 - row, t - start))
                start = t
            last = step
    top = _box(0, 0, len(confidence))
    final = tag("path", d=top, class_="last", fill=PAPER, stroke=SOFT, stroke_width=0.5)
    cells = [
        tag("path", d="".join(path), fill=colour)
        for path, colour in zip(paths, STEPS, strict=True)
        if path
    ]
    return [*cells, final]


def _box(column: int, row: int, columns: int) -> str:
    wide = columns * CELL
    return f"M{LEFT + column * CELL} {TOP + row * ROW}h{wide}v{ROW}h-{wide}z"


def _wrong(chosen: Sequence[Sequence[int]], rows: int) -> str:
    """Return a small square in each cell that says something else than the last layer."""
    return "".join(
        f"M{LEFT + t * CELL + 6} {TOP + (rows - 1 - row) * ROW + 3}h4v4h-4z"
        for t, said in enumerate(chosen)
        for row in range(rows - 1)
        if said[row] != said[-1]
    )


def _top(depth: int, exits: Sequence[int]) -> int:
    """Return the first row from above that ran."""
    return len(exits) + 1 - sum(stop <= depth for stop in exits)


def _unrun(tops: Sequence[int]) -> Markup:
    """Veil the cells above the stair: their layers were not run to choose the token."""
    boxes = "".join(
        f"M{LEFT + t * CELL} {TOP}h{CELL}v{top * ROW}h-{CELL}z" for t, top in enumerate(tops) if top
    )
    return tag("path", d=boxes, class_="unrun", fill=PAPER, fill_opacity=0.72)


def _stair(tops: Sequence[int]) -> list[Markup]:
    line = "".join(
        f"{'L' if t else 'M'}{LEFT + t * CELL} {TOP + top * ROW}h{CELL}"
        for t, top in enumerate(tops)
    )
    return [
        tag("path", d=line, fill="none", class_="s-paper", stroke=PAPER, stroke_width=5),
        tag("path", d=line, fill="none", class_="s-ink stair", stroke=INK, stroke_width=2.2),
    ]


def _key(y: float) -> Markup:
    """Explain the colours."""
    boxes = [
        tag("rect", x=LEFT + 70 + i * 24, y=y - 10, width=24, height=10, fill=colour)
        for i, colour in enumerate(STEPS)
    ]
    ends = words(LEFT, y, "sure: 0%", kind="soft", font_size=11)
    return tag("g", ends, *boxes, words(LEFT + 220, y, "100%", kind="soft", font_size=11))


def _labelled(rows: int) -> set[int]:
    every = max(1, -(-rows // 6))
    return {rows - 1, *range(0, rows - every // 2 - 1, every)}


def _depth_label(index: int, depth: int, rows: int) -> Markup:
    y = TOP + (rows - 1 - index) * ROW + ROW / 2
    mark = rule(LEFT - 5, y, LEFT - 1, y, kind="soft")
    return tag(
        "g", words(LEFT - 8, y + 4, depth, kind="soft", text_anchor="end", font_size=11), mark
    )


def _piece(column: int, piece: str, high: float) -> Markup:
    said = signs(piece).strip() or "·"
    x, y = LEFT + column * CELL + CELL / 2 + 3, TOP + high + 10
    turned = f"rotate(-60 {x:g} {y:g})"
    return words(x, y, said[:12], text_anchor="end", font_size=10, transform=turned)
