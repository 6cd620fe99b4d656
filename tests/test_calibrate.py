"""Calibrating a real tiny model: the command line, sealed plans, drift, the alarm, bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from offramp import timing
from offramp.backbone import Backbone
from offramp.calibrate.audit import audit
from offramp.calibrate.certify import Goal
from offramp.calibrate.drift import Monitor, measure, prompts_of, replayed_losses, write
from offramp.calibrate.run import Way, calibrate, verification
from offramp.calibrate.settings import pricing
from offramp.calibrate.texts import counted, text_hash
from offramp.calibrate.verify import noise
from offramp.card import CARD, Base, Card, Data, Recipe, write_card
from offramp.checks import FULL_HEAD, GateFile
from offramp.cost import check_in_layers
from offramp.errors import OfframpError, UsageError
from offramp.gate import fit_gate
from offramp.plan import Plan, read_plan, sealed, write_plan
from offramp.runs import Exit
from offramp.sketch import keys, sketched
from offramp.timing import Constants
from offramp.trace import load_trace, record, replay
from tests.calibration import altered, made_up
from tests.test_cli import Shell
from tests.tools import texts_of

LAW = settings(max_examples=30, deadline=None)
WAY = Way((2, 4))
GOAL = Goal("disagreement", 0.3)
Certified = tuple[dict[int, float], float]
"""(thresholds, predicted cost)."""


def price(exits: Sequence[int], shares: Sequence[float]) -> float:
    """A cheap world: leaving saves, checking costs nothing."""
    return 1 - sum(share * (1 - depth / 6) for depth, share in zip(exits, shares, strict=True))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The command line in this process, its output captured."""
    return Shell(capsys, monkeypatch)


def taking(backbone: Backbone, head: float = 1.0) -> Constants:
    """A machine whose layers take a second each, and reading weights all there is to a readout."""
    shape = backbone.shape
    readout = head * check_in_layers(shape)
    return Constants(
        layer=((1, 1.0), (64, 1.0)),
        pair=0.0,
        key=0.0,
        head=((1, readout), (64, readout)),
        fill=((1, 0.0),),
        path=((1, 1 + readout),),
        bare=((1, 1.0),),
        step=0.0,
        ask=0.0,
    )


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Constants]:
    """What was measured: time that reading weights takes, so that nothing depends on the hour."""
    found: list[Constants] = []

    def measure(backbone: Backbone, **_told: object) -> Constants:
        found.append(taking(backbone))
        return found[-1]

    monkeypatch.setattr(timing, "measure", measure)
    return found


