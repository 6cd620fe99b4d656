"""Rows kept as they come: a line of facts, then one JSON line each; what a kill cut off is dropped.

A run that is started again with the same facts goes on behind what is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.errors import OfframpError
from offramp.files import write_text


def open_journal(path: Path, facts: Mapping[str, Any], what: str) -> list[Any]:
    """Return the rows that are there already, and make the file where there is none.

    Args:
        path: the file.
        facts: all that the rows depend on.
        what: what the rows are, in messages.

    Raises:
        OfframpError: it is of other facts, or no such file, or cannot be read or written.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise OfframpError(f"cannot read {path}: {error}") from error
    whole = [line for line in lines if line.endswith("\n")]
    rows = _parsed(path, whole, what)
    if not rows:
        whole = [json.dumps(facts) + "\n"]
    else:
        _must_be(path, rows[0], json.loads(json.dumps(facts)), what)
    if whole != lines:
        write_text(path, "".join(whole))
    return rows[1:]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row.

    Raises:
        OfframpError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error


def _parsed(path: Path, lines: list[str], what: str) -> list[Any]:
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise OfframpError(f"{path} holds no {what}: {error}") from error


def _must_be(path: Path, found: Any, facts: Mapping[str, Any], what: str) -> None:
    if not isinstance(found, dict):
        raise OfframpError(f"{path} holds no {what}")
    changed = sorted(key for key in {*found, *facts} if found.get(key) != facts.get(key))
    if changed:
        raise OfframpError(
            f"{path} holds {what} with another {', '.join(changed)}; name another --out, or "
            "remove it"
        )
