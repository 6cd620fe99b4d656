"""The Python door: ``offramp.load(...)``, ``generate`` and ``stream``."""

from __future__ import annotations

import pytest
import torch

import offramp
from offramp.cost import flops, full_depth, weight_bytes
from offramp.errors import OfframpError, UsageError
from offramp.sample import Sampling
from tests.tools import counted


def test_a_stream_is_the_text_in_pieces(tiny: offramp.Model) -> None:
    """Joined pieces are the answer; every token comes once, with its depth."""
    stream = tiny.stream(["hello", "good day"], max_new_tokens=20)
    texts, ids = ["", ""], [list[int](), list[int]()]
    for piece in stream:
        texts[piece.index] += piece.text
        ids[piece.index].append(piece.token.id)
    outputs = stream.result.outputs
    assert texts == [output.text for output in outputs]
    assert ids == [output.token_ids for output in outputs]
    for output in outputs:
        assert output.text == tiny.tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_a_list_of_messages_is_one_prompt(tiny: offramp.Model) -> None:
    """And a list of such lists is several; a plain string is a user's message."""
    messages = [{"role": "user", "content": "hello"}]
    one = tiny.generate(messages, max_new_tokens=5)
    assert tiny.generate("hello", max_new_tokens=5).outputs[0].token_ids == one.outputs[0].token_ids
    assert len(tiny.generate([messages, messages], max_new_tokens=5).outputs) == 2
    raw = tiny.generate("hello", max_new_tokens=5, raw=True)
    assert raw.outputs[0].token_ids != one.outputs[0].token_ids


def test_the_figures_are_the_work(tiny: offramp.Model) -> None:
    """Counted rows, and ratios of one for plain decoding."""
    backbone = tiny.backbone
    with counted(backbone):  # type: ignore[arg-type]
        result = tiny.generate(["hello", "hi there", "you"], max_new_tokens=9, batch_size=2)
    figures = result.figures
    assert figures.tokens == sum(len(output.token_ids) for output in result.outputs)
    assert figures.work.as_dict() == figures.baseline.as_dict()
    assert figures.as_dict()["flops_ratio"] == figures.as_dict()["bytes_ratio"] == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_baseline_is_what_plain_decoding_does(tiny: offramp.Model, batch_size: int) -> None:
    """The predicted work of full depth equals the counted work, prompt by prompt and batched."""
    prompts = ["a", "bb", "cc", "a much longer prompt", "e"]
    result = tiny.generate(prompts, max_new_tokens=7, batch_size=batch_size)
    texts = [
        (len(tiny.tokenizer(f"<user>{prompt}<assistant>")["input_ids"]), len(output.token_ids))
        for prompt, output in zip(prompts, result.outputs, strict=True)
    ]
    expected = full_depth(texts, tiny.backbone.shape, batch_size)
    assert expected == result.figures.work


def test_a_sub_model_never_touches_the_layers_above(tiny: offramp.Model) -> None:
    """Depth n is the first n layers, the model's norm and its head; the hooks see no other row."""
    with counted(tiny.backbone) as rows:  # type: ignore[arg-type]
        shallow = tiny.generate(
            "hello", plan=offramp.Plan(run=offramp.Path(layers=(0, 1, 2))), max_new_tokens=8
        )
    assert set(rows.by_layer["key"]) == {0, 1, 2}
    assert set(shallow.outputs[0].depths) == {3}
    shape = tiny.backbone.shape
    assert flops(shallow.figures.work, shape) < flops(shallow.figures.baseline, shape)
    assert weight_bytes(shallow.figures.work, shape) < weight_bytes(shallow.figures.baseline, shape)


def test_sampling_does_not_depend_on_the_batch(tiny: offramp.Model) -> None:
    """Prompt i draws with seed + i, whoever else is there."""
    sampling = Sampling(temperature=1.5, seed=3)
    prompts = ["hello", "good day", "oh"]
    together = tiny.generate(prompts, sampling=sampling, max_new_tokens=10)
    for i, prompt in enumerate(prompts):
        alone = tiny.generate(
            prompt, sampling=Sampling(temperature=1.5, seed=3 + i), max_new_tokens=10
        )
        assert alone.outputs[0].token_ids == together.outputs[i].token_ids


def test_mistakes_are_found_before_anything_runs(tiny: offramp.Model) -> None:
    """Empty and too long prompts, impossible lengths, stops and batches."""
    before = tiny.backbone.meter.copy()
    for match, call in {
        "no prompt": {"prompts": []},
        "empty": {"prompts": ["fine", " "]},
        "at most 256": {"prompts": "x" * 300},
        "1 or more": {"prompts": "x", "max_new_tokens": 0},
        "batch-size": {"prompts": "x", "batch_size": 0},
        "stop strings": {"prompts": "x", "stop": [""]},
    }.items():
        with pytest.raises(UsageError, match=match):
            tiny.generate(**call)  # type: ignore[arg-type]
    assert tiny.backbone.meter == before


def test_the_context_ends_a_text(tiny: offramp.Model) -> None:
    """An answer stops where the model's positions end, and says so."""
    result = tiny.generate("x" * 230, max_new_tokens=100)
    [output] = result.outputs
    prompt = len("<user>" + "x" * 230 + "<assistant>")
    assert len(output.token_ids) == 256 - prompt
    assert output.finish_reason == "length"


def test_a_device_that_fails_without_a_word_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some of torch's errors carry no message at all."""

    def wordless(*_args: object, **_kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "zeros", wordless)
    with pytest.raises(OfframpError, match="on cuda here: AssertionError"):
        offramp.load(device="cuda")
