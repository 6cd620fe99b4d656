"""The registry: a folder of files, and other packages' entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from offramp import signals
from offramp.errors import UsageError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The registry is read once per process; these tests read it again."""
    signals.registry.cache_clear()
    yield
    signals.registry.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, "offramp.signals")
    monkeypatch.setattr(signals, "entry_points", lambda group: [point])


def test_every_file_of_the_folder_is_a_signal() -> None:
    """Named after its file."""
    files = {path.stem for path in Path(signals.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(signals.registry()) == files >= {"max_prob", "margin", "entropy", "fixed"}


def test_another_package_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point, without touching this one."""
    _install(monkeypatch, "peak", "offramp.signals.max_prob:max_prob")
    assert signals.find("peak") is signals.find("max_prob")


def test_two_signals_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence would make a plan mean two things."""
    _install(monkeypatch, "margin", "offramp.signals.max_prob:max_prob")
    with pytest.raises(UsageError, match="two packages register an exit signal named 'margin'"):
        signals.registry()


def test_an_unknown_signal_is_refused_with_the_known_ones() -> None:
    """So that a typo is mended at once."""
    with pytest.raises(UsageError, match=r"unknown signal 'marign'; there are .*margin"):
        signals.find("marign")
