"""Writes files that are whole or not there: beside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.errors import OfframpError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in place.

    Interrupted at any moment (Ctrl-C, a full disk), ``path`` is what it was before. A link is
    followed, and a device is written to as it is.

    Raises:
        OfframpError: it cannot be written.
    """
    try:
        place = path.resolve()
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if place.exists() and not place.is_file():
            write(place)
            return
        beside = place.with_name(f".{os.getpid()}.part")
        try:
            write(beside)
            beside.replace(place)
        finally:
            with suppress(OSError):  # there may be no such place at all
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``path``, then put it in place.

    Interrupted at any moment, ``path`` is what it was before: not there, or empty.

    Raises:
        UsageError: something is there already.
        OfframpError: it cannot be written.
    """
    must_be_free(path)
    beside = path.resolve().with_name(f".{os.getpid()}.part")
    try:
        beside.mkdir()
        try:
            write(beside)
            for file in beside.rglob("*"):
                _sync(file)
            beside.replace(path.resolve())
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error


def must_be_free(folder: Path) -> None:
    """Refuse a place for a new folder where something is.

    Raises:
        UsageError: it is a file, or a folder that is not empty.
        OfframpError: it cannot be looked into.
    """
    try:
        taken = next(folder.iterdir(), None) is not None
    except FileNotFoundError:
        return
    except NotADirectoryError:
        taken = True
    except OSError as error:
        raise OfframpError(f"cannot write {folder}: {error.strerror}") from error
    if taken:
        raise UsageError(f"{folder} is there already and not empty; name a new folder")


def _sync(path: Path) -> None:
    """Wait until a file's data is on the disk: a rename before that could leave an empty one."""
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all.

    Raises:
        OfframpError: it cannot be written.
    """
    write_whole(path, lambda beside: _flushed(beside, text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OfframpError: it cannot be written.
    """
    write_whole(path, lambda beside: _saved(beside, tensors, metadata))


def digest_of(said: str, tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of what a file says of itself and of its numbers, in their order.

    Kept in the file, it tells accidents and careless edits; who means to deceive can compute it
    anew. Shapes are not in it: they follow from what the file says.
    """
    found = hashlib.sha256(said.encode())
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
        _sync(path)
    except SafetensorError as error:  # safetensors has its own words for a full disk
        raise OSError(str(error)) from error


def _flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # a rename before the data is on disk could leave an empty file


def cache_dir() -> Path:
    """Return where what is made once is kept: OFFRAMP_CACHE, or offramp in the user's cache."""
    own = os.environ.get("OFFRAMP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own) if own else Path(base).expanduser() / "offramp"
