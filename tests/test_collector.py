"""The garbage collector rests while a model is opened, and never longer."""

from __future__ import annotations

import gc

import pytest

import offramp
from offramp.collector import resting


def test_it_rests_within_and_goes_on_after() -> None:
    with resting(), resting():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_a_failure() -> None:
    with pytest.raises(ValueError, match="no"), resting():
        raise ValueError("no")
    assert gc.isenabled()


def test_who_stopped_it_finds_it_stopped() -> None:
    gc.disable()
    try:
        with resting():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_rests_while_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def opened(*_args: object, **_options: object) -> None:
        seen.append(gc.isenabled())
        raise offramp.OfframpError("far enough")

    monkeypatch.setattr("offramp.model.load_tuned", opened)
    with pytest.raises(offramp.OfframpError, match="far enough"):
        offramp.load()
    assert seen == [False]
    assert gc.isenabled()
