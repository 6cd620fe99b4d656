"""Law 5. A signal is pointwise: conformance of everything in the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.probe import Probe
from offramp.signals import find, registry, score
from tests.tools import opened, texts_of


def _probes(rows: int) -> Probe:
    """Return the probe at the third of three exits, on real states of a tiny model."""
    backbone = opened("llama")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, rows, backbone.shape.hidden_size, generator=generator)
    probe = None
    for depth, hidden in zip((1, 2, 4), states, strict=True):
        probe = Probe(depth, 6, hidden, backbone.readout, probe)
    assert probe is not None
    return probe


pytestmark = pytest.mark.parametrize("name", sorted(registry()))


def test_a_row_is_judged_by_itself(name: str) -> None:
    """The score of a row is the same alone, in any company and in any order."""
    probe = _probes(17)
    together = score(probe, name)
    alone = torch.cat([score(_probes(17).take([row]), name) for row in range(17)])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    shuffled = score(_probes(17).take(order), name)
    torch.testing.assert_close(together[order], shuffled, rtol=1e-5, atol=1e-6)


def test_scores_are_finite_and_in_the_stated_range(name: str) -> None:
    """One float per row, between low and high, at every exit."""
    probe: Probe | None = _probes(64)
    while probe is not None:
        values = score(probe, name)
        assert values.shape == (64,)
        assert values.is_floating_point()
        assert values.isfinite().all()
        assert (values >= find(name).low - 1e-6).all()
        assert (values <= find(name).high + 1e-6).all()
        probe = probe.previous


def test_looking_back_is_declared(name: str) -> None:
    """A signal changes with the exit before if and only if it says so."""
    probe = _probes(64)
    without = Probe(probe.depth, 6, probe.hidden, probe.readout)
    same = torch.equal(score(probe, name), score(without, name))
    assert find(name).looks_back == (not same)


def test_a_signal_leaves_its_probe_alone(name: str) -> None:
    """Pure: the states are untouched, and asking twice gives the same."""
    probe = _probes(8)
    assert probe.hidden is not None
    before: Tensor = probe.hidden.clone()
    first = score(probe, name)
    assert torch.equal(before, probe.hidden)
    assert torch.equal(first, registry()[name](probe))


def test_real_rows_are_judged_alike_by_row_and_by_text(name: str) -> None:
    """The same on the states that a real pass produces."""
    from offramp.trace import record

    backbone = opened("gemma2")
    texts = [(ids, 1) for ids in texts_of(backbone, [12, 7])]
    both = record(backbone, texts, (2, 4)).scores[name]
    one = torch.cat([record(backbone, [text], (2, 4)).scores[name] for text in texts])
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-5)
