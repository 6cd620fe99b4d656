"""Which families are opened, and which are refused with a reason. ``make families`` shows more."""

from __future__ import annotations

import pytest

from offramp.errors import UnsupportedModelError
from offramp.hf.open import open_model
from tests.families import FAMILIES, REFUSED, build
from tests.tools import TEN, opened


@pytest.mark.parametrize("family", FAMILIES)
def test_opened(family: str) -> None:
    """The load-time check passes: full depth, exits that drain, trimming."""
    assert opened(family).shape.num_layers == 6


@pytest.mark.parametrize("family", TEN)
def test_ragged_texts_share_a_call(family: str) -> None:
    """If the batch check ever failed here, every batch would silently run text by text."""
    assert opened(family).batched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    """With a sentence that names the model and says why, not with a wrong token."""
    model = build(family)
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        open_model(model)
