"""Law 4. Replay is the truth: a trace replays to the depths and logits of the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offramp.decode import decode
from offramp.errors import OfframpError, UsageError
from offramp.policy import Threshold
from offramp.probe import Probe
from offramp.signals import find, registry
from offramp.trace import Trace, load_trace, record, replay
from tests.tools import (
    FAST,
    GRAPH,
    TEN,
    Recorder,
    assert_close,
    collected,
    counted,
    opened,
    texts_of,
)

EXITS = (1, 2, 4, 5)


def _policy(trace: Trace, name: str) -> Threshold:
    """Thresholds in the gaps between observed scores, so that rounding cannot flip a decision."""
    pairs = []
    for column, depth in enumerate(trace.exits):
        values = trace.scores[name][:, column].unique()
        middle = len(values) // 2
        cut = (values[middle] + values[max(middle - 1, 0)]).item() / 2
        pairs.append((depth, min(max(cut, find(name).low), find(name).high)))
    return Threshold(name, tuple(pairs))


@pytest.mark.parametrize("family", TEN + FAST + GRAPH[:2])
@pytest.mark.parametrize("name", sorted(registry()))
def test_replay_gives_the_depths_and_logits_of_the_loop(family: str, name: str) -> None:
    """Generate with a policy, trace the text it wrote, replay: same decisions, same logits."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    full, _ = collected(decode(backbone, [Recorder().request(p, 12) for p in prompts]), 3)
    pairs = [(p + t, len(p)) for p, t in zip(prompts, full, strict=True)]
    policy = _policy(record(backbone, pairs, EXITS), name)

    recorders = [Recorder() for _ in prompts]
    requests = [r.request(p, 12) for r, p in zip(recorders, prompts, strict=True)]
    with counted(backbone):
        ids, depths = collected(decode(backbone, requests, policy, max_waiting=4), 3)
    if name != "fixed":
        assert len({depth for text in depths for depth in text}) >= 2

    pairs = [(p + t, len(p)) for p, t in zip(prompts, ids, strict=True)]
    with counted(backbone):
        trace = record(backbone, pairs, EXITS, keep_hidden=True)
    replayed = replay(trace, policy, max_waiting=4)
    assert [depth for text in depths for depth in text] == replayed.depths.tolist()
    assert [token for text in ids for token in text] == replayed.chosen.tolist()
    assert trace.hidden is not None
    columns = [(*EXITS, 6).index(depth) for depth in replayed.depths.tolist()]
    states = trace.hidden[torch.arange(len(columns)), columns]
    logits = torch.cat([backbone.readout(state[None], 6) for state in states])
    assert_close(torch.stack([row for r in recorders for row in r.logits]), logits)


def test_a_replay_by_scores_is_a_replay_by_states() -> None:
    """Tables and states judge alike; a subset of the exits needs the states where it must."""
    backbone = opened("llama")
    pairs = [(ids, 3) for ids in texts_of(backbone, [20, 15])]
    trace = record(backbone, pairs, EXITS, keep_hidden=True)
    for name in registry():
        policy = _policy(trace, name)
        by_scores = replay(trace, policy)
        by_states = replay(trace, policy, backbone=backbone)
        assert by_scores.depths.tolist() == by_states.depths.tolist()
        subset = Threshold(name, policy.thresholds[1::2])
        if find(name).looks_back:
            with pytest.raises(UsageError, match="neighbouring exits"):
                replay(trace, subset)
        else:
            by_scores = replay(trace, subset)
            by_states = replay(trace, subset, backbone=backbone)
            assert by_scores.depths.tolist() == by_states.depths.tolist()


def test_a_policy_of_ones_own_replays_on_kept_states() -> None:
    """Anything that looks at hidden states or logits needs them kept, and says so otherwise."""

    class Norm:
        exits = (2, 4)
        bars = None

        def leave(self, probe: Probe) -> torch.Tensor:
            strong: torch.Tensor = probe.logits.norm(dim=-1) > limit
            return strong

    backbone = opened("llama")
    [ids] = texts_of(backbone, [5], seed=1)
    kept = record(backbone, [(texts_of(backbone, [30])[0], 1)], EXITS, keep_hidden=True)
    assert kept.hidden is not None
    limit = backbone.readout(kept.hidden[:, 1], 2).norm(dim=-1).median().item() + 1e-3
    recorder = Recorder()
    [text], [depths] = collected(decode(backbone, [recorder.request(ids, 14)], Norm()), 1)
    assert len(set(depths)) >= 2
    trace = record(backbone, [(ids + text, len(ids))], EXITS, keep_hidden=True)
    assert depths == replay(trace, Norm(), backbone=backbone).depths.tolist()
    bare = record(backbone, [(ids + text, len(ids))], EXITS)
    with pytest.raises(UsageError, match="keep_hidden"):
        replay(bare, Norm())


@pytest.mark.parametrize("exit_prompt", [False, True])
def test_replay_knows_how_prompts_and_full_queues_are_run(exit_prompt: bool) -> None:
    """A policy that always leaves is bounded by the queue, online and in replay."""
    backbone = opened("llama")
    [prompt] = texts_of(backbone, [6])
    policy = Threshold("fixed", ((2, 1.0),))
    tokens = decode(
        backbone, [Recorder().request(prompt, 11)], policy, max_waiting=3, exit_prompt=exit_prompt
    )
    [ids], [depths] = collected(tokens, 1)
    trace = record(backbone, [(prompt + ids, len(prompt))], EXITS)
    replayed = replay(trace, policy, max_waiting=3, exit_prompt=exit_prompt)
    assert depths == replayed.depths.tolist()
    assert ([2, 6, 2] if exit_prompt else [6, 2, 2]) == depths[
        :3
    ]  # a waiting prompt fills the queue


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    """What is saved is what is loaded."""
    backbone = opened("llama")
    trace = record(backbone, [(texts_of(backbone, [9])[0], 2)], EXITS, keep_hidden=True)
    trace = replace(trace, prompts=(2**64 - 1,))
    trace.save(tmp_path / "t.safetensors")
    loaded = load_trace(tmp_path / "t.safetensors")
    for name in ("exits", "num_layers", "fingerprint", "lengths", "rows", "prompts"):
        assert getattr(trace, name) == getattr(loaded, name)
    for name in ("ids", "chosen", "loss", "hidden"):
        assert torch.equal(getattr(trace, name), getattr(loaded, name))
    assert trace.scores.keys() == loaded.scores.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    replace(trace, prompts=None).save(tmp_path / "t.safetensors")
    assert load_trace(tmp_path / "t.safetensors").prompts is None
    replace(trace, prompts=(1, 2)).save(tmp_path / "t.safetensors")
    with pytest.raises(OfframpError, match="is no offramp trace"):
        load_trace(tmp_path / "t.safetensors")
