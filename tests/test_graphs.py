"""The fixed shapes of the backbone for other devices: slots, buckets, and what a capture keeps.

There is no GPU here. ``replaying`` stands in for a CUDA graph: it records the operations once, on
the very tensors they touched, and repeats them whatever the Python code would do now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import offramp
from offramp.batch import Text
from offramp.decode import decode
from offramp.errors import OfframpError, UnsupportedModelError, UsageError
from offramp.fast.capture import Graphs
from offramp.fast.graphs import GraphBackbone, bucket
from offramp.fast.layer import Rows
from offramp.fast.open import open_graphs
from offramp.fast.static import at_least
from offramp.hf.open import open_model
from offramp.policy import fixed
from offramp.request import Request
from offramp.step import step
from tests.families import build
from tests.laws.test_7_fast import everything
from tests.tools import assert_close, collected, generic, own_logits, texts_of


@pytest.fixture
def backbone() -> GraphBackbone:
    """A fresh one, whose store has not grown."""
    return open_graphs(generic("llama"))


def _recorded(_graphs: Graphs, function: partial[Tensor]) -> Callable[[], Tensor]:
    """Record a segment's operations on the tensors they touch now."""
    *given, rows = function.args
    inputs = [getattr(rows, field.name) for field in fields(rows)]

    def segment(*tensors: Tensor) -> Tensor:
        return function.func(*given, Rows(*tensors))

    traced, out = make_fx(segment)(*inputs), torch.empty_like(rows.hidden)
    return lambda: out.copy_(traced(*inputs))  # a graph's result lies where it lay


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Capture and replay as CUDA would; the list grows with each capture."""
    captures: list[int] = []

    def captured(graphs: Graphs, function: Any) -> Callable[[], Tensor]:
        captures.append(len(captures))
        return _recorded(graphs, function)

    monkeypatch.setattr(Graphs, "_captured", captured)
    return captures


def _snapshot(backbone: GraphBackbone) -> list[Tensor]:
    """Return every slot's keys and values but nobody's, ``[slots, H, capacity, size]`` each."""
    return [buffer[1:].clone() for buffer in (*backbone.store.keys, *backbone.store.values)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_replay_is_the_function(family: str, replaying: list[int]) -> None:
    """Recorded once per shape and repeated: the generic logits, and nothing new to record."""
    backbone = open_graphs(generic(family))
    expected = everything(generic(family))
    assert_close(expected, everything(backbone))
    captures = len(replaying)
    assert_close(expected, everything(backbone))
    assert len(replaying) == captures


def test_a_shape_is_captured_once(backbone: GraphBackbone, replaying: list[int]) -> None:
    """Decoding makes one capture per segment and bucket, however long it goes on."""
    requests = [Request(ids, 20) for ids in texts_of(backbone, [5, 9, 3], seed=1)]
    expected, _ = collected(decode(generic("llama"), requests, fixed(2), max_waiting=3), 3)
    made = []
    for _ in range(2):
        assert expected == collected(decode(backbone, requests, fixed(2), max_waiting=3), 3)[0]
        made.append(len(replaying))
    assert made[0] == made[1] == len(backbone.graphs)


def test_texts_keep_their_keys_when_slots_and_capacity_grow(
    backbone: GraphBackbone, replaying: list[int]
) -> None:
    """Twelve texts of which one doubles the capacity twice: each has the model's own logits."""
    many = texts_of(backbone, [9, *range(4, 14), 150], seed=2)
    texts: list[Text] = []
    for ids in many:
        texts.append(Text(ids[:-1], backbone.open()))
        step(backbone, texts[-1:])
    assert backbone.store.slots >= 13
    assert backbone.store.capacity == 256
    alone = []
    for text, ids in zip(texts, many, strict=True):
        text.ids.append(ids[-1])
        alone.append(step(backbone, [text]).logits)  # few keys first, many last
        text.trim(len(ids) - 1)
        backbone.trim(text.slot, len(ids) - 1)
        text.ids.append(ids[-1])
    together = step(backbone, texts).logits.split(1)
    for ids, *rows in zip(many, alone, together, strict=True):
        for row in rows:
            assert_close(own_logits(backbone, ids)[-1:], row)


