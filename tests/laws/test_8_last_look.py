"""Law 8, at the end of the path: a short head may spare a token the full one, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import offramp
from offramp.backbone import Backbone
from offramp.calibrate.replays import replay_all
from offramp.checks import Shortlist
from offramp.cost import check_in_heads, exit_ratio, flops
from offramp.decode import decode
from offramp.errors import UsageError
from offramp.plan import Plan, cheap_weights, execute
from offramp.policy import Threshold
from offramp.request import Request
from offramp.runs import Exit
from offramp.trace import record, replay
from tests.tools import FAST, GRAPH, Recorder, collected, opened, texts_of

FAMILIES = ["llama", "gpt2", *FAST[:2], *GRAPH[:1]]
HEAD = Shortlist(size=100)
NEW = 12


def _written(
    backbone: Backbone, thresholds: dict[int, float], prompts: list[list[int]], **facts: object
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each text and their depths."""
    tokens = decode(
        backbone,
        [Recorder().request(list(p), NEW) for p in prompts],
        Threshold("max_prob", tuple(sorted(thresholds.items()))),
        exit_head=HEAD.choose(backbone, ()),
        **facts,  # type: ignore[arg-type]
    )
    return collected(tokens, len(prompts))


def _run(thresholds: dict[int, float]) -> Exit:
    return Exit(signal="max_prob", thresholds=thresholds, check=HEAD, head=HEAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_never_leaves_there_says_what_the_full_head_says(family: str) -> None:
    """And who always does, what the short head says, after the same layers."""
    backbone = opened(family)
    depth = backbone.shape.num_layers
    prompts = texts_of(backbone, [5, 8, 3], seed=1)

    def decoded(**facts: object) -> list[list[int]]:
        requests = [Recorder().request(list(p), NEW) for p in prompts]
        return collected(decode(backbone, requests, **facts), 3)[0]  # type: ignore[arg-type]

    assert _written(backbone, {depth: math.inf}, prompts)[0] == decoded()
    short = decoded(head=HEAD.choose(backbone, ()))
    assert short != decoded()
    assert _written(backbone, {depth: 0.0}, prompts, exit_prompt=True)[0] == short
    texts = [(prompt + text, len(prompt)) for prompt, text in zip(prompts, short, strict=True)]
    trace = record(backbone, texts, (depth,), check=HEAD, head=HEAD)
    always = Threshold("max_prob", ((depth, 0.0),))
    found = replay(trace, always, head=HEAD, exit_prompt=True)
    assert found.chosen.tolist() == [token for text in short for token in text]
    assert (found.chosen != trace.chosen[:, -1]).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["exact", "copy"])
def test_a_replay_knows_who_leaves_there(family: str, kv: str) -> None:
    """Beside an earlier exit: same depths and tokens, by one policy and by many at once.

    A token that leaves after the last layer ran them all, so the queue is empty behind it.
    """
    backbone = opened(family)
    depth = backbone.shape.num_layers
    [prompt] = texts_of(backbone, [6], seed=2)
    exits = (2, depth)
    [[text], _] = _written(backbone, {2: math.inf, depth: math.inf}, [prompt])
    trace = record(backbone, [(prompt + text, len(prompt))], exits, check=HEAD, head=HEAD)
    cuts = [trace.scores["max_prob"][:, column].sort().values for column in range(2)]
    middle = {e: float(c[5] + c[6]) / 2 for e, c in zip(exits, cuts, strict=True)}
    [ids], [depths] = _written(backbone, middle, [prompt], max_waiting=2, kv=kv)
    if kv == "copy":  # keys are not the trace's: the loop is only to hold
        assert set(depths) == set(exits)
        return
    trace = record(backbone, [(prompt + ids, len(prompt))], exits, check=HEAD, head=HEAD)
    policy = Threshold("max_prob", tuple(sorted(middle.items())))
    found = replay(trace, policy, max_waiting=2, head=HEAD)
    assert found.depths.tolist() == depths
    assert found.chosen.tolist() == ids
    many = replay_all(
        trace,
        trace.scores["max_prob"],
        exits,
        torch.tensor([[middle[2], middle[depth]], [math.inf, 0.0], [0.0, math.inf]]),
        max_waiting=2,
    )
    wrong = (found.chosen != trace.chosen[:, -1]).float().mean().item()
    assert many.losses["disagreement"][0, 0] == pytest.approx(wrong)
    last = Threshold("max_prob", ((depth, 0.0),))
    only = replay(trace, last, max_waiting=2, head=HEAD)
    assert many.left[1, :, 0].tolist() == [0, NEW - 1]  # all but the one that the prompt gave
    assert (only.chosen[1:] == trace.chosen[1:, 1]).all()
    assert many.left[2, 0, 0] == np.ceil((NEW - 1) * 2 / 3)  # two wait, the third takes them along


def test_what_it_costs_is_counted_and_predicted() -> None:
    """A look for all, the full head for who stays; a look too many costs more than full depth."""
    backbone = opened("fast:llama")
    shape, depth = backbone.shape, backbone.shape.num_layers
    look = check_in_heads(shape, HEAD.weights(shape))
    for share in (0.0, 0.5, 1.0):
        saved = exit_ratio(shape, [depth], [share], check=look) - 1
        head = exit_ratio(shape, [depth], [0.0], check=1.0) - 1
        assert saved == pytest.approx((look - share) * head)
    [prompt] = texts_of(backbone, [6])
    before = backbone.meter.copy()
    run = _run({depth: 0.0})
    list(execute(backbone, [Request(list(prompt), NEW)], run))
    work = backbone.meter - before
    assert (work.head_rows, work.check_rows) == (1, NEW - 1)  # the prompt is read out whole
    assert flops(work, shape, cheap_weights(Plan(run=run), shape)) > 0


def test_with_the_full_head_it_is_no_exit(tiny: offramp.Model) -> None:
    """Leaving after the last layer is not leaving, unless a short head chooses."""
    depth = tiny.backbone.shape.num_layers
    whole = Exit(signal="max_prob", thresholds={depth: 0.5})
    with pytest.raises(UsageError, match="needs a short head"):
        Plan(run=whole).check(tiny.backbone)
    with pytest.raises(UsageError, match="needs a short head"):
        record(tiny.backbone, [([1, 2, 3], 1)], (depth,))
    with pytest.raises(UsageError, match=f"outside 1 to {depth}"):
        Plan(run=_run({depth + 1: 0.5})).check(tiny.backbone)
    Plan(run=_run({depth: 0.5})).check(tiny.backbone)
