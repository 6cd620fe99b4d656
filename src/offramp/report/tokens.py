"""Tokens in words: what a strip shows of each, and says of it when pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from offramp.report.runs import Answer, Traced, TraceRun
from offramp.report.svg import step_of
from offramp.shown import visible


@dataclass(frozen=True)
class Token:
    """One token of a strip."""

    text: str
    kind: str
    """Classes of style: its depth's colour, and what else is to be seen."""
    depth: int | None
    says: str
    """What pointing at it tells, a line each."""
    breaks: bool
    """Whether the text has a new line after it."""


@dataclass(frozen=True)
class Seen:
    """A trace of one text, joined to it."""

    run: TraceRun
    text: Traced

    @property
    def same(self) -> list[bool]:
        """Return whether each token is what the full model would have said."""
        pairs = zip(self.text.token_ids, self.text.chosen, strict=True)
        return [token == chosen[-1] for token, chosen in pairs]

    def word(self, token: int) -> str:
        """Return what a token id says."""
        return self.run.vocabulary.get(token, f"token {token}")


def told(answer: Answer, num_layers: int, plan: dict[str, Any], seen: Seen | None) -> list[Token]:
    """Return the tokens of an answer, with what its trace knows."""
    run = plan.get("run", {})
    drafted = run.get("kind") == "speculate"
    tokens = []
    for t, (piece, depth) in enumerate(zip(answer.pieces, answer.depths, strict=True)):
        lines = [_ran(depth, num_layers)]
        marks = []
        if drafted:
            marks += ["draft"] * answer.accepted[t]
            lines.append(
                f"Drafted by {len(run.get('draft', ()))} layers, then confirmed by all."
                if answer.accepted[t]
                else "No draft had it: all layers chose it."
            )
        if seen is not None:
            lines += _seen(seen, t, depth, run)
            marks += ["differs"] * (not seen.same[t])
        tokens.append(_token(piece, depth, num_layers, lines, marks, (t, len(answer.pieces))))
    return tokens


def traced(seen: Seen) -> list[Token]:
    """Return the tokens of a traced text: at the plan's depths, else at the first that agrees."""
    text, layers = seen.text, seen.run.num_layers
    depths = text.depths or agreeing(seen)
    replayed = text.depths is not None
    tokens = []
    for t, (piece, depth) in enumerate(zip(text.pieces, depths, strict=True)):
        first = _ran(depth, layers) if replayed else _could(depth, layers)
        lines = [first, *_seen(seen, t, depth, seen.run.plan.get("run", {}))]
        tokens.append(_token(piece, depth, layers, lines, [], (t, len(depths))))
    return tokens


def agreeing(seen: Seen) -> list[int]:
    """Return the first depth from which on every exit says what the last layer says."""
    stops = [*seen.run.exits, seen.run.num_layers]
    found = []
    for chosen in seen.text.chosen:
        column = len(stops) - 1
        while column and chosen[column - 1] == chosen[-1]:
            column -= 1
        found.append(stops[column])
    return found


def plain(answer: Answer, other: Answer, num_layers: int) -> list[Token]:
    """Return the tokens of the full model's answer, those not in ``other`` marked."""
    kept: set[int] = set()
    matcher = SequenceMatcher(None, answer.token_ids, other.token_ids, autojunk=False)
    for block in matcher.get_matching_blocks():
        kept.update(range(block.a, block.a + block.size))
    tokens = []
    for t, (piece, depth) in enumerate(zip(answer.pieces, answer.depths, strict=True)):
        marks = [] if t in kept else ["other"]
        lines = ["The full model's answer." if t in kept else "Only in the full model's answer."]
        tokens.append(_token(piece, depth, num_layers, lines, marks, (t, len(answer.pieces))))
    return tokens


def _token(
    piece: str,
    depth: int,
    num_layers: int,
    lines: Sequence[str],
    marks: Sequence[str],
    place: tuple[int, int],
) -> Token:
    step = step_of(depth, num_layers)
    kinds = ["t", "full" if step is None else f"d{step}", *marks]
    head = f"{quoted(piece)}, token {place[0] + 1} of {place[1]}"
    text = signs(piece) or "·"
    return Token(text, " ".join(kinds), depth, "\n".join([head, *lines]), "\n" in piece)


def quoted(piece: str) -> str:
    """Return a piece in quotes, so that spaces are seen; on one line."""
    return f"“{signs(piece)}”"


def signs(piece: str) -> str:
    """Return a piece with signs for what cannot be seen: control characters, lines, tabs."""
    return visible(piece).replace("\n", "⏎").replace("\t", "⇥")


def _ran(depth: int, num_layers: int) -> str:
    if depth >= num_layers:
        return f"Ran all {num_layers} layers."
    return f"Left early: chosen after {depth} of {num_layers} layers."


def _could(depth: int, num_layers: int) -> str:
    if depth >= num_layers:
        return f"Only the last of {num_layers} layers says this."
    return f"Could leave at {depth} of {num_layers}: every later exit says the same."


def _seen(seen: Seen, t: int, depth: int, run: dict[str, Any]) -> list[str]:
    """Return confidence at the exit, and what the full model would have said."""
    text, lines = seen.text, []
    if depth in seen.run.exits:
        column = seen.run.exits.index(depth)
        asked = run.get("thresholds", {}).get(str(depth))
        for name, values in text.scores.items():
            need = (
                f"; the plan asks for {asked:g}"
                if asked is not None and name == run.get("signal")
                else ""
            )
            lines.append(f"{_NAMES.get(name, name)} {values[t][column]:.2f} there{need}.")
    full = text.chosen[t][-1]
    lines.append(
        "The full model would have said the same."
        if full == text.token_ids[t]
        else f"The full model would have said {quoted(seen.word(full))}."
    )
    return lines


_NAMES = {"max_prob": "Confidence"}
