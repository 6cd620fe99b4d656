"""The card: what is written is read, and what is no card is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.card import CARD, Base, Card, Data, Recipe, read_card, write_card
from offramp.errors import OfframpError
from offramp.sketch import sketched

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
depths = st.integers(1, 99)
counts = st.integers(0, 2**40)
cards = st.builds(
    Card,
    base=st.builds(Base, name=names, fingerprint=names),
    exits=st.lists(depths, unique=True).map(lambda found: tuple(sorted(found))),
    readouts=st.dictionaries(depths, st.sampled_from(["shared", "affine", "head", "block"])),
    recipe=st.builds(
        Recipe, name=names, settings=st.dictionaries(names, st.none() | st.booleans() | names)
    ),
    data=st.none()
    | st.builds(
        Data,
        files=st.dictionaries(names, names),
        texts=counts,
        tokens=counts,
        prompts=st.none() | st.lists(st.integers(0, 2**64 - 1)).map(sketched),
    ),
    versions=st.dictionaries(names, names),
)


@given(cards)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, card: Card) -> None:
    """Every field, depths as numbers."""
    folder = tmp_path_factory.mktemp("card")
    write_card(folder, card)
    assert read_card(folder) == card
    told = json.loads(json.dumps(card.told()))
    whole = card.model_dump(mode="json")
    assert told["data"] is None or told["data"].keys() == whole["data"].keys() - {"prompts"}
    assert Card.model_validate_json(json.dumps(told)).model_copy(update={"data": card.data}) == card


def test_a_folder_without_a_card_has_none(tmp_path: Path) -> None:
    """Nor has a folder that is not there."""
    assert read_card(tmp_path) is None
    assert read_card(tmp_path / "nowhere") is None


GOOD = {
    "base": {"name": "tiny", "fingerprint": "00"},
    "exits": [2],
    "readouts": {"2": "affine"},
    "recipe": {"name": "lite"},
}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("format", 2),
        ("base", {"name": "tiny"}),
        ("exits", [0]),
        ("exits", ["two"]),
        ("readouts", {"2": "mlp"}),
        ("readouts", {"x": "head"}),
        ("recipe", {"name": 7}),
        ("data", {"files": {}, "texts": 1, "tokens": 1.5}),
        ("data", {"files": {}, "texts": 1, "tokens": 1, "prompts": "half"}),
        ("module", "os"),
    ],
)
def test_what_is_no_card_is_refused_by_name(tmp_path: Path, where: str, value: Any) -> None:
    """The file and the field; the card without the mistake is one."""
    path = tmp_path / CARD
    path.write_text(json.dumps(GOOD))
    assert read_card(tmp_path) is not None
    path.write_text(json.dumps(GOOD | {where: value}))
    with pytest.raises(OfframpError, match=rf"{CARD} is no card of a tuned model: {where}"):
        read_card(tmp_path)


def test_a_file_that_is_no_json_or_far_too_large_is_refused(tmp_path: Path) -> None:
    """Before it is read into memory."""
    path = tmp_path / CARD
    path.write_bytes(b"\xff{")
    with pytest.raises(OfframpError, match="is no card of a tuned model"):
        read_card(tmp_path)
    with path.open("wb") as stream:
        stream.truncate(2**24 + 1)
    with pytest.raises(OfframpError, match="too large for a card"):
        read_card(tmp_path)
