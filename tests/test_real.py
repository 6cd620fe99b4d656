"""The laws on real models and real text: SmolLM2-135M-Instruct and the 260K story model."""

from __future__ import annotations

import pytest
import torch

import offramp
from offramp.checks import Check, LowRank, Shortlist
from offramp.decode import decode
from offramp.hf.open import open_model
from offramp.inspection import PROMPTS, judge
from offramp.policy import Threshold
from offramp.request import Request
from offramp.speculate import Draft, speculate
from offramp.text import encode
from offramp.trace import record, replay
from tests.stories import load_stories
from tests.tools import collected, counted, own_answer


@pytest.mark.real
@pytest.mark.timeout(600)
def test_plain_and_speculative_text_is_that_of_generate(smol: offramp.Model) -> None:
    """Three prompts, alone and together, an exit and a layer-subset draft: the same tokens."""
    backbone = smol.backbone
    ids = [encode(smol.tokenizer, prompt) for prompt in PROMPTS[:3]]
    expected = [own_answer(backbone, prompt, 20) for prompt in ids]  # type: ignore[arg-type]
    assert len({token for answer in expected for token in answer}) >= 30
    requests = [Request(prompt, 20) for prompt in ids]
    assert expected == collected(decode(backbone, requests), 3)[0]
    uniform = tuple(layer for layer in range(30) if layer not in (9, 13, 17, 21))
    for draft in (Draft(tuple(range(24)), 3), Draft(uniform, 3, 0.3)):
        with counted(backbone):  # type: ignore[arg-type]
            assert expected == collected(speculate(backbone, requests, draft), 3)[0]


@pytest.mark.real
@pytest.mark.timeout(600)
def test_an_untuned_model_is_not_worth_it_and_inspect_says_so(smol: offramp.Model) -> None:
    """Its check costs eight layers, and its middle layers cannot speak."""
    ids = [encode(smol.tokenizer, prompt) for prompt in PROMPTS[:2]]
    requests = [Request(prompt, 24, eos=smol.eos) for prompt in ids]
    answers, _ = collected(decode(smol.backbone, requests), 2)
    texts = [(p + answer, len(p)) for p, answer in zip(ids, answers, strict=True)]
    found = judge(record(smol.backbone, texts), smol.backbone.shape, batched=True)
    assert found.check_in_layers == 8
    assert found.fill_in_layers == 0.0625
    agreement = {row.depth: row.agreement for row in found.rows}
    assert agreement[12] < 0.25 < agreement[29]
    assert found.verdict.startswith("not worth it")


@pytest.mark.real
@pytest.mark.timeout(600)
def test_replay_is_the_loop_on_a_real_model(smol: offramp.Model) -> None:
    """A threshold policy, waiting tokens and a bounded queue: the same depth for every token."""
    backbone = smol.backbone
    [ids] = [encode(smol.tokenizer, PROMPTS[1])]
    policy = Threshold("max_prob", ((21, 0.8), (27, 0.6)))
    [text], [depths] = collected(decode(backbone, [Request(ids, 32)], policy, max_waiting=4), 1)
    assert len(set(depths)) >= 2
    trace = record(backbone, [(ids + text, len(ids))], (21, 27))
    assert depths == replay(trace, policy, max_waiting=4).depths.tolist()


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_shortlist_decides_as_the_full_head_and_a_low_rank_does_not(smol: offramp.Model) -> None:
    """Share of the same decisions at five exits: of 2,000 of them, one in forty differs at most.

    This head has no low rank to speak of: its checks decide little better than a coin. If that
    ever changes, so should the docs.
    """
    ids = [encode(smol.tokenizer, prompt) for prompt in PROMPTS]
    requests = [Request(prompt, 40, eos=smol.eos) for prompt in ids]
    answers, _ = collected(decode(smol.backbone, requests), len(ids))
    texts = [(p + answer, len(p)) for p, answer in zip(ids, answers, strict=True)]
    exits = (12, 18, 21, 24, 27)
    full = record(smol.backbone, texts, exits).scores["max_prob"]
    assert full.numel() >= 900

    def same(check: Check, threshold: float) -> float:
        seen = record(smol.backbone, texts, exits, check=check).scores["max_prob"]
        return ((seen >= threshold) == (full >= threshold)).float().mean().item()

    for threshold, floor in ((0.5, 0.96), (0.9, 0.98)):
        assert 0.1 < (full >= threshold).float().mean().item() < 0.9
        assert same(Shortlist(size=4096), threshold) >= floor
        assert 0.4 < same(LowRank(rank=32), threshold) < 0.7


def test_stories_are_the_same_with_any_draft() -> None:
    """Real text statistics: a model whose shallow drafts are often right, and often not."""
    try:
        model, tokenizer = load_stories()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    backbone = open_model(model)
    ids = [tokenizer.encode(text) for text in ("Once upon a time", "Tom and Lily", "The dog")]
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in ids]
    assert min(len(set(answer)) for answer in expected) >= 20
    requests = [Request(prompt, 60) for prompt in ids]
    for draft in (Draft((0, 1, 2), 2), Draft((0, 1, 2, 3), 5), Draft((0, 2, 4), 3)):
        with counted(backbone):
            before = backbone.meter.copy()
            assert expected == collected(speculate(backbone, requests, draft), 3)[0]
            work = backbone.meter - before
        assert 0 < work.accepted < work.drafted
