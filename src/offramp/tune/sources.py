"""Reads files and hub ids record by record, and says where each is from and what is wrong with it.

Formats are told by content. A ``.json`` or ``.jsonl`` file is one list or an object per line, a
``.txt`` file is documents separated by blank lines; each may end in ``.gz`` too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from offramp.errors import OfframpError

MAX_LINE = 2**24
"""Bytes of the longest line, and characters of the longest document, that is read."""
MAX_LIST = 2**29
"""Bytes of the largest JSON list: it is parsed as a whole, where lines are read one by one."""

_SUFFIXES = (".json", ".jsonl", ".txt")


class RecordError(Exception):
    """What is wrong with one record."""


Record = tuple[str, Any]
"""Where it is, and what was read there: a JSON value, or the ``RecordError`` that it is."""


def records(source: str, files: dict[str, str]) -> Iterator[Record]:
    """Yield what a file or a hub id holds, and put its fingerprint into ``files``.

    A file's is there with its first record; that of a hub id covers the records asked for.

    Raises:
        OfframpError: it cannot be found or read.
    """
    path = Path(source)
    if path.is_file():
        try:
            with path.open("rb") as stream:
                files[_free(path.name, files)] = hashlib.file_digest(stream, "sha256").hexdigest()
            yield from _from_file(path)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or "it is no gzip file, or cut off"
            raise OfframpError(f"cannot read {path}: {reason}") from error
    elif path.is_dir():
        raise OfframpError(f"{path} is a folder: name the files in it")
    elif path.exists():
        raise OfframpError(f"{path} is neither a file nor a data set on the hub")
    elif _kind(path) in _SUFFIXES or path.is_absolute() or source.count("/") > 1:
        raise OfframpError(f"there is no file {path}")
    else:
        yield from _from_hub(source, files)


def _free(name: str, files: dict[str, str]) -> str:
    names = [name, *(f"{name} ({number})" for number in range(2, len(files) + 2))]
    return next(free for free in names if free not in files)


def _kind(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def _from_file(path: Path) -> Iterator[Record]:
    kind = _kind(path)
    if kind not in _SUFFIXES:
        raise OfframpError(f"{path}: {', '.join(_SUFFIXES)} are read, each also with .gz")
    with _opened(path) as stream:
        if kind == ".txt":
            yield from _documents(stream, path)
        elif _is_list(stream):
            yield from _from_list(stream, path)
        else:
            yield from _from_lines(stream, path)


def _opened(path: Path) -> BinaryIO:
    packed: Any = gzip.GzipFile
    return packed(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _is_list(stream: BinaryIO) -> bool:
    start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return start.startswith(b"[")


def _from_list(stream: BinaryIO, path: Path) -> Iterator[Record]:
    content = stream.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise OfframpError(f"{path} is too large for one JSON list: write one object per line")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise OfframpError(f"{path}, line {line}: not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise OfframpError(f"{path}, line {error.lineno}: not valid JSON") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise OfframpError(f"{path}: not valid JSON") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _from_lines(stream: BinaryIO, path: Path) -> Iterator[Record]:
    for where, line in _lines(stream, path):
        if isinstance(line, RecordError):
            yield where, line
        elif line:
            yield where, _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return RecordError("not valid JSON")


def _documents(stream: BinaryIO, path: Path) -> Iterator[Record]:
    """Yield what stands between blank lines, named by its first line."""
    lines: list[str] = []
    start, bad, size = "", None, 0
    for where, line in _lines(stream, path):
        if line:
            start = start if lines or bad else where
            size += len(line) if isinstance(line, str) else 0
            if size > MAX_LINE:
                raise OfframpError(f"{start}: a document of more than {MAX_LINE} characters")
            if isinstance(line, RecordError):
                bad = bad or line
            else:
                lines.append(line)
        elif lines or bad:
            yield start, bad or {"text": "\n".join(lines)}
            lines, bad, size = [], None, 0
    if lines or bad:
        yield start, bad or {"text": "\n".join(lines)}


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, str | RecordError]]:
    """Yield lines without the white space around them; blank ones are empty."""
    number = 0
    while raw := stream.readline(MAX_LINE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(raw) > MAX_LINE:
            raise OfframpError(f"{where}: a line of more than {MAX_LINE} bytes")
        try:
            yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield where, RecordError("not valid UTF-8")


def _from_hub(name: str, files: dict[str, str]) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise OfframpError(
            f"{name!r} is no file here, and reading it from the hub needs `datasets`: "
            "pip install 'offramp[tune]'"
        ) from error
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # a hub, a network and a stranger's files may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OfframpError(
            f"{name!r} is no file here, nor a data set with a train split that the hub gives: "
            f"{reason}"
        ) from error
    digest = hashlib.sha256()
    key = _free(name, files)
    for number, row in enumerate(rows, 1):
        digest.update(json.dumps(row, default=str).encode() + b"\n")
        files[key] = digest.hexdigest()
        yield f"{name}, row {number}", row
