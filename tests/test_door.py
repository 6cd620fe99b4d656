"""The Hugging Face door: ``generate(custom_generate=...)`` keeps all that ``generate`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import offramp
from offramp.errors import UsageError

PLANS = [
    offramp.Plan(),
    offramp.Plan(run=offramp.Speculate(draft=(0, 1, 2), tokens=3)),
    offramp.Plan(run=offramp.Speculate(draft=(0, 2, 4), tokens=2)),
]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    """The tiny checkpoint as Hugging Face loads it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def batch(checkpoint: Path) -> dict[str, Tensor]:
    """Three prompts of different length, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["one", "a longer second prompt", "three"]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.run.kind)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
        {"eos_token_id": [256, 84, 112]},
        {"suppress_tokens": [10, 20, 30], "max_length": 30, "max_new_tokens": None},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_generate(
    model: PreTrainedModel, batch: dict[str, Tensor], plan: offramp.Plan, options: dict[str, Any]
) -> None:
    """With its logits processors, stopping criteria, lists of end tokens and padding."""
    options = {"max_new_tokens": 16, "do_sample": False} | options
    expected = model.generate(**batch, **options)
    assert len(set(expected[:, -12:].flatten().tolist())) >= 8
    loop = offramp.custom_generate(model, plan)
    assert torch.equal(expected, model.generate(**batch, **options, custom_generate=loop))
    out = model.generate(**batch, **options, custom_generate=loop, return_dict_in_generate=True)
    assert torch.equal(expected, out.sequences)


def test_sampling_depends_on_the_seed_alone(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    """Not on the plan, nor on the process-wide generator."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}
    texts: list[list[list[int]]] = []
    for seed in (1, 1, 2):
        for plan in PLANS:
            torch.manual_seed(len(texts))
            loop = offramp.custom_generate(model, plan, seed=seed)
            texts.append(
                model.generate(**batch, **options, max_new_tokens=12, custom_generate=loop).tolist()
            )
    assert all(text == texts[0] for text in texts[:6])
    assert texts[0] != texts[6] == texts[7] == texts[8]


def test_several_answers_to_one_prompt(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """``num_return_sequences`` repeats rows; each gets a seed of its own."""
    loop = offramp.custom_generate(model)
    out = model.generate(
        **batch,
        do_sample=True,
        temperature=2.0,
        max_new_tokens=8,
        num_return_sequences=2,
        custom_generate=loop,
    )
    assert len(out) == 6
    assert not torch.equal(out[0], out[1])


class Sink:
    """A transformers streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_new_token(model: PreTrainedModel) -> None:
    """``generate`` drops the streamer on its way to a callable; the factory carries it."""
    sink, ids = Sink(), torch.tensor([[5, 6, 7]])
    loop = offramp.custom_generate(model, PLANS[1], streamer=sink)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=loop)
    assert sink.tokens == out[0, 3:].tolist()
    assert sink.ended


def test_what_the_door_cannot_do_is_refused(
    model: PreTrainedModel, batch: dict[str, Tensor], checkpoint: Path
) -> None:
    """Beams, guidance, right padding, another model or depth, a streamer for a batch."""
    loop = offramp.custom_generate(model)
    with pytest.raises(UsageError, match="beam"):
        model.generate(**batch, max_new_tokens=2, num_beams=2, custom_generate=loop)
    with pytest.raises(UsageError, match="guidance"):
        model.generate(**batch, max_new_tokens=2, guidance_scale=1.5, custom_generate=loop)
    turned = {name: rows.flip(1) for name, rows in batch.items()}
    with pytest.raises(UsageError, match="left"):
        model.generate(**turned, max_new_tokens=2, custom_generate=loop)
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match="another model"):
        other.generate(**batch, max_new_tokens=2, custom_generate=loop)
    streaming = offramp.custom_generate(model, streamer=Sink())
    with pytest.raises(UsageError, match="one prompt"):
        model.generate(**batch, max_new_tokens=2, custom_generate=streaming)
    with pytest.raises(UsageError, match="layers"):
        offramp.custom_generate(model, offramp.Plan(run=offramp.Path(layers=(0, 9))))