@pytest.fixture(scope="session")
def traced(tiny: offramp.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the tiny model on its own answers to 48 random prompts, at exits 2 and 4."""
    prompts = texts_of(tiny.backbone, [3 + i % 5 for i in range(48)])
    full = Exit(signal="max_prob", thresholds={})
    own = write(tiny.backbone, [(ids, 5) for ids in prompts], full)
    path = tmp_path_factory.mktemp("trace") / "own.safetensors"
    record(tiny.backbone, own, (2, 4)).save(path)
    return path


@pytest.fixture(scope="session")
def plan(tiny: offramp.Model) -> Plan:
    """A certified plan for the tiny model; of a made-up trace."""
    found = calibrate(made_up(200), WAY, GOAL, price)
    return found.plan(tiny.id, weights="fp32", data={"texts": "0" * 64}, seed=0, measured=False)


def test_the_plan_is_what_was_certified() -> None:
    """Its thresholds replay to the risk that the certificate states, on the sequences it names."""
    trace = made_up(200)
    found = calibrate(trace, WAY, GOAL, price, seed=5)
    assert set(found.run.thresholds) <= set(WAY.exits)
    done = replay(trace, found.run.policy)
    wrong = (done.chosen != trace.chosen[:, -1]).float().split(list(trace.rows))
    losses = np.array([part.mean().item() for part in wrong])
    assert losses[found.parts.test].mean() == pytest.approx(found.found.risk, abs=1e-6)
    assert losses[found.parts.held_out].mean() == pytest.approx(found.held_out.risk, abs=1e-6)
    assert found.tried >= 1000
    again = calibrate(trace, WAY, GOAL, price, seed=5)
    assert again.run == found.run


def test_texts_without_counted_tokens_do_not_count() -> None:
    """They are left out, and the others stay as they are."""
    trace = made_up(5)
    ids = torch.cat([trace.ids, torch.tensor([1], dtype=torch.int32)])
    longer = altered(trace, ids=ids, lengths=(*trace.lengths, 1), rows=(*trace.rows, 0))
    kept = counted(longer)
    assert kept.rows == trace.rows
    assert text_hash(kept) == text_hash(trace) != text_hash(longer)


def test_a_plan_says_the_same_when_read_again(plan: Plan, tmp_path: Path) -> None:
    """Certificate and all; and one without a certificate loads as before."""
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    assert read_plan(path) == plan
    write_plan(path, Plan(run=plan.run))
    assert read_plan(path).certificate is None


def _changes() -> list[Callable[[dict[str, Any]], object]]:
    return [
        lambda p: p["run"]["thresholds"].update({"2": 0.01}),
        lambda p: p["run"].update(max_waiting=99),
        lambda p: p["model"].update(name="another"),
        lambda p: p["certificate"].update(alpha=0.01),
        lambda p: p["certificate"].update(n=10**6),
        lambda p: p["certificate"].update(checksum="0" * 64),
        lambda p: p["certificate"]["held_out"].update(risk=0.0),
        lambda p: p["certificate"]["data"].update(texts="1" * 64),
    ]


@pytest.mark.parametrize("change", _changes())
def test_a_tampered_plan_is_refused(
    change: Callable[[dict[str, Any]], object], plan: Plan, tmp_path: Path
) -> None:
    """Whatever was changed in it, in one line."""
    path = tmp_path / "plan.json"
    changed = plan.model_dump(mode="json")
    change(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="changed after it was certified"):
        read_plan(path)


def test_a_foreign_plan_is_refused(plan: Plan, tiny: offramp.Model) -> None:
    """Of another model, with weights held in another way, or changed in memory."""
    plan.check(tiny.backbone)
    assert plan.model is not None
    assert plan.certificate is not None
    other = plan.model.model_copy(update={"fingerprint": "0" * 16})
    for changed in (
        plan.model_copy(update={"model": other}),
        plan.model_copy(update={"run": Exit(signal="max_prob", thresholds={2: 0.0})}),
    ):
        with pytest.raises(UsageError, match="changed after"):
            changed.check(tiny.backbone)
    with pytest.raises(UsageError, match="made for"):
        Plan(model=other, run=plan.run).check(tiny.backbone)
    found = calibrate(made_up(200), WAY, GOAL, price)
    foreign = found.plan(tiny.id, weights="int4", data={}, seed=0, measured=False)
    with pytest.raises(UsageError, match="certified with int4 weights"):
        foreign.check(tiny.backbone)


def test_the_policys_own_text_replays_to_what_it_did(tiny: offramp.Model, traced: Path) -> None:
    """Drift of a policy that never leaves is none; that of one that does is what its text shows."""
    trace = load_trace(traced)
    prompts = prompts_of(trace, range(12))
    full = Exit(signal="max_prob", thresholds={4: 1.0})
    never = measure(tiny.backbone, prompts, np.zeros(12), full, "divergence")
    assert never.own_text == 0
    assert [ids for ids, _ in write(tiny.backbone, prompts, full)] == [
        part.tolist() for part in trace.ids.split(list(trace.lengths))[:12]
    ]
    leaves = Exit(signal="max_prob", thresholds={2: 0.05})
    own = write(tiny.backbone, prompts, leaves)
    losses = replayed_losses(tiny.backbone, own, leaves, "disagreement")
    for (ids, first), loss in zip(own, losses, strict=True):
        chosen = record(tiny.backbone, [(ids, first)], ()).chosen[:, 0].tolist()
        differs = [a != b for a, b in zip(ids[first:], chosen, strict=True)]
        assert loss == pytest.approx(sum(differs) / len(differs))


def test_a_loss_drifts_by_what_the_full_model_loses_on_the_policys_text(
    tiny: offramp.Model, traced: Path
) -> None:
    """Its loss less that of the depths that wrote it; as certified it would be almost none."""
    prompts = prompts_of(load_trace(traced), range(24))
    never = Exit(signal="max_prob", thresholds={4: 1.0})
    assert measure(tiny.backbone, prompts, np.zeros(24), never, "loss").own_text == 0
    leaves = Exit(signal="max_prob", thresholds={2: 0.3, 4: 0.2})
    own = write(tiny.backbone, prompts, leaves)
    lost, reversed_ = [], []
    for ids, first in own:
        full = record(tiny.backbone, [(ids, first)], (2, 4))
        increase = (full.loss[:, -1] - replay(full, leaves.policy).loss).mean().item()
        lost.append(min(max(increase, 0.0), 1.0))
        reversed_.append(min(max(-increase, 0.0), 1.0))
    found = replayed_losses(tiny.backbone, own, leaves, "loss")
    assert found.tolist() == pytest.approx(lost, abs=1e-5)
    assert found.mean() > 0.1 > 10 * np.mean(reversed_)
    drift = measure(tiny.backbone, prompts, np.full(24, 0.25), leaves, "loss")
    assert (drift.n, drift.full_text) == (24, 0.25)
    assert drift.gap == pytest.approx(np.mean(lost) - 0.25, abs=1e-5)


def test_a_gates_own_text_replays_to_what_it_did(tiny: offramp.Model, tmp_path: Path) -> None:
    """A gate has no column in a trace: its scores are those of the states."""
    ids = [[60 + i, 70, 80 - i] for i in range(6)]
    kept = record(tiny.backbone, [(one * 6, 3) for one in ids], (2, 4), keep_hidden=True)
    fit_gate(kept).save(tmp_path / "gates.safetensors")
    gate = GateFile(file=str(tmp_path / "gates.safetensors"))
    run = Exit(signal="gate", thresholds={2: 0.02, 4: 0.3}, check=gate)
    own = write(tiny.backbone, [(one, 12) for one in ids], run)
    losses = replayed_losses(tiny.backbone, own, run, "disagreement")
    for (text, first), loss in zip(own, losses, strict=True):
        chosen = record(tiny.backbone, [(text, first)], ()).chosen[:, 0].tolist()
        differs = [a != b for a, b in zip(text[first:], chosen, strict=True)]
        assert loss == pytest.approx(sum(differs) / len(differs))
    assert losses.any()


def test_a_certificate_is_of_the_gates_it_was_made_with(
    tiny: offramp.Model, tmp_path: Path
) -> None:
    """Not of what lies at their path later, be it the gates of the same model, fitted anew."""
    path = tmp_path / "gates.safetensors"
    texts = [(ids, 3) for ids in texts_of(tiny.backbone, [6 + i % 5 for i in range(48)])]
    trace = record(tiny.backbone, texts, (2, 4), keep_hidden=True)
    gates = fit_gate(trace)
    gates.save(path)
    way = Way((2, 4), "gate", GateFile(file=str(path)))
    found = calibrate(trace, way, Goal("disagreement", 0.97, 0.5, "betting"), price)
    plan = found.plan(tiny.id, weights="fp32", data={}, seed=0, measured=False)
    assert isinstance(plan.run, Exit)
    assert plan.run.check == GateFile(file=str(path), digest=gates.digest)
    write_plan(tmp_path / "plan.json", plan)
    read_plan(tmp_path / "plan.json").check(tiny.backbone)
    for other in (fit_gate(trace, l2=3.0), replace(gates, biases=gates.biases + 0.01)):
        other.save(path)
        with pytest.raises(OfframpError, match="not hold the gates this plan was made with"):
            read_plan(tmp_path / "plan.json").check(tiny.backbone)
        with pytest.raises(OfframpError, match="not hold the gates"):
            calibrate(trace, replace(way, check=plan.run.check), found.goal, price)
    unnamed = plan.run.model_copy(update={"check": GateFile(file=str(path))})
    Plan(run=unnamed).check(tiny.backbone)
    with pytest.raises(UsageError, match="changed after it was certified"):
        plan.model_copy(update={"run": unnamed}).check(tiny.backbone)


def test_divergence_does_not_drift(tiny: offramp.Model, traced: Path) -> None:
    """The policy's answer differs from the full model's just where the replay says so."""
    trace = load_trace(traced)
    run = Exit(signal="max_prob", thresholds={2: 0.3, 4: 0.1})
    texts = trace.ids.split(list(trace.lengths))
    full = [(part.tolist(), len(part) - rows) for part, rows in zip(texts, trace.rows, strict=True)]
    said = replayed_losses(tiny.backbone, full, run, "divergence")
    own = write(tiny.backbone, prompts_of(trace, range(len(full))), run)
    differs = [a != b for (a, _), (b, _) in zip(own, full, strict=True)]
    assert said.tolist() == [float(one) for one in differs]
    assert 0 < sum(differs) < len(differs)


def test_the_alarm_is_rarely_false_and_surely_true() -> None:
    """At a risk of alpha at most delta of the streams ever alarm; well above it all do."""
    random = np.random.default_rng(0)

    def alarms(rate: float, streams: int, length: int) -> int:
        count = 0
        for _ in range(streams):
            monitor = Monitor(0.1, 0.2)
            for loss in random.random(length) < rate:
                monitor.update(float(loss))
            count += monitor.alarm
        return count

    assert alarms(0.1, 200, 300) <= noise(200, 0.2)
    assert alarms(0.3, 20, 300) == 20


@LAW
@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.01, 0.9))
def test_the_alarm_never_goes_off_by_itself(losses: list[float], alpha: float) -> None:
    """Wealth stays positive, an alarm stays one, losses below alpha never raise it."""
    monitor, rung = Monitor(alpha, 0.1), False
    for loss in losses:
        before = monitor.most
        rung |= monitor.update(loss)
        assert monitor.alarm == rung
        assert math.isfinite(monitor.most)
        assert loss > alpha or monitor.most == before
    with pytest.raises(UsageError, match="a loss lies in 0 to 1"):
        monitor.update(math.nan)
    with pytest.raises(UsageError, match="alpha must lie"):
        Monitor(1.0, 0.1)


def test_an_audit_alarms_where_the_risk_is_above_alpha(
    tiny: offramp.Model, plan: Plan, traced: Path
) -> None:
    """On the policy's own answers: leaving always is caught, leaving never is not."""
    assert plan.certificate is not None
    prompts = prompts_of(load_trace(traced), range(40))
    for threshold, alarm in ((0.0, True), (1.0, False)):
        run = Exit(signal="max_prob", thresholds={2: threshold})
        certified = sealed(Plan(run=run), plan.certificate)
        answers = write(tiny.backbone, prompts, run)
        monitor = audit(tiny.backbone, answers, certified, 1.0)
        assert monitor.seen == 40
        assert monitor.alarm == alarm
    assert 0 < audit(tiny.backbone, answers, certified, 0.3).seen < 40
    assert plan.certificate is not None
    made = plan.certificate.model_copy(update={"risk": "loss"})
    with pytest.raises(UsageError, match="about text that was given"):
        audit(tiny.backbone, answers, sealed(Plan(run=run), made), 1.0)


def test_the_command_line_writes_a_certified_plan(
    shell: Shell,
    checkpoint: Path,
    traced: Path,
    tmp_path: Path,
) -> None:
    """It says what the library says, generate obeys the plan, and --verify counts violations."""
    out = tmp_path / "plan.json"
    common = ["calibrate", checkpoint, "--trace", traced, "--backbone", "hf", "--alpha", 0.97]
    base = [*common, "--delta", 0.5, "--method", "betting"]
    record = shell.json(*base, "--out", out, "--verify", 5)
    plan = read_plan(out)
    assert json.loads(plan.model_dump_json()) == record["plan"]
    made = plan.certificate
    assert made is not None
    assert (made.n, made.alpha, made.delta, made.method) == (24, 0.97, 0.5, "betting")
    assert made.settings > 500  # as many as 60 tokens tell apart
    assert made.drift is not None
    assert made.drift.n == made.held_out.n == 12
    assert made.drift.full_text == pytest.approx(made.held_out.risk)
    assert record["verification"]["violations"] <= record["verification"]["allowed"]
    answer = ["generate", checkpoint, "--backbone", "hf", "--prompt", "hi", "--plan", out]
    assert shell.json(*answer)["plan"] == record["plan"]
    checked = shell.json(*answer, "--audit", 1)["audit"]
    assert (checked["seen"], checked["share"], checked["alarm"]) == (1, 1.0, False)
    shell.refused(2, "sample nothing", *answer, "--audit", 1, "--temperature", 1)
    shell.refused(2, "a share of the answers", *answer, "--audit", 0)
    plain = tmp_path / "plain.json"
    write_plan(plain, Plan(run=plan.run))
    shell.refused(2, "checks a certified plan", *answer[:-1], plain, "--audit", 1)
    in_nats = shell.json(*base, "--risk", "loss")["plan"]["certificate"]
    assert in_nats["drift"]["full_text"] == pytest.approx(in_nats["held_out"]["risk"])
    assert 0 < in_nats["drift"]["own_text"] <= 1
    assert shell.json(*base, "--risk", "error")["plan"]["certificate"]["drift"] is None
    status, shown, _ = shell(*base, "--no-drift")
    assert status == 0
    assert "p-value" in shown
    assert "not measured" in shown


def test_the_command_line_minimises_time_on_this_machine(
    shell: Shell,
    tiny: offramp.Model,
    checkpoint: Path,
    traced: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_timings: Path,
    measured: list[Constants],
) -> None:
    """It is timed where nobody has done so, once; a machine that reads out at once has other plans.

    The plan is the one that the library finds with these constants, and not that of fewest bytes.
    """
    levels = ["--alpha", 0.97, "--delta", 0.5, "--method", "betting"]
    base = ["calibrate", checkpoint, "--trace", traced, "--backbone", "hf", *levels, "--no-drift"]
    trace, goal = load_trace(traced), Goal("disagreement", 0.97, 0.5, "betting")

    def library(constants: Constants | None) -> Certified:
        price = pricing(tiny.backbone.shape, FULL_HEAD, trace, constants)
        found = calibrate(trace, WAY, goal, price)
        return found.run.thresholds, found.found.cost

    def command() -> Certified:
        plan = Plan.model_validate_json(json.dumps(shell.json(*base)["plan"]))
        assert isinstance(plan.run, Exit)
        assert plan.certificate is not None
        assert plan.certificate.measured
        return plan.run.thresholds, plan.certificate.cost

    quick = taking(tiny.backbone, head=0.01)
    assert not list(own_timings.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure", lambda *_args, **_told: quick)
        assert command() == library(quick) != library(None)
    assert command() == library(quick)  # kept
    assert not measured
    [file] = own_timings.iterdir()
    file.unlink()
    assert command() == library(taking(tiny.backbone)) != library(quick)
    assert len(measured) == 1


@pytest.mark.parametrize("exits", ["2,4", "4,6", "6"])
def test_a_plan_with_a_short_head_is_certified_for_what_that_chooses(
    shell: Shell, checkpoint: Path, tmp_path: Path, exits: str
) -> None:
    """Its trace, its certificate, its drift and its audit are all of the tokens it writes.

    With a short head the last of the 6 layers may be an exit, too.
    """
    prompts, out, trace = (tmp_path / name for name in ("p.txt", "plan.json", "t.safetensors"))
    prompts.write_text("".join(f"tell me of {i}\n" for i in range(24)))
    base = ["calibrate", checkpoint, "--backbone", "hf", "--prompts", prompts, "--exits", exits]
    more = ["--alpha", 0.98, "--delta", 0.6, "--method", "betting", "--max-new-tokens", 6]
    short = ("--check", "full", "--head", "shortlist:99")  # a full check looks at what chooses
    record = shell.json(*base, *more, *short, "--out", out)
    run = read_plan(out).run
    assert isinstance(run, Exit)
    assert str(run.head) == str(run.check) == "shortlist:99"
    assert record["plan"]["certificate"]["drift"] is not None
    said = ["generate", checkpoint, "--backbone", "hf", "--prompts", prompts, "--plan", out]
    answers = shell.json(*said, "--max-new-tokens", 6, "--audit", 1)
    assert answers["audit"]["seen"] == 24
    record_only = ("trace", checkpoint, "--backbone", "hf", "--prompts", prompts, "--out", trace)
    shell.json(*record_only, "--plan", out)
    assert load_trace(trace).head == "shortlist:99"
    shell.json(*record_only, "--head", "shortlist:99", "--max-new-tokens", 6)
    assert load_trace(trace).exits == (1, 2, 3, 4, 5, 6)
    shell.json(*record_only, "--exits", exits, "--head", "shortlist:99", "--max-new-tokens", 6)
    once = shell.json(
        "calibrate", checkpoint, "--backbone", "hf", "--trace", trace, *short, *more[:-2]
    )
    assert once["plan"]["run"] == record["plan"]["run"]
    shell.refused(2, "leave out --head", *record_only, "--plan", out, "--head", "shortlist:99")


def test_bad_input_ends_in_one_line(
    shell: Shell,
    checkpoint: Path,
    traced: Path,
    tmp_path: Path,
) -> None:
    """Status 2 for wrong usage, 1 for what cannot be certified, each with its remedy."""
    base = ["calibrate", checkpoint, "--backbone", "hf"]
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\nthree\n")
    for level in ("0", "1", "nan", "-1"):
        shell.refused(2, "alpha must lie", *base, "--prompts", few, "--alpha", level)
        shell.refused(2, "delta must lie", *base, "--prompts", few, "--delta", level)
    shell.refused(2, "--prompts FILE, or --trace FILE", *base)
    shell.refused(1, "more sequences would be needed", *base, "--prompts", few, "--exits", "2")
    shell.refused(2, "outside 1 to 5", *base, "--trace", traced, "--exits", "2,9")
    read = [*base, "--trace", traced]
    shell.refused(1, "more sequences would be needed", *read, "--alpha", 0.01)
    shell.refused(2, "lacks [3]", *read, "--exits", "3")
    shell.refused(2, "the same for every token", *read, "--signal", "fixed")
    shell.refused(2, "unknown signal", *read, "--signal", "nonsense")
    shell.refused(2, "seen by the check full", *read, "--check", "shortlist:9")
    shell.refused(2, "chose by the head full", *read, "--check", "full", "--head", "shortlist:9")
    shell.refused(2, "two short heads", *read, "--check", "shortlist:8", "--head", "shortlist:9")
    shell.refused(2, "what it loses in nats", *read, "--head", "shortlist:9", "--risk", "loss")
    shell.refused(2, "0 or 1 per sequence", *read, "--method", "binomial", "--alpha", 0.5)
    trace, wrong = load_trace(traced), tmp_path / "wrong.safetensors"
    chosen = torch.cat([trace.chosen[:, -1:] + 1] * 2 + [trace.chosen[:, -1:]], 1)
    coins = torch.arange(2 * len(chosen)).reshape(-1, 2) % 3 / 10  # half or so leave, at the least
    altered(trace, chosen=chosen, scores={"max_prob": coins}).save(wrong)
    for file, words in ((traced, "a plan that pays"), (wrong, "disagreement at most 0.1 with n ")):
        ended = shell(*base, "--trace", file, "--alpha", 0.1, "--delta", 0.5)
        assert ended[:2] == (1, "")
        assert ended[2].split("\r")[-1].startswith(f"offramp: cannot certify {words}")
    other = tmp_path / "other.safetensors"
    altered(load_trace(traced), fingerprint="0" * 16).save(other)
    shell.refused(2, "trace of another model", *base, "--trace", other)


def test_text_the_model_was_tuned_on_draws_a_warning(
    shell: Shell,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Loudly, on stderr, where the card names the very file."""
    import hashlib

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"number {i}" for i in range(20)))
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
    tuned = tmp_path / "tuned"
    shutil.copytree(checkpoint, tuned)
    fingerprint = offramp.load(str(checkpoint), backbone="hf").backbone.fingerprint
    for known in (digest, "0" * 64):
        card = {
            "base": {"name": "tiny", "fingerprint": fingerprint},
            "exits": [2, 4],
            "recipe": {"name": "lite"},
            "data": {"files": {"train.txt": known}, "texts": 1, "tokens": 1},
        }
        (tuned / CARD).write_text(json.dumps(card))
        _, _, said = shell(
            *("calibrate", tuned, "--backbone", "hf", "--prompts", prompts, "--raw"),
            *("--max-new-tokens", 3, "--alpha", 0.9, "--delta", 0.5, "--no-drift"),
        )
        assert ("WARNING: this model was tuned on prompts.txt" in said) == (known == digest)


def test_prompts_the_model_was_tuned_on_draw_a_warning(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """Some of them, in another order or form, or in a trace; not others, nor with an early card."""
    asked = [f"Number {i}, please" for i in range(40)]
    tuned, trace = tmp_path / "tuned", tmp_path / "t.safetensors"
    shutil.copytree(checkpoint, tuned)

    def write_the_card(prompts: str | None) -> None:
        fingerprint = offramp.load(str(checkpoint), backbone="hf").backbone.fingerprint
        data = Data(files={"train.json": "0" * 64}, texts=40, tokens=1, prompts=prompts)
        base = Base(name="tiny", fingerprint=fingerprint)
        write_card(tuned, Card(base=base, exits=(2, 4), recipe=Recipe(name="lite"), data=data))

    def said(*source: object) -> str:
        few = ("--max-new-tokens", 3) if source[0] == "--prompts" else ()
        loose = ("--alpha", 0.9, "--delta", 0.5, "--no-drift")
        return shell("calibrate", tuned, "--backbone", "hf", *source, *few, *loose)[2]

    def written(name: str, prompts: Sequence[str]) -> Path:
        rows = [json.dumps({"instruction": one}) for one in prompts]
        (tmp_path / name).write_text("\n".join(rows if name.endswith(".jsonl") else prompts))
        return tmp_path / name

    write_the_card(sketched(keys(asked)))
    part = written("part.txt", asked[7:27])
    shuffled = written("shuffled.txt", asked[::-1])
    other_form = written("rows.jsonl", asked[:20])
    mixed = written("mixed.txt", [*asked[:1], *(f"Letter {i}" for i in range(19))])
    new = written("new.txt", [f"Letter {i}" for i in range(20)])
    for file, found in ((part, 20), (shuffled, 40), (other_form, 20), (mixed, 1)):
        told = found if file != mixed else 20
        words = f"WARNING: this model was tuned on {found} of the {told} prompts that can be comp"
        assert words in said("--prompts", file)
        ways = (("--given",), ("--max-new-tokens", 3)) if file == mixed else (("--raw",),)
        for way in ways:
            shell.json("trace", tuned, "--backbone", "hf", "--prompts", file, *way, "--out", trace)
            assert words in said("--trace", trace)
    assert "WARNING" not in said("--prompts", new)
    write_the_card(None)
    assert "WARNING" not in said("--prompts", part)
    assert "WARNING" not in said("--trace", trace)


def test_verification_is_of_the_whole_procedure() -> None:
    """It certifies, and holds, on a made-up trace; too few sequences are refused there, too."""
    done = verification(made_up(200), WAY, GOAL, price, repeats=10)
    assert done.repeats == 10
    assert done.certified > 0
    assert done.holds
    with pytest.raises(OfframpError, match="cannot certify with 10"):
        verification(made_up(10), WAY, GOAL, price, repeats=10)


def test_prices_are_those_of_the_cost_model(tiny: offramp.Model) -> None:
    """Weights read, where no time was measured; a cheap check costs its part."""
    from offramp.checks import Shortlist
    from offramp.cost import check_in_heads, exit_ratio

    shape, trace = tiny.backbone.shape, made_up(5)
    full = pricing(shape, FULL_HEAD, trace, None)((2, 4), (0.5, 0.2))
    assert full == exit_ratio(shape, (2, 4), (0.5, 0.2))
    short = Shortlist(size=9)
    cheap = pricing(shape, short, trace, None)((2, 4), (0.5, 0.2))
    share = check_in_heads(shape, short.weights(shape))
    assert cheap == exit_ratio(shape, (2, 4), (0.5, 0.2), check=share, choose=1.0) < full
    chosen = pricing(shape, short, trace, None, short)((2, 4), (0.5, 0.2))
    assert chosen == exit_ratio(shape, (2, 4), (0.5, 0.2), check=share) < cheap
