"""The folder of a run: whose it is, and that one run at a time writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from offramp.card import read_card
from offramp.errors import OfframpError, UsageError
from offramp.tune.answers import ANSWERS
from offramp.tune.log import LOG
from offramp.tune.state import find_state

BEFORE = "before.json"
"""Figures of the untouched model, kept for a run that goes on."""
_LOCK = ".lock"


@contextmanager
def held(folder: Path, *, main: bool) -> Iterator[None]:
    """Hold a folder for a run; what is empty in the end is not left behind.

    The lock is the system's, so that of a killed run is free again.

    Args:
        folder: new, empty, or of a run that is not finished.
        main: whether this process writes; the others only look.

    Raises:
        UsageError: something else is there.
        OfframpError: it holds a tuned model, another run writes to it, or it cannot be written.
    """
    if read_card(folder) is not None:
        raise OfframpError(f"{folder} holds a tuned model already; name another --out")
    if not main:
        yield
        return
    _must_be_ours(folder)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system that knows no locks
            lock.acquire()
    except Timeout as error:
        raise OfframpError(f"another run is writing to {folder}; name another --out") from error
    except OSError as error:
        raise OfframpError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def _must_be_ours(folder: Path) -> None:
    """Refuse a model's folder, say: its weights would be written over."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--out {folder} is no folder that can be read") from error
    if names and not names & {_LOCK, ANSWERS, LOG, BEFORE} and find_state(folder) is None:
        raise UsageError(f"--out {folder} holds something else already; name a new folder")
