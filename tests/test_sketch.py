"""Sketches of prompts: what was there is found in any form, what was not is never found."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp import sketch
from offramp.sketch import MOST, among, keys, sketched, unpacked
from offramp.text import Prompt

HASHES = st.sets(st.integers(0, 2**64 - 1), max_size=40)


def test_a_prompt_has_one_key_in_every_form() -> None:
    """As a text, as chat messages, with a system message, in other case, width and white space."""
    forms: list[Prompt] = [
        "Name three trees.\n\nIn Latin",
        "  name THREE trees.  In\tLatin\n",
        "\uff2eame three trees. In Latin",
        [{"role": "user", "content": "Name three trees.\nIn Latin"}],
        [
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": "Name three trees. In Latin"},
        ],
    ]
    assert len(set(keys(forms))) == 1
    others = ["Name three trees. In Greek", "Name threetrees. In Latin", "", "You are helpful."]
    assert len({*keys(others), *keys(forms)}) == 5


@settings(deadline=None)
@given(HASHES, HASHES, st.integers(1, 30))
def test_a_hit_is_a_fact_and_the_watched_are_judged_rightly(
    there: set[int], asked: set[int], most: int
) -> None:
    """With few prompts all are watched; with many those up to the largest kept hash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch, "MOST", most)
        made = sketched([*there, *there])
        assert unpacked(made) == sorted(there)[:most]
        for some in (asked, asked | there, there):
            watched = some if len(there) < most else {h for h in some if h <= max(unpacked(made))}
            assert among(some, made) == (len(watched & there), len(watched))


def test_many_prompts_leave_a_small_sketch_that_still_tells() -> None:
    """Of 50,000 a sixth are watched: 300 of them among 400 others are seen as about 3 in 7."""
    prompts = [f"prompt number {i}, of some words" for i in range(50_000)]
    made = sketched(keys(prompts))
    assert len(made) <= 4 * (8 * MOST + 2) / 3
    assert among(keys(f"another prompt, {i}" for i in range(20_000)), made)[0] == 0
    shared, told = among(
        keys([*prompts[1000:1300], *(f"another prompt, {i}" for i in range(400))]), made
    )
    expected = 700 * MOST / 50_000
    assert expected / 1.5 < told < 1.5 * expected
    assert 0.3 < shared / told < 0.56


@pytest.mark.parametrize(
    "wrong",
    [
        "no base64",
        "AAAA",
        base64.b64encode(b"\x02" * 8 + b"\x01" * 8).decode(),
        base64.b64encode(b"\x01" * 16).decode(),
        base64.b64encode(b"".join(i.to_bytes(8, "little") for i in range(MOST + 1))).decode(),
    ],
    ids=["letters", "half a hash", "descending", "twice", "too many"],
)
def test_what_is_no_sketch_is_refused(wrong: str) -> None:
    """Before anything is compared."""
    assert unpacked(base64.b64encode(b"\x01" * 8 + b"\x02" * 8).decode())
    with pytest.raises(ValueError, match=r"sketch|base64|Incorrect|characters"):
        unpacked(wrong)
