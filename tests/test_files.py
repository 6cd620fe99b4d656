"""Files: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offramp.errors import OfframpError
from offramp.files import write_text, write_whole
from offramp.trace import Trace

OLD, NEW = "the old text", "the new text, which is longer: é€😀"

Write = Callable[[Path], None]


def full_disk() -> OSError:
    """What a write raises when there is no room."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too."""
    return {file.name: file.read_text("utf-8") for file in folder.iterdir()}


def before_it_begins(error: BaseException) -> Write:
    """Fail before there is a file."""

    def write(_path: Path) -> None:
        raise error

    return write


def half_way(error: BaseException) -> Write:
    """Fail with half of the file on the disk."""

    def write(path: Path) -> None:
        path.write_text(NEW[: len(NEW) // 2], "utf-8")
        raise error

    return write


def at_its_end(error: BaseException) -> Write:
    """Fail with the whole file on the disk, not yet in place."""

    def write(path: Path) -> None:
        path.write_text(NEW, "utf-8")
        raise error

    return write


@pytest.mark.parametrize("old", [{}, {"plan.json": OLD}], ids=["new", "old"])
@pytest.mark.parametrize("failing", [before_it_begins, half_way, at_its_end])
@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt(), ValueError("odd")], ids=repr)
def test_a_failed_write_changes_nothing(
    tmp_path: Path,
    old: dict[str, str],
    failing: Callable[[BaseException], Write],
    error: BaseException,
) -> None:
    """A full disk, Ctrl-C or a fault leaves the old file, or none, and nothing beside it."""
    for name, text in old.items():
        (tmp_path / name).write_text(text, "utf-8")
    expected = OfframpError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_whole(tmp_path / "plan.json", failing(error))
    assert old == contents(tmp_path)


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=repr)
def test_a_text_that_does_not_reach_the_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Even when the failure shows only as the data is flushed."""
    old = {"plan.json": OLD}
    (tmp_path / "plan.json").write_text(OLD, "utf-8")

    def fail(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OfframpError if isinstance(error, OSError) else type(error)):
        write_text(tmp_path / "plan.json", NEW)
    assert old == contents(tmp_path)


def test_a_file_that_cannot_be_put_in_place_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing to rename is failing to write."""
    old = {"plan.json": OLD}
    (tmp_path / "plan.json").write_text(OLD, "utf-8")

    def fail(_self: Path, _target: Path) -> Path:
        raise full_disk()

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OfframpError, match="No space left on device"):
        write_text(tmp_path / "plan.json", NEW)
    assert old == contents(tmp_path)


@pytest.mark.parametrize("old", [{}, {"plan.json": OLD}], ids=["new", "old"])
def test_the_old_file_stands_until_the_new_one_is_whole(
    tmp_path: Path, old: dict[str, str]
) -> None:
    """A reader sees the old text while the new one is written, then the new one, and one file."""
    path = tmp_path / "plan.json"
    for name, text in old.items():
        (tmp_path / name).write_text(text, "utf-8")

    def write(beside: Path) -> None:
        assert path.parent == beside.parent, "a rename is atomic within one file system only"
        assert path != beside
        assert old == contents(tmp_path)
        beside.write_text(NEW, "utf-8")
        assert old == {name: contents(tmp_path)[name] for name in old}

    write_whole(path, write)
    assert [(path.name, NEW)] == list(contents(tmp_path).items())


def test_a_text_is_written_as_utf8(tmp_path: Path) -> None:
    """Whatever the locale, and after a longer text too."""
    path = tmp_path / "plan.json"
    for text in [NEW, OLD, ""]:
        write_text(path, text)
        assert text.encode() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/plan.json", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/plan.json", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
    ids=["no folder", "a folder", "a file as a folder", "a long name"],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    """The user reads which path it was, and why, in one sentence."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text(OLD, "utf-8")
    with pytest.raises(OfframpError) as refusal:
        write_text(tmp_path / name, NEW)
    assert f"cannot write {tmp_path / name}: {reason}" == str(refusal.value)
    assert {"folder", "file"} == {entry.name for entry in tmp_path.iterdir()}


def test_the_present_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--out .`` is a mistake of the user's like any other."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OfframpError, match=r"cannot write \."):
        write_text(Path(), NEW)


def test_a_trace_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """What safetensors says when it cannot write is for the user, too."""
    nothing = torch.zeros(0)
    trace = Trace((), 1, "", nothing, (), (), nothing, nothing, {})
    path = tmp_path / "missing" / "trace.safetensors"
    with pytest.raises(OfframpError, match=rf"cannot write {re.escape(str(path))}: "):
        trace.save(path)
    assert not contents(tmp_path)
