"""Law 10. Half a layer is the layer with the other half's output left out, and costs what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.batch import Text
from offramp.checks import Refined
from offramp.cost import flops, weight_bytes, worth
from offramp.decode import decode
from offramp.errors import UsageError
from offramp.hf.backbone import HFBackbone
from offramp.hf.open import open_model
from offramp.paths import ATTENTION, MLP, layer_of, named
from offramp.plan import Plan, execute
from offramp.request import Request
from offramp.runs import Adapt, Path, Run, Speculate
from offramp.speculate import Draft, speculate
from offramp.step import step
from tests.tools import (
    FAST,
    AnyBackbone,
    assert_close,
    assert_sums,
    collected,
    generic,
    lengths,
    opened,
    texts_of,
)

PATH = (0, 1 | MLP, 2 | ATTENTION, 3, 5 | MLP)


@contextmanager
def silenced(model: Any, layers: nn.ModuleList, parts: Sequence[int]) -> Iterator[None]:
    """Let Hugging Face's own model add nothing where a path has no part."""

    def nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    present = {layer_of(part): part for part in parts}
    hooks = []
    for index, layer in enumerate(layers):
        part = present.get(index)
        silent = {
            None: ["self_attn", "mlp"],
            index | MLP: ["self_attn"],
            index | ATTENTION: ["mlp"],
        }
        hooks += [
            layer.get_submodule(name).register_forward_hook(nothing)
            for name in silent.get(part, [])
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def own_logits(backbone: HFBackbone, ids: Sequence[int]) -> Tensor:
    """Return the logits ``[T, V]`` of the model itself without what the path leaves out."""
    with silenced(backbone.model, backbone.adapter.layers, PATH), torch.no_grad():
        logits: Tensor = backbone.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0]


def run(backbone: AnyBackbone, texts: Sequence[list[int]], first: int) -> list[Tensor]:
    """Return every row's logits on the path: of ``first`` tokens at once, then one by one."""
    held = [Text(list(ids[:first]), backbone.open()) for ids in texts]
    rows = [[one] for one in step(backbone, held, layers=PATH, tails=[first] * len(held)).rows]
    for place in range(first, max(map(len, texts))):
        going = [i for i, ids in enumerate(texts) if place < len(ids)]
        for i in going:
            held[i].ids.append(texts[i][place])
        for i, one in zip(
            going, step(backbone, [held[i] for i in going], layers=PATH).rows, strict=True
        ):
            rows[i].append(one)
    for text in held:
        backbone.close(text.slot)
    return [torch.cat(one) for one in rows]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "qwen3", "olmo2", "granite", "mixtral", *FAST]
)
def test_a_path_with_halves_is_the_model_without_the_others(family: str) -> None:
    """A prompt, then token by token, three texts at once: Hugging Face's own logits."""
    backbone = opened(family)
    assert backbone.halves
    texts = texts_of(backbone, [9, 7, 8], seed=4)
    plain = generic(family.removeprefix("fast:"))
    for ids, rows in zip(texts, run(backbone, texts, 5), strict=True):
        assert_close(own_logits(plain, ids), rows)


@pytest.mark.parametrize("family", ["llama", "fast:llama"])
def test_keys_and_values_are_kept_where_there_is_attention(family: str) -> None:
    backbone = opened(family)
    text = Text(texts_of(backbone, [6])[0], backbone.open())
    step(backbone, [text], layers=PATH)
    assert lengths(text.slot)[:6] == [6, 0, 6, 6, 0, 0]
    backbone.trim(text.slot, 4, first_layer=2)
    assert lengths(text.slot)[:6] == [6, 0, 4, 4, 0, 0]


@pytest.mark.parametrize("family", ["llama", "fast:llama"])
def test_half_a_layer_is_counted_and_priced_as_what_it_is(family: str) -> None:
    backbone = opened(family)
    shape = backbone.shape
    assert 0 < shape.attention_weights < shape.layer_weights
    before, rows = backbone.meter.copy(), 7
    text = Text(texts_of(backbone, [rows])[0], backbone.open())
    step(backbone, [text], layers=PATH)
    work = backbone.meter - before
    assert (work.layer_passes, work.attention_passes, work.mlp_passes) == (2, 1, 2)
    assert (work.layer_tokens, work.attention_tokens, work.mlp_tokens) == (14, 7, 14)
    assert work.attended == 3 * rows * (rows + 1) // 2
    assert_sums(work)
    attention, mlp = shape.attention_weights, shape.layer_weights - shape.attention_weights
    weights = 2 * shape.layer_weights + attention + 2 * mlp
    assert worth(PATH, shape) == pytest.approx(weights / shape.layer_weights)
    context = 4 * shape.attention_size * work.attended
    assert flops(work, shape) == 2 * (rows * weights + shape.head_weights) + context
    head = shape.head_weights * shape.head_bytes_per_weight
    assert weight_bytes(work, shape) == pytest.approx(weights * shape.bytes_per_weight + head)


