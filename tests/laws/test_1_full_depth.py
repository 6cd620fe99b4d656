"""Law 1. Full depth is the model: prefill and decode equal its own logits and its own text."""

from __future__ import annotations

import pytest
import torch

from offramp.batch import Text
from offramp.decode import decode
from offramp.request import Request
from offramp.step import step
from tests.tools import (
    FAST,
    GRAPH,
    TEN,
    assert_close,
    collected,
    counted,
    opened,
    own_answer,
    own_logits,
    texts_of,
)

pytestmark = pytest.mark.parametrize("family", TEN + FAST + GRAPH)


def test_prefill_and_decode_give_the_models_logits(family: str) -> None:
    """A prompt of seven tokens, then one token at a time."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [20])
    text = Text(ids[:7], backbone.open())
    with counted(backbone):
        rows = [step(backbone, [text]).logits]
        for token in ids[7:]:
            text.ids.append(token)
            rows.append(step(backbone, [text]).logits)
    assert_close(own_logits(backbone, ids)[6:], torch.cat(rows))


def test_a_prompt_gives_the_logits_of_every_row_asked_for(family: str) -> None:
    """Tails are the last rows, in order."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [11], seed=1)
    text = Text(list(ids), backbone.open())
    assert_close(own_logits(backbone, ids)[-5:], step(backbone, [text], tails=[5]).logits)


def test_greedy_text_is_that_of_generate(family: str) -> None:
    """Alone and in a batch with room for three of five."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 9, 3, 9, 12], seed=2)
    expected = [own_answer(backbone, prompt, 12) for prompt in prompts]
    assert max(len(set(answer)) for answer in expected) >= 6  # a collapsed text would prove little
    requests = [Request(prompt, 12) for prompt in prompts]
    for batch_size in (1, 3):
        with counted(backbone):
            ids, depths = collected(decode(backbone, requests, batch_size=batch_size), 5)
        assert expected == ids
        assert {backbone.shape.num_layers} == {depth for text in depths for depth in text}