def test_a_long_prompt_is_cut(backbone: GraphBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call has more than 1024 rows, or memory and shapes would have no bound."""
    seen: list[int] = []
    run = backbone.layers.run

    def watched(layers: Any, length: int, rows: Rows) -> Tensor:
        seen.append(len(rows.hidden))
        return run(layers, length, rows)

    monkeypatch.setattr(backbone.layers, "run", watched)
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [30, 1500, 600])]
    step(backbone, texts)
    assert seen == [1024, 1024, 96]


def test_the_youngest_graphs_are_kept() -> None:
    """The one unused for longest makes room, and is made again when it is wanted."""
    graphs, made = Graphs(torch.device("cpu")), []
    graphs._captured = lambda function: made.append(function()) or function  # type: ignore
    for key in (*range(256), 0, 256, 0, 1):
        graphs(key, partial(torch.tensor, key))
    assert len(graphs) == 256
    assert [int(key) for key in made[256:]] == [256, 1]


@pytest.mark.parametrize("closed", [True, False])
def test_a_freed_slot_is_used_again_and_is_empty(backbone: GraphBackbone, closed: bool) -> None:
    """Closed, twice even, or forgotten: no number of the text before reaches the next one."""
    [ids] = texts_of(backbone, [20], seed=3)
    expected = own_logits(backbone, ids[:6])[-1:]
    for _ in range(10):
        text = Text(list(ids), backbone.open())
        step(backbone, [text])
        index = text.slot.index
        for buffer in (*backbone.store.keys, *backbone.store.values):
            buffer[index] = torch.nan
        if closed:
            backbone.close(text.slot)
            backbone.close(text.slot)
        del text
        after = Text(ids[:6], backbone.open())
        assert after.slot.index == index
        assert_close(expected, step(backbone, [after]).logits)
        other = backbone.open()
        assert other.index != index
        backbone.close(other)
        backbone.close(after.slot)
    assert backbone.store.slots == 4


@pytest.mark.parametrize("counts", [(3,), (1, 1, 1), (5, 1), (9, 2, 1), (70, 3)])
@pytest.mark.parametrize("fills", [False, True])
def test_padding_leaves_every_slot_unchanged(
    backbone: GraphBackbone, counts: tuple[int, ...], fills: bool
) -> None:
    """Only the positions of the rows asked for are written, in the slots of their texts."""
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [7] * len(counts), seed=4)]
    step(backbone, texts)
    backbone.store.reserve(100)
    before = _snapshot(backbone)
    for text, count in zip(texts, counts, strict=True):
        text.ids += [11] * count
    if fills:
        step(backbone, texts, fixed(1), kv="copy")
    else:
        step(backbone, texts)
    for old, new in zip(before, _snapshot(backbone), strict=True):
        changed = (old != new).any(-1).any(1)  # [slots, capacity]
        expected = torch.zeros_like(changed)
        for text, count in zip(texts, counts, strict=True):
            expected[text.slot.index - 1, 7 : 7 + count] = True
        assert torch.equal(changed, expected)


def test_padding_is_never_read(backbone: GraphBackbone) -> None:
    """Nobody's slot may hold anything, and a text's own slot beyond its length any number."""
    [ids] = texts_of(backbone, [12], seed=5)
    text = Text(ids[:9], backbone.open())
    step(backbone, [text])
    for buffer in (*backbone.store.keys, *backbone.store.values):
        buffer[0] = torch.nan
        buffer[text.slot.index, :, 12:] = 1e30
    text.ids += ids[9:]
    assert_close(own_logits(backbone, ids)[-3:], step(backbone, [text], tails=[3]).logits)


def test_buckets_hold_their_rows_and_are_few() -> None:
    """1, 2, 4, 8, then steps of 8 to 32, then of 32; keys double from 64."""
    sizes = [bucket(count) for count in range(1, 1025)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert sorted(set(sizes))[:9] == [1, 2, 4, 8, 16, 24, 32, 64, 96]
    assert len(set(sizes)) == 38
    assert [at_least(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_bf16_rounds_no_worse_than_the_models_own_modules(family: str) -> None:
    """The model's precision is kept, for states and for keys and values."""
    own = open_model(build(family).bfloat16())
    backbone = open_graphs(own)
    assert backbone.store.keys[0].dtype == torch.bfloat16
    expected = everything(generic(family))
    ours, theirs = (
        (everything(made).float() - expected).square().mean().item() for made in (backbone, own)
    )
    assert ours <= 1.2 * theirs


def test_the_model_computes_what_it_did() -> None:
    """Its modules have become views of the fused weights, and hold nothing beside them."""
    model = build("qwen2")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        opened = open_graphs(open_model(model))
        assert torch.equal(before, model(input_ids=ids).logits)
    attention = model.model.layers[3].self_attn
    owner = opened._fused.layers[3].matrices["qkv"].weight.untyped_storage().data_ptr()
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert module.weight.untyped_storage().data_ptr() == owner


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "cohere", "exaone4", "ministral3", "olmo"])
def test_a_model_with_other_parts_is_refused(family: str) -> None:
    """By the same rules as the kernels'."""
    with pytest.raises(UnsupportedModelError, match=type(generic(family).model).__name__):
        open_graphs(generic(family))


def test_other_precisions_are_refused() -> None:
    """In one sentence."""
    with pytest.raises(UnsupportedModelError, match="it holds float64, not fp32 or bf16"):
        open_graphs(open_model(build("llama").double()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_sentence(checkpoint: Path) -> None:
    """Whether no such name exists, or nothing can be run there."""
    with pytest.raises(UsageError, match="no device 'gpu'; try cpu or cuda"):
        offramp.load(str(checkpoint), device="gpu")
    for name in ("cuda", "meta"):
        with pytest.raises(OfframpError, match=f"nothing can be run on {name} here"):
            offramp.load(str(checkpoint), device=name)


@pytest.mark.parametrize("backbone_name", ["auto", "fast", "hf"])
def test_packed_weights_stay_on_the_cpu(
    backbone_name: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for the kernels; said before a model loads."""
    monkeypatch.setattr("offramp.model._checked_device", torch.device)
    monkeypatch.setattr("offramp.model.load_tuned", None)
    with pytest.raises(UsageError, match="int4 weights need the fast backbone on a CPU"):
        offramp.load(str(checkpoint), backbone=backbone_name, weights="int4", device="cuda")
