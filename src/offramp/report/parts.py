"""What the page shows, as plain data: sections with figures, strips and pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from offramp.report.tokens import Token


@dataclass(frozen=True)
class Figure:
    """A headline figure."""

    name: str
    value: str
    about: str
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of words, the first of each its name; those in ``bad`` are slow-downs or harm."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bad: Collection[tuple[int, int]] = ()
    """(row, column) of what is told apart."""


@dataclass(frozen=True)
class Picture:
    """A chart, with the words around it, and perhaps a table beside it."""

    name: str
    title: str
    caption: str
    svg: Markup
    table: Table | None = None


@dataclass(frozen=True)
class Text:
    """One text: its strip, and the full model's answer and the grid where they are known."""

    prompt: str
    tokens: list[Token]
    verdict: str = ""
    full: list[Token] | None = None
    grid: Picture | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One run."""

    title: str
    about: str
    headline: str
    alerts: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """What would be seen with another run, and the command that makes it."""
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    left_out: int = 0
    legend: list[tuple[str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
