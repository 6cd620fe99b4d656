"""Writes each picture of a page into a file of its own: SVG, or PNG by resvg."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from offramp.errors import OfframpError
from offramp.files import write_text, write_whole
from offramp.report.parts import Picture, Section


def check_drawable() -> None:
    """Refuse PNG where nothing can draw it.

    Raises:
        OfframpError: with the remedy.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise OfframpError("--png needs resvg-py: pip install 'offramp[plot]'; --svg needs nothing")


def write_pictures(sections: Sequence[Section], svg: Path | None, png: Path | None) -> list[Path]:
    """Write every picture into the folders given; return the files.

    Raises:
        OfframpError: one cannot be written.
    """
    written = []
    for folder in (folder for folder in (svg, png) if folder is not None):
        _make(folder)
    for picture in _all(sections):
        if svg is not None:
            path = svg / f"{picture.name}.svg"
            write_text(path, str(picture.svg))
            written.append(path)
        if png is not None:
            path = png / f"{picture.name}.png"
            write_whole(path, partial(_draw, svg=str(picture.svg)))
            written.append(path)
    return written


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OfframpError(f"cannot write {folder}: {error.strerror}") from error


def _all(sections: Sequence[Section]) -> Iterator[Picture]:
    for section in sections:
        yield from section.pictures
        yield from (text.grid for text in section.texts if text.grid is not None)


def _draw(path: Path, svg: str) -> None:
    import resvg_py

    path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", zoom=2)))
