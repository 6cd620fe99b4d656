"""Law 2. Waiting changes nothing: whatever left, draining gives the full model's logits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offramp.batch import Span, Text
from offramp.decode import decode
from offramp.policy import FULL, Threshold, fixed
from offramp.request import Request
from offramp.step import KV, step
from offramp.watch import Ran
from tests.tools import (
    BOTH,
    FAST,
    GRAPH,
    TEN,
    Recorder,
    assert_close,
    collected,
    counted,
    lengths,
    opened,
    own_logits,
    stored,
    texts_of,
)

EXITS = (1, 2, 4, 5)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
@pytest.mark.parametrize("seed", [0, 1])
def test_draining_gives_the_full_models_logits(family: str, seed: int) -> None:
    """Every token leaves at a random depth, some run to the end; then one step drains all."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [18], seed)
    draw = random.Random(seed)
    text = Text(ids[:6], backbone.open())
    with counted(backbone):
        step(backbone, [text])
        for token in ids[6:-1]:
            text.ids.append(token)
            depth = draw.choice([*EXITS, *EXITS, None])
            step(backbone, [text], FULL if depth is None else fixed(depth))
        waiting = text.num_waiting
        assert waiting >= 2
        text.ids.append(ids[-1])
        drained = step(backbone, [text], tails=[waiting + 1]).logits
    assert text.num_waiting == 0
    assert_close(own_logits(backbone, ids)[-waiting - 1 :], drained)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_a_prompt_that_left_early_is_drained_whole(family: str) -> None:
    """The rest of the prefill is what the first full-depth token does."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [12], seed=3)
    text = Text(ids[:9], backbone.open())
    with counted(backbone):
        step(backbone, [text], fixed(2))
        assert text.num_waiting == 9
        text.ids.append(ids[9])
        drained = step(backbone, [text], tails=[10]).logits
    assert_close(own_logits(backbone, ids[:10]), drained)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_a_mixed_depth_batch_is_each_text_alone(family: str) -> None:
    """Eight ragged texts that leave where they like: same tokens, same depths, same logits."""
    backbone = opened(family)
    prompts = texts_of(backbone, [4, 9, 6, 6, 13, 3, 8, 5], seed=4)
    policy = Threshold("margin", tuple((depth, 0.3) for depth in EXITS))
    results = []
    for batch_size in (1, 8):
        recorders = [Recorder() for _ in prompts]
        requests = [r.request(p, 14) for r, p in zip(recorders, prompts, strict=True)]
        with counted(backbone):
            tokens = decode(backbone, requests, policy, max_waiting=5, batch_size=batch_size)
            results.append((collected(tokens, 8), [torch.stack(r.logits) for r in recorders]))
    (alone, alone_logits), (together, together_logits) = results
    assert alone == together
    assert len({depth for text in together[1] for depth in text}) >= 3
    for expected, actual in zip(alone_logits, together_logits, strict=True):
        assert_close(expected, actual)


@pytest.mark.parametrize("family", [*BOTH, "graph:llama"])
def test_no_row_runs_in_a_layer_beyond_its_depth(family: str) -> None:
    """Four texts leave at 1, 2, 4 and never: the hooks see just the rows that went on."""
    backbone = opened(family)
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [5, 5, 5, 5], seed=5)]
    step(backbone, texts)
    for text in texts:
        text.ids.append(7)
    with counted(backbone) as rows:
        for text, depth in zip(texts, (1, 2, 4, None), strict=True):
            step(backbone, [text], FULL if depth is None else fixed(depth))
    for kind in ("key", "output", "mlp"):
        assert [rows.by_layer[kind][layer] for layer in range(6)] == [4, 3, 2, 2, 1, 1]


def test_a_full_queue_forces_one_full_depth_step() -> None:
    """With room for three, every fourth token runs all layers and empties the queue."""
    backbone = opened("llama")
    [prompt] = texts_of(backbone, [5], seed=6)
    tokens = decode(backbone, [Request(prompt, 9)], fixed(2), max_waiting=3)
    assert [token.depth for token in tokens] == [6, 2, 2, 2, 6, 2, 2, 2, 6]


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_copied_states_fill_every_deeper_layer_and_run_nothing_else(family: str) -> None:
    """The hooks see the fill in the key projections alone, and later tokens attend to it."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [9], seed=7)
    text = Text(ids[:7], backbone.open())
    step(backbone, [text])
    with counted(backbone) as rows:
        text.ids.append(ids[7])
        step(backbone, [text], fixed(2), kv="copy")
    assert [rows.by_layer["key"][layer] for layer in range(6)] == [1] * 6
    assert [rows.by_layer["output"][layer] for layer in range(6)] == [1, 1, 0, 0, 0, 0]
    assert lengths(text.slot) == [8] * 6
    text.ids.append(ids[8])
    logits = step(backbone, [text]).logits
    assert logits.isfinite().all()
    assert (logits - own_logits(backbone, ids)[-1:]).abs().max() > 1e-3  # it is an approximation


@pytest.mark.parametrize("family", [*BOTH, "fast:gemma2", "fast:olmo2", *GRAPH])
def test_a_copy_is_what_the_layer_makes_of_the_exit_state(family: str) -> None:
    """Filled keys and values equal those of running the layer on that state."""
    backbone = opened(family)
    [ids] = texts_of(backbone, [8], seed=8)
    texts = [Text(ids[:7], backbone.open()) for _ in range(2)]
    for text in texts:
        step(backbone, [text])
        text.ids.append(ids[7])
    step(backbone, [texts[0]], fixed(2), kv="copy")
    step(backbone, [texts[1]], fixed(2))
    state = texts[1].waiting[2]
    for layer in range(2, 6):
        span = _last(texts[1])
        backbone.run([layer], state, [span])
        for ours, theirs in zip(
            stored(texts[0].slot, layer), stored(texts[1].slot, layer), strict=True
        ):
            assert_close(theirs, ours)


def _last(text: Text) -> Span:
    return Span(text, text.done - 1, text.done)


@pytest.mark.parametrize("kv", ["exact", "copy"])
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("family", [*BOTH, "graph:llama"])
def test_a_step_that_fails_leaves_every_text_as_it_was(
    family: str, calls: int, kv: KV, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment raises halfway; the other texts go on to the logits they would have had."""
    backbone = opened(family)
    made = []
    for fails in (False, True):
        texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [7, 5, 9], seed=5)]
        step(backbone, texts)
        for text, depth in zip(texts, (2, 4, 1), strict=True):
            text.ids.append(11)
            step(backbone, [text], fixed(depth))
            text.ids.append(12)
        if fails:
            before = [(text.done, text.num_waiting, lengths(text.slot)) for text in texts]
            with monkeypatch.context() as patch:
                patch.setattr(backbone, "run_until", _failing(backbone.run_until, calls))
                with pytest.raises(ArithmeticError):
                    step(backbone, texts, fixed(3), kv=kv, stay=[False, True, True])
            assert before == [(t.done, t.num_waiting, lengths(t.slot)) for t in texts]
        rows = step(backbone, texts[1:], tails=[2, 2]).logits
        made += [rows, *(part for text in texts for part in stored(text.slot, 0))]
    for expected, actual in zip(made[: len(made) // 2], made[len(made) // 2 :], strict=True):
        assert_close(expected, actual)


def _failing(run: Callable[..., Ran], calls: int) -> Callable[..., Ran]:
    """Return ``run`` that does its work and raises, from the calls-th time on."""
    counter = itertools.count(1)

    def failing(*args: Any) -> Ran:
        out = run(*args)
        if next(counter) >= calls:
            raise ArithmeticError
        return out

    return failing
