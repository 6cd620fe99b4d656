"""Law 7. Fast is generic: the kernels give the generic logits, in every weight format."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.decode import decode
from offramp.fast import build as kernel_build
from offramp.fast.backbone import FastBackbone
from offramp.fast.open import open_fast
from offramp.fast.pack import Format
from offramp.hf.backbone import HFBackbone
from offramp.hf.open import open_model
from offramp.policy import FULL, Policy, fixed
from offramp.request import Request
from offramp.speculate import Draft, speculate
from offramp.step import step
from tests.families import build
from tests.tools import FAST, GRAPH, assert_close, collected, generic, opened, stored, texts_of

FAMILIES = [name.removeprefix("fast:") for name in FAST]

# Root mean square of the difference, as a share of that of the logits. The models are random, with
# weights of either sign and gains of 1.5: far harsher on rounding than a trained one.
ROUNDING: dict[Format, float] = {"bf16": 0.03, "int8": 0.1}


@cache
def rounded(family: str, form: Format) -> tuple[HFBackbone, FastBackbone]:
    """Return a model whose weights are already those of this format, so that both hold the same."""
    from offramp.fast.pack import dequantise, quantise

    model = build(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.copy_(dequantise(*quantise(parameter, form)))
    backbone = open_model(model)
    return backbone, open_fast(backbone, form)


def everything(backbone: Backbone) -> Tensor:
    """Return logits of a ragged batch whose texts leave at 1, 3 and never, drain, and go on."""
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [21, 4, 9])]
    rows = [step(backbone, texts, tails=[21, 4, 9]).logits]
    policies: list[Policy] = [fixed(1), fixed(3), FULL]
    for round_ in range(3):
        for text, policy in zip(texts, policies, strict=True):
            text.ids.append(20 + round_)
            rows.append(step(backbone, [text], policy).logits)
    for text in texts:
        text.ids.append(30)
    tails = [text.num_waiting + 1 for text in texts]
    rows.append(step(backbone, texts, tails=tails).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("name", FAST + GRAPH)
def test_a_ragged_batch_of_mixed_depth_has_the_generic_logits(name: str) -> None:
    """Prompts of unequal length, early exits, drains: all logits."""
    assert_close(everything(generic(name.split(":")[1])), everything(opened(name)))


@pytest.mark.parametrize("name", FAST + GRAPH)
def test_a_fill_is_the_generic_fill(name: str) -> None:
    """Copied states leave the same keys and values in every deeper layer."""
    kept = []
    for backbone in (generic(name.split(":")[1]), opened(name)):
        texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [11, 5], seed=1)]
        step(backbone, texts)
        for text in texts:
            text.ids.append(8)
        step(backbone, texts, fixed(2), kv="copy")
        kept.append([part for t in texts for layer in range(6) for part in stored(t.slot, layer)])
    for expected, actual in zip(*kept, strict=True):
        assert_close(expected, actual)


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_formats_differ_by_their_rounding_alone(family: str, form: Format) -> None:
    """Weights of half the size, or a quarter, within the stated tolerance."""
    expected = everything(generic(family))
    off = everything(open_fast(generic(family), form)) - expected
    assert (off.square().mean() / expected.square().mean()).sqrt().item() <= ROUNDING[form]


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_weights_that_a_format_can_hold_lose_nothing_to_it(family: str, form: Format) -> None:
    """What is left is the rounding of the states to 8 bits."""
    expected, actual = (everything(backbone) for backbone in rounded(family, form))
    off = (actual - expected).square().mean() / expected.square().mean()
    assert off.sqrt().item() <= ROUNDING["int8"]


# One register, two or four hold a vector: what this processor has is what all other tests try.
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
PROCESSORS = ["x86-64", "x86-64-v3"] if platform.machine() == "x86_64" else []


@pytest.fixture(scope="module", params=PROCESSORS)
def pairs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Format, tuple[FastBackbone, FastBackbone]]]:
    """A backbone of each format with this processor's kernels, and one with an older one's."""
    native = {form: open_fast(generic("llama"), form) for form in FORMATS}
    swapped = {
        "-march=native": f"-march={request.param}",
        "-O3": "-O1",
    }
    with pytest.MonkeyPatch.context() as patch:
        flags = tuple(swapped.get(flag, flag) for flag in kernel_build._FLAGS)
        patch.setattr(kernel_build, "_FLAGS", flags)
        patch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("kernels")))
        kernel_build.kernels.cache_clear()
        yield {form: (native[form], open_fast(generic("llama"), form)) for form in FORMATS}
    kernel_build.kernels.cache_clear()


@pytest.mark.parametrize("form", FORMATS)
def test_an_older_processor_gives_the_same_logits(
    pairs: dict[Format, tuple[FastBackbone, FastBackbone]], form: Format
) -> None:
    """But for the order of its sums; which may move a state of 8 bits by one step."""
    expected, actual = (everything(backbone) for backbone in pairs[form])
    if form in ("fp32", "bf16"):
        assert_close(expected, actual)
    off = (actual - expected).square().mean() / expected.square().mean()
    assert off.sqrt().item() <= 0.02


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_speculation_is_lossless_in_every_format(form: Format) -> None:
    """A row is computed the same whatever it shares a call with, so drafts change no token."""
    backbone = open_fast(generic("llama"), form)
    requests = [Request(ids, 24) for ids in texts_of(backbone, [5, 9, 3], seed=1)]
    expected, _ = collected(decode(backbone, requests, batch_size=1), 3)
    assert max(len(set(answer)) for answer in expected) >= 8
    for draft in (Draft((0, 1, 2), 4), Draft((0, 2, 4), 3)):
        assert expected == collected(speculate(backbone, requests, draft), 3)[0]


@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_threads_and_company_change_nothing(
    family: str, form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: texts that cross shares of keys, alone or together, on one to three threads."""
    monkeypatch.setattr("offramp.fast.backbone._WORTH_SHARING", 0)
    backbone = open_fast(generic(family), form)
    made = [_across_shares(backbone, threads, monkeypatch) for threads in (1, 2, 3)]
    for other in made[1:]:
        assert torch.equal(other, made[0])


def _across_shares(backbone: Backbone, threads: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return logits of two long texts, first each alone and then, trimmed, in one step."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [1100, 90], seed=4)]
    for text in texts:
        step(backbone, [text])
        text.ids += [7, 8]
    alone = torch.cat([step(backbone, [text], tails=[2]).logits for text in texts])
    for text in texts:
        text.trim(len(text.ids) - 2)
        backbone.trim(text.slot, len(text.ids))
        text.ids += [7, 8]
    together = step(backbone, texts, tails=[2, 2]).logits
    assert torch.equal(alone, together)
    return together


@pytest.mark.parametrize("name", ["fast:llama", "graph:llama"])
def test_long_texts_and_long_prompts_are_the_generic_ones(name: str) -> None:
    """Buffers double, rotary tables grow, and prompts longer than a chunk of rows are cut."""
    expected, actual = (_long(backbone) for backbone in (generic("llama"), opened(name)))
    assert_close(expected, actual)


def _long(backbone: Backbone) -> Tensor:
    [ids] = texts_of(backbone, [1100], seed=3)
    texts = [Text(ids[:1010], backbone.open()), Text(ids[:100], backbone.open())]
    rows = [step(backbone, texts, tails=[20, 1]).logits]
    for token in ids[1010:1050]:
        texts[0].ids.append(token)
        rows.append(step(backbone, texts[:1]).logits)
    return torch.cat(rows)
