"""Gates: fitted on a trace, kept in a file, used as a policy; refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import offramp
from offramp.decode import decode
from offramp.errors import OfframpError, UsageError
from offramp.files import digest_of
from offramp.gate import Gate, GateWeights, fit_gate, load_gate
from offramp.probe import Probe
from offramp.trace import Trace, record, replay
from tests.tools import (
    BOTH,
    DIGEST_CHANGES,
    Change,
    Recorder,
    collected,
    counted,
    opened,
    tamper,
    texts_of,
)

EXITS = (1, 2, 4, 5)


def toy(rows: int = 200, *, right: str = "split", seed: int = 0) -> Trace:
    """A trace of one exit where a direction of the state says whether it is right."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 2, 8, generator=generator)
    hidden[:, 0, 3] = hidden[:, 0, 3].sign() * 2  # a clear gap
    sizes = torch.rand(rows, 1, generator=generator) * 100 + 0.1  # states of any scale
    agrees = {
        "split": hidden[:, 0, 3] > 0,
        "always": torch.ones(rows, dtype=torch.bool),
        "never": torch.zeros(rows, dtype=torch.bool),
    }[right]
    hidden[:, 0] *= sizes
    chosen = torch.stack((agrees.int(), torch.ones(rows).int()), 1)
    return Trace(
        exits=(3,),
        num_layers=6,
        fingerprint="toy",
        ids=torch.zeros(rows + 1, dtype=torch.int32),
        lengths=(rows + 1,),
        rows=(rows,),
        chosen=chosen,
        loss=torch.zeros(rows, 2),
        scores={},
        hidden=hidden,
    )


def fitted(name: str) -> GateWeights:
    """Gates of a tiny model, fitted on random text."""
    backbone = opened(name)
    texts = [(ids, 1) for ids in texts_of(backbone, [60, 60], seed=9)]
    return fit_gate(record(backbone, texts, EXITS, keep_hidden=True))


