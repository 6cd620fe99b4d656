"""Law 3. A draft has no consequence: speculation is plain decoding, greedy and sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from offramp.checks import FULL_HEAD, Head, Shortlist, Tokens
from offramp.decode import decode
from offramp.plan import execute
from offramp.request import Request
from offramp.runs import Speculate
from offramp.sample import Sampling
from offramp.speculate import Draft, speculate
from tests.tools import (
    FAST,
    GRAPH,
    TEN,
    collected,
    counted,
    opened,
    own_answer,
    own_logits,
    texts_of,
)

DRAFTS = [
    Draft((0, 1), 3),
    Draft((0, 1, 2, 3, 4), 5),
    Draft((0, 1), 4, min_confidence=0.5),
    Draft((0, 1, 3, 5), 3),  # skips layers: runs on a state of its own after layer 1
    Draft((0, 2, 4), 4),
]


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_greedy_speculation_writes_what_generate_writes(family: str) -> None:
    """Exits and layer subsets, alone and in batches whose texts draft at their own pace."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 9, 3, 7], seed=1)
    expected = [own_answer(backbone, prompt, 20) for prompt in prompts]
    assert max(len(set(answer)) for answer in expected) >= 8
    requests = [Request(prompt, 20) for prompt in prompts]
    for draft in DRAFTS:
        for batch_size in (1, 3):
            with counted(backbone):
                tokens = speculate(backbone, requests, draft, batch_size=batch_size)
                ids, depths = collected(tokens, 4)
            assert expected == ids
            assert {6} == {depth for text in depths for depth in text}


@pytest.mark.parametrize(
    "family", [*("llama", "gemma2", "bloom", "fast:llama", "fast:gemma2"), *GRAPH[:2]]
)
def test_sampled_speculation_repeats_plain_sampling(family: str) -> None:
    """The same seed gives the same tokens, whatever drafts, and whoever shares the batch."""
    backbone = opened(family)
    prompts = texts_of(backbone, [6, 4, 8], seed=2)
    requests = [
        Request(p, 16, Sampling(1.0, 30, 0.95, 1.2, seed).chooser())
        for seed, p in enumerate(prompts)
    ]
    expected, _ = collected(decode(backbone, requests, batch_size=1), 3)
    assert max(len(set(answer)) for answer in expected) >= 8
    for draft in DRAFTS:
        assert expected == collected(speculate(backbone, requests, draft, batch_size=2), 3)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "fast:llama", "graph:llama"])
def test_a_draft_by_a_short_head_has_no_consequence(family: str) -> None:
    """Greedy and sampled, with layers skipped, and a head that lacks most of what is written."""
    backbone = opened(family)
    prompts = texts_of(backbone, [6, 4, 8], seed=2)
    ends = frozenset([backbone.shape.vocab_size - 1])
    for sampling in (Sampling(), Sampling(1.0, 30, 0.95, 1.2)):
        requests = [Request(prompt, 16, sampling.chooser(), ends) for prompt in prompts]
        expected, _ = collected(decode(backbone, requests, batch_size=1), 3)
        assert max(len(set(answer)) for answer in expected) >= 8
        written = sorted({token for answer in expected for token in answer})
        for head in (Shortlist(size=2), Tokens(tokens=tuple(written[1::2]))):
            for layers in ((0, 1), (0, 1, 3, 5)):
                run = Speculate(draft=layers, tokens=3, head=head)
                list(execute(backbone, requests[:1], run))  # its head is made: hooks see it
                with counted(backbone) as rows:
                    tokens = execute(backbone, requests, run, batch_size=2)
                    assert expected == collected(tokens, 3)[0]
                assert rows.check  # the drafts were chosen by it


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_short_head_of_all_that_is_chosen_drafts_as_the_full_one(temperature: float) -> None:
    """Sampling's noise stands by a token's id, wherever a head ends or what it leaves out."""
    backbone = opened("llama")
    prompts = texts_of(backbone, [6, 4], seed=2)
    inner, chosen = Sampling(temperature).chooser(), set[int]()

    def choose(logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        tokens = inner(logits, ids, first)
        chosen.update(tokens)
        return tokens

    def drafted(head: Head) -> tuple[int, int]:
        before = backbone.meter.copy()
        run = Speculate(draft=(0, 1, 2, 3, 4), tokens=4, head=head)
        list(execute(backbone, [Request(prompt, 30, choose) for prompt in prompts], run))
        work = backbone.meter - before
        return work.drafted, work.accepted

    expected = drafted(FULL_HEAD)
    assert expected[1] >= 8
    assert 8 <= len(chosen) < backbone.shape.vocab_size
    assert expected == drafted(Tokens(tokens=tuple(sorted(chosen))))


def test_sampled_speculation_has_the_full_models_distribution() -> None:
    """Chi-square of 10,000 draws of three tokens against their exact joint probabilities.

    A correct program fails once in 10,000 seeds of this test; the seeds are fixed.
    """
    backbone = opened("llama")
    [prompt] = texts_of(backbone, [5], seed=3)
    exact = _joint(backbone_logits=lambda ids: own_logits(backbone, ids)[-1], prompt=prompt)
    draws = 10_000
    sampling = [Sampling(2.0, 3, seed=seed).chooser() for seed in range(draws)]
    requests = [Request(prompt, 3, choose) for choose in sampling]
    texts, _ = collected(speculate(backbone, requests, Draft((0, 1), 2), batch_size=500), draws)
    seen = Counter(map(tuple, texts))
    assert set(seen) <= set(exact)
    statistic = sum((seen[t] - draws * p) ** 2 / (draws * p) for t, p in exact.items())
    assert min(exact.values()) * draws >= 5  # the approximation needs it
    assert statistic < 65.0  # 99.99% quantile of chi-square with 27 - 1 degrees is 60.1; 1e-5: 66.1


def _joint(backbone_logits: object, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Return the probability of every possible triple under top-3 sampling at temperature 2."""
    assert callable(backbone_logits)
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, probability in joint.items():
            best = (backbone_logits([*prompt, *text]) / 2.0).topk(3)
            shares = torch.softmax(best.values.double(), -1).tolist()
            for token, share in zip(best.indices.tolist(), shares, strict=True):
                longer[(*text, token)] = probability * share
        joint = longer
    assert len(joint) == len(list(product(range(3), repeat=3)))
    return joint


def test_a_finished_text_ends_in_the_middle_of_a_confirmed_draft() -> None:
    """End tokens and lengths cut what a draft ran past, exactly as plain decoding does."""
    backbone = opened("llama")
    [prompt] = texts_of(backbone, [5], seed=1)
    answer = own_answer(backbone, prompt, 20)
    for end in range(1, 8):
        eos = frozenset([answer[end]])
        first = answer.index(answer[end])
        got = list(speculate(backbone, [Request(prompt, 20, eos=eos)], Draft((0, 1, 2, 3, 4), 6)))
        assert answer[: first + 1] == [token.id for token in got]
        assert [None] * first + ["stop"] == [token.finish for token in got]
        short = list(speculate(backbone, [Request(prompt, end)], Draft((0, 1, 2, 3, 4), 6)))
        assert answer[:end] == [token.id for token in short]
        assert short[-1].finish == "length"
