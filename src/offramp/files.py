"""Writes files that are whole or not there: beside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from offramp.errors import OfframpError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in place.

    Interrupted at any moment (Ctrl-C, a full disk), ``path`` is what it was before.

    Raises:
        OfframpError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all.

    Raises:
        OfframpError: it cannot be written.
    """
    write_whole(path, lambda beside: _flushed(beside, text))


def _flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # a rename before the data is on disk could leave an empty file