@pytest.mark.parametrize("family", ["llama", "gemma2", "fast:llama", "fast:gemma2"])
@pytest.mark.parametrize("layers", [PATH, (0, 1, 2, 3 | MLP, 4, 5), (0, 1, 2, 3, 4, 5 | MLP)])
def test_drafts_of_halves_change_no_token(family: str, layers: tuple[int, ...]) -> None:
    backbone = opened(family)
    requests = [Request(ids, 20) for ids in texts_of(backbone, [5, 8, 3], seed=1)]
    expected, _ = collected(decode(backbone, requests, batch_size=1), 3)
    found = collected(speculate(backbone, requests, Draft(layers, 3), batch_size=2), 3)[0]
    assert found == expected
    runs: list[Run] = [Adapt(drafts=(layers, (0, 1))), Speculate(draft=layers, head=Refined())]
    for one in runs:
        assert collected(execute(backbone, requests, one), 3)[0] == expected


def test_plans_name_halves_as_people_do() -> None:
    plan = Plan(run=Path(layers=PATH))
    text = plan.model_dump_json()
    assert '"layers":[0,"1m","2a",3,"5m"]' in text
    assert Plan.model_validate_json(text) == plan
    assert [named(part) for part in PATH] == [0, "1m", "2a", 3, "5m"]
    for wrong in ("1x", "01m", "m", "-1m", "1.5m", "1m ", "9999999m", 1.0, True):
        with pytest.raises(ValueError, match=r"layers\.0"):
            Plan.model_validate_json(json.dumps({"run": {"kind": "path", "layers": [wrong]}}))


@pytest.mark.parametrize(
    "layers",
    [
        (0, 1 | MLP, 1),
        (0, 1, 1 | MLP),
        (0, 1 | ATTENTION, 1 | MLP),
        (0, 6 | MLP),
        (),
        (0, 1 | 3 << 20),
    ],
)
def test_halves_that_make_no_path_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="path"):
        Plan(run=Path(layers=layers)).check(opened("llama"))


@pytest.mark.parametrize("wrong", [3 << 20 | 3, 1 << 22 | 3, 1 << 40 | 3, -(1 << 20) + 3])
def test_no_other_marks_are_known(wrong: int) -> None:
    """The kernels would read them in some way, and the meter in another."""
    for run in (Path(layers=(0, wrong)), Speculate(draft=(0, wrong)), Adapt(drafts=((0, wrong),))):
        with pytest.raises(UsageError, match=r"path|draft"):
            Plan(run=run).check(opened("llama"))


@pytest.mark.parametrize("family", ["graph:llama", "gpt_neox", "falcon", "cohere"])
def test_a_model_without_halves_says_so(family: str) -> None:
    """Where attention and MLP read the same state, or on a backbone that runs whole layers."""
    backbone = opened(family)
    assert not backbone.halves
    for one in (Path(layers=(0, 2 | MLP)), Speculate(draft=(0, 2 | ATTENTION))):
        with pytest.raises(UsageError, match="half of a layer"):
            Plan(run=one).check(backbone)


def test_whoever_runs_halves_need_not_ask_first() -> None:
    """The loops take any path: a backbone that was never asked runs it, or says that it cannot."""
    backbone = open_model(generic("gemma2").model)
    text = Text(texts_of(backbone, [6])[0], backbone.open())
    expected = own_logits(generic("gemma2"), text.ids)[-1:]
    assert_close(expected, step(backbone, [text], layers=PATH).logits)
    other = open_model(generic("gpt_neox").model)
    text = Text(texts_of(other, [6])[0], other.open())
    with pytest.raises(UsageError, match="half of a layer"):
        step(other, [text], layers=PATH)
    assert text.done == 0


def test_looking_whether_a_model_has_halves_leaves_nothing_behind() -> None:
    plain = generic("llama")
    backbone = open_model(plain.model)
    before = backbone.meter.copy()
    assert backbone.halves
    assert backbone.meter == before
    assert not any("forward" in m.__dict__ for m in backbone.model.modules())


def test_what_needs_whole_layers_refuses_halves(tmp_path: Any) -> None:
    """A checkpoint holds whole layers."""
    from offramp.hf.export import export

    backbone = generic("llama")
    with pytest.raises(UsageError, match="path"):
        export(backbone, None, PATH, tmp_path / "cut")
    assert offramp.Plan(run=Path(layers=PATH)).lossless is False