def halves(gates: GateWeights, trace: Trace) -> Gate:
    """A policy whose thresholds lie between scores of real states."""
    assert trace.hidden is not None
    pairs = []
    for column, depth in enumerate(EXITS):
        values = gates.score(trace.hidden[:, column], depth).unique()
        pairs.append((depth, values[len(values) // 2 - 1 : len(values) // 2 + 1].mean().item()))
    return Gate(gates, tuple(pairs))


def test_a_gate_separates_what_can_be_separated() -> None:
    """On the text it was fitted on and on other text, at any scale of the state."""
    gates = fit_gate(toy())
    for trace in (toy(), toy(seed=1)):
        assert trace.hidden is not None
        score = gates.score(trace.hidden[:, 0], 3)
        assert ((score > 0.5) == trace.agrees[:, 0]).float().mean().item() >= 0.98
        scaled = gates.score(7 * trace.hidden[:, 0], 3)
        torch.testing.assert_close(score, scaled, atol=1e-3, rtol=0)
    assert gates.weights[0].abs().argmax().item() == 3


def test_fitting_twice_gives_the_same_gate() -> None:
    """Bit by bit, and whatever was drawn in between."""
    first = fit_gate(toy())
    torch.rand(3)
    second = fit_gate(toy())
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.biases, second.biases)
    assert first.fitted_on == second.fitted_on


@pytest.mark.parametrize(("right", "low", "high"), [("always", 0.9, 1), ("never", 0, 0.1)])
def test_exits_that_are_always_right_or_never_have_a_gate(
    right: str, low: float, high: float
) -> None:
    """A finite one, that says so."""
    trace = toy(right=right)
    assert trace.hidden is not None
    score = fit_gate(trace).score(trace.hidden[:, 0], 3)
    assert score.isfinite().all()
    assert ((low <= score) & (score <= high)).all()


def test_a_row_is_judged_by_itself() -> None:
    """The same score alone and in company."""
    gates, trace = fit_gate(toy()), toy(seed=2)
    assert trace.hidden is not None
    together = gates.score(trace.hidden[:, 0], 3)
    alone = [gates.score(row[None, 0], 3) for row in trace.hidden]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", BOTH)
def test_replay_of_a_gate_is_the_loop_and_asks_no_head(family: str) -> None:
    """Depths from kept states, with the model or without; the head runs once per token."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    texts = [(ids, 1) for ids in texts_of(backbone, [30, 20])]
    policy = halves(fitted(family), record(backbone, texts, EXITS, keep_hidden=True))
    requests = [Recorder().request(prompt, 12) for prompt in prompts]
    before = backbone.meter.copy()
    with counted(backbone):
        ids, depths = collected(decode(backbone, requests, policy, max_waiting=4), 3)
    work = backbone.meter - before
    assert len({depth for text in depths for depth in text}) >= 2
    assert (work.head_rows, work.check_rows) == (36, 0)
    pairs = [(p + text, len(p)) for p, text in zip(prompts, ids, strict=True)]
    kept = record(backbone, pairs, EXITS, keep_hidden=True)
    for given in (None, backbone):
        replayed = replay(kept, policy, max_waiting=4, backbone=given)
        assert [depth for text in depths for depth in text] == replayed.depths.tolist()
        assert [token for text in ids for token in text] == replayed.chosen.tolist()
    with pytest.raises(UsageError, match="keep_hidden"):
        replay(record(backbone, pairs, EXITS), policy)


def test_gates_survive_the_disk(tmp_path: Path) -> None:
    """What is saved is what is loaded, and nothing else is left beside it."""
    gates = fitted("llama")
    gates.save(tmp_path / "g.safetensors")
    loaded = load_gate(tmp_path / "g.safetensors")
    for name in ("exits", "num_layers", "fingerprint", "fitted_on"):
        assert getattr(gates, name) == getattr(loaded, name)
    assert torch.equal(gates.weights, loaded.weights)
    assert torch.equal(gates.biases, loaded.biases)
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def _facts(gates: GateWeights) -> dict[str, Any]:
    return {
        "format": 2,
        "exits": list(gates.exits),
        "num_layers": gates.num_layers,
        "fingerprint": gates.fingerprint,
        "fitted_on": {},
    }


def _header(facts: dict[str, Any], parts: dict[str, torch.Tensor]) -> dict[str, str]:
    """What the file says, its digest as if it had been written so."""
    said = json.dumps(facts)
    tensors = [parts[name] for name in ("weights", "biases") if name in parts]
    return {"offramp_gate": said, "sha256": digest_of(said, tensors)}


WRONG: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "a repeated exit": lambda facts, _: facts.update(exits=[1, 1, 4, 5]),
    "an exit too deep": lambda facts, _: facts.update(exits=[1, 2, 4, 6]),
    "an exit of no depth": lambda facts, _: facts.update(exits=[0, 2, 4, 5]),
    "an exit that is no number": lambda facts, _: facts.update(exits=[1, 2, 4, "5"]),
    "an exit too few": lambda facts, _: facts.update(exits=[1, 2, 4]),
    "no model": lambda facts, _: facts.pop("fingerprint"),
    "a bias too few": lambda _, parts: parts.update(biases=parts["biases"][:3].clone()),
    "a matrix of biases": lambda _, parts: parts.update(biases=torch.zeros(4, 1)),
    "half precision": lambda _, parts: parts.update(weights=parts["weights"].half()),
    "a weight that is no number": lambda _, parts: parts["weights"][2, 3].fill_(torch.nan),
    "an infinite bias": lambda _, parts: parts["biases"][1].fill_(torch.inf),
    "no weights": lambda _, parts: parts.pop("weights"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_whose_parts_do_not_go_together_is_refused(tmp_path: Path, wrong: str) -> None:
    """Before it judges anything."""
    gates, path = fitted("llama"), tmp_path / "g.safetensors"
    facts = _facts(gates)
    parts = {"weights": gates.weights.clone(), "biases": gates.biases.clone()}
    save_file(parts, path, _header(facts, parts))
    load_gate(path)
    WRONG[wrong](facts, parts)
    save_file(parts, path, _header(facts, parts))
    with pytest.raises(OfframpError, match="is no file of offramp gates"):
        load_gate(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A missing one, text, a trace, gates of a later format."""
    path = tmp_path / "g.safetensors"
    with pytest.raises(OfframpError, match="cannot read the gates"):
        load_gate(path)
    path.write_text("not a file of tensors")
    with pytest.raises(OfframpError, match="no file of offramp gates"):
        load_gate(path)
    toy().save(path)
    with pytest.raises(OfframpError, match="no file of offramp gates"):
        load_gate(path)
    gates = fitted("llama")
    parts = {"weights": gates.weights, "biases": gates.biases}
    save_file(parts, path, _header(_facts(gates) | {"format": 1}, parts))
    with pytest.raises(OfframpError, match="format 1"):
        load_gate(path)


CHANGED: dict[str, Change] = {
    "one weight": lambda _, parts: parts["weights"][1, 0].add_(1.0),
    "one bias": lambda _, parts: parts["biases"][3].sub_(0.5),
    "an exit": lambda said, _: said.update(
        offramp_gate=said["offramp_gate"].replace("[1, 2, 4, 5]", "[1, 2, 3, 5]")
    ),
    "the model": lambda said, _: said.update(
        offramp_gate=said["offramp_gate"].replace('"fingerprint": "', '"fingerprint": "0')
    ),
    **DIGEST_CHANGES,
}


@pytest.mark.parametrize("change", CHANGED)
def test_tampered_gates_are_refused(tmp_path: Path, change: str) -> None:
    """Whatever was changed, and though what is left is a file of gates."""
    path = tmp_path / "g.safetensors"
    fitted("llama").save(path)
    tamper(path, CHANGED[change])
    with pytest.raises(OfframpError, match="was changed since it was written"):
        load_gate(path)


def test_gates_are_known_by_their_digest(tmp_path: Path) -> None:
    """A plan that notes it refuses others that are as good in themselves; one without takes any."""
    gates, path = fitted("llama"), tmp_path / "g.safetensors"
    others = replace(gates, biases=gates.biases + 1)
    for own, other in ((gates, others), (others, gates)):
        own.save(path)
        assert load_gate(path, own.digest).digest == load_gate(path).digest == own.digest
        with pytest.raises(OfframpError, match="not hold the gates this plan was made with"):
            load_gate(path, other.digest)


def test_what_no_gate_can_be_fitted_on() -> None:
    """Each is one sentence with the remedy."""
    with pytest.raises(UsageError, match="keep_hidden=True"):
        fit_gate(replace(toy(), hidden=None))
    with pytest.raises(UsageError, match="no exit"):
        fit_gate(replace(toy(), exits=()))
    for l2 in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="l2"):
            fit_gate(toy(), l2=l2)
    gates = fit_gate(toy())
    with pytest.raises(UsageError, match="no gate for exit 4"):
        Gate(gates, ((4, 0.5),))
    with pytest.raises(UsageError, match=r"threshold 1\.5"):
        Gate(gates, ((3, 1.5),))
    with pytest.raises(UsageError, match="keep_hidden=True"):
        Gate(gates, ((3, 0.5),)).leave(Probe(3, 6, None, None, scores={"x": torch.zeros(2)}))


def test_a_plan_with_gates_runs_and_knows_its_model(tiny: offramp.Model, tmp_path: Path) -> None:
    """The plan is the policy; another model's gates are refused before anything runs."""
    texts = [(list(b"some text of bytes, long enough"), 1), (list(b"another one of them"), 1)]
    trace = record(tiny.backbone, texts, (2, 4), keep_hidden=True)
    gates, path = offramp.fit_gate(trace), tmp_path / "g.safetensors"
    gates.save(path)
    cut = gates.score(trace.hidden[:, 0], 2).median().item()  # type: ignore[index]
    file = offramp.GateFile(file=str(path))

    def plan() -> offramp.Plan:
        run = offramp.Exit(signal="gate", thresholds={2: cut, 4: 0.5}, check=file)
        return offramp.Plan(run=run)

    answer = tiny.generate("hello", plan=plan(), max_new_tokens=12)
    assert len(set(answer.outputs[0].depths)) >= 2
    assert answer.figures.work.head_rows == 12
    replace(gates, fingerprint="other").save(path)
    with pytest.raises(UsageError, match="fitted on a model of 6 layers and fingerprint other"):
        tiny.generate("hello", plan=plan())
