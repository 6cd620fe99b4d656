"""``offramp calibrate``: exit thresholds with a certificate, or how much more text it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.tracing import own_answers, timed, traced
from offramp.errors import OfframpError, UsageError

if TYPE_CHECKING:
    from offramp.calibrate.certify import Goal
    from offramp.calibrate.run import Calibration, Way
    from offramp.calibrate.settings import Price
    from offramp.calibrate.verify import Verification
    from offramp.card import Card
    from offramp.certificate import Drift
    from offramp.checks import Check, Head
    from offramp.model import Model
    from offramp.text import Prompt
    from offramp.trace import Trace


class RiskName(StrEnum):
    """What is certified."""

    disagreement = "disagreement"
    divergence = "divergence"
    loss = "loss"
    error = "error"


class Method(StrEnum):
    """By which bound."""

    hoeffding_bentkus = "hoeffding-bentkus"
    binomial = "binomial"
    betting = "betting"
    conformal = "conformal"


def calibrate(
    model: o.ModelName = None,
    prompts: o.PromptFile = None,
    limit: o.Limit = None,
    trace: Annotated[
        Path | None, typer.Option(help="A trace that 'offramp trace --out' wrote; no --prompts.")
    ] = None,
    risk: Annotated[
        RiskName,
        typer.Option(
            help="Per sequence: share of tokens that differ from the last layer's, whether any "
            "does, nats per token lost, or whether the given answer is missed."
        ),
    ] = RiskName.disagreement,
    alpha: Annotated[float, typer.Option(help="The risk allowed, in (0, 1).")] = 0.1,
    delta: Annotated[
        float, typer.Option(help="How improbable a risk above alpha shall be, in (0, 1).")
    ] = 0.1,
    method: Annotated[
        Method, typer.Option(help="The bound; conformal bounds the expected risk, without delta.")
    ] = Method.hoeffding_bentkus,
    signal: Annotated[str, typer.Option(help="What a token's threshold is on.")] = "max_prob",
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="DEPTH,...",
            help="Up to 6 exits; the trace's or the tuned model's. With --head the last layer may "
            "be one: who leaves there is spared the full head.",
        ),
    ] = None,
    check: o.CheckText = None,
    head: o.HeadText = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Tokens of a text that may wait for the deeper layers.")
    ] = 16,
    exit_prompt: Annotated[
        bool, typer.Option("--exit-prompt", help="The prompt may leave, too: one-token answers.")
    ] = False,
    max_new_tokens: o.MaxNewTokens = 32,
    drift: Annotated[
        bool, typer.Option(help="Measure what the policy's own text loses, on held-out prompts.")
    ] = True,
    verify: Annotated[
        int, typer.Option(min=0, help="Repeat the whole procedure N times, count violations.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the split into parts.")] = 0,
    raw: o.Raw = False,
    batch_size: o.BatchSize = 8,
    backbone: o.BackboneOption = o.BackboneName.auto,
    weights: o.WeightFormat = o.Weights.fp32,
    device: o.DeviceName = "cpu",
    trust_remote_code: o.Remote = False,
    json: o.Json = False,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes (plan.json).")] = None,
) -> None:
    """Choose thresholds for all exits jointly, and certify what leaving there risks.

    The model answers the prompts greedily at full depth; one trace of that text judges more than a
    thousand joint settings. The plan is the one predicted to be fastest on this machine, which is
    timed once, whose risk is at most alpha, unless something happened in the draw of the text that
    has at most probability delta. Sequences are the unit.
    'cannot certify' ends with status 1 and says how many more sequences would be needed.

    [bold]offramp calibrate --prompts mine.jsonl --exits 24,27 --alpha 0.1 --out plan.json[/bold]
    [bold]offramp calibrate --prompts mine.jsonl --exits 30 --head shortlist:12288[/bold]
    """
    wanted = _given(prompts, trace, limit)
    depths = o.parse_depths(exits)
    _must_be_installed()
    from rich.console import Console

    from offramp import load
    from offramp.calibrate.certify import Goal, must_be_enough
    from offramp.calibrate.run import Way, calibrate, exits_of
    from offramp.calibrate.settings import pricing
    from offramp.calibrate.texts import counted
    from offramp.checks import parse_check, parse_head
    from offramp.cli.certificate import show
    from offramp.cli.output import environment, finish
    from offramp.plan import write_plan
    from offramp.sketch import keys

    goal = Goal(risk.value, alpha, delta, method.value)
    chosen_by = parse_head(head or "full")
    looked_at = parse_check(check or "full")
    _must_go_together(goal, looked_at, chosen_by)
    if looked_at.kind == "full":  # what chooses is what a full check looks at
        looked_at = chosen_by
    if wanted:
        must_be_enough(len(wanted), goal)
    loaded = load(
        model,
        backbone=backbone.value,
        weights=weights.value,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    signal = "gate" if looked_at.kind == "gate" else signal
    _must_fit(loaded, depths, signal, looked_at, chosen_by)
    chosen_by.must_fit(loaded.backbone.shape)
    if trace is None:
        depths = depths or (loaded.card.exits if loaded.card else None)
        if depths is None:
            raise UsageError("name the exits to set with --exits; 'offramp inspect' suggests some")
        texts = own_answers(
            loaded, wanted, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        hidden = looked_at.kind == "gate"
        recorded = traced(
            loaded, texts, depths, keep_hidden=hidden, check=looked_at, head=chosen_by
        )
        recorded = dataclasses.replace(recorded, prompts=keys(wanted))
    else:
        recorded = _read(trace, loaded)
    recorded = counted(recorded)
    data = _hashes(prompts, recorded)
    _warn(data, recorded, loaded.card)
    way = Way(exits_of(recorded, depths), signal, looked_at, chosen_by, max_waiting, exit_prompt)
    must_be_enough(len(recorded.rows), goal)
    way.scores(recorded)  # what the trace lacks is refused before the machine is timed
    price = pricing(loaded.backbone.shape, looked_at, recorded, timed(loaded), chosen_by)
    with _bar("settings") as told:
        found = calibrate(recorded, way, goal, price, seed=seed, progress=told)
    checked = _verified(recorded, way, goal, price, verify, seed) if verify else None
    _must_pay(found)
    plan = found.plan(
        loaded.id,
        weights=loaded.backbone.weights,
        data=data,
        seed=seed,
        measured=True,
        drift=_drift(loaded, recorded, found, batch_size) if drift else None,
    )
    if out is not None:
        write_plan(out, plan)
    if not json:
        show(plan, found, checked, Console(highlight=False))
        if out is not None:
            print(f"Written to {out}.")
    record = {
        "model": loaded.name,
        "plan": plan.model_dump(mode="json"),
        "seed": seed,
        "backbone": loaded.backbone.name,
        "weights": loaded.backbone.weights,
        **environment(),
        "sequences": len(recorded.rows),
        "tokens": len(recorded.chosen),
        "tested_risk": found.found.risk,
        "certified_settings": found.found.tested,
        "verification": None if checked is None else dataclasses.asdict(checked),
    }
    finish(record, as_json=json, out=None)


def _given(prompts: Path | None, trace: Path | None, limit: int | None) -> list[Prompt]:
    if (prompts is None) == (trace is None):
        raise UsageError("give the text to calibrate on: --prompts FILE, or --trace FILE")
    return o.read_prompt_options(None, prompts, limit)


def _must_be_installed() -> None:
    if find_spec("scipy") is None:
        raise OfframpError("calibration needs scipy: pip install 'offramp[calibrate]'")


def _must_go_together(goal: Goal, check: Check, head: Head) -> None:
    """Refuse a risk that a short head leaves unknown, and two short heads."""
    if head.kind == "full":
        return
    if goal.risk == "loss":
        raise UsageError(
            f"{head} gives most tokens no probability, so what it loses in nats is not known: "
            "certify disagreement, divergence or error, or leave out --head"
        )
    if check != head and check.kind not in ("full", "gate"):
        raise UsageError(f"--check {check} beside --head {head} would be two short heads: name one")


def _must_fit(
    model: Model, depths: tuple[int, ...] | None, signal: str, check: Check, head: Head
) -> None:
    """Refuse what this model lacks before it answers anything."""
    from offramp.policy import check_exits
    from offramp.signals import find

    shape = model.backbone.shape
    check_exits(depths or (), shape.num_layers, short_head=head.kind != "full")
    check.must_fit(shape)
    if signal != "gate":
        find(signal)


def _read(path: Path, model: Model) -> Trace:
    """Return a trace from a file, if it is of this model."""
    from offramp.trace import load_trace

    trace = load_trace(path)
    if trace.fingerprint != model.backbone.fingerprint:
        raise UsageError(
            f"{path} is a trace of another model (fingerprint {trace.fingerprint}, this one has "
            f"{model.backbone.fingerprint}); record it again with 'offramp trace --out'"
        )
    return trace


def _hashes(prompts: Path | None, trace: Trace) -> dict[str, str]:
    """Return the SHA-256 of the texts, and of the file that the prompts came from."""
    from offramp.calibrate.texts import text_hash

    hashes = {"texts": text_hash(trace)}
    if prompts is not None:
        hashes[prompts.name] = hashlib.sha256(prompts.read_bytes()).hexdigest()
    return hashes


def _warn(data: dict[str, str], trace: Trace, card: Card | None) -> None:
    """Say loudly on stderr that the model was tuned on text that it is calibrated on."""
    from offramp.calibrate.texts import overlaps

    if card is None or card.data is None:
        return
    seen = overlaps(data, trace, card.data)
    if seen:
        print(
            f"offramp: WARNING: this model was tuned on {seen}, the very text it is calibrated on: "
            "its exits know that text, so the certificate will NOT hold for other text; calibrate "
            "on text that was kept apart",
            file=sys.stderr,
        )


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], object]]:
    """Give a function that shows (done, of all) as a bar; none before it is called."""
    from tqdm import tqdm

    bars: list[Any] = []

    def told(done: int, count: int) -> None:
        if not bars:
            bars.append(tqdm(total=count, desc=name, unit="setting", leave=False))
        bars[0].update(done - bars[0].n)

    try:
        yield told
    finally:
        for bar in bars:
            bar.close()


def _verified(
    trace: Trace, way: Way, goal: Goal, price: Price, repeats: int, seed: int
) -> Verification:
    from tqdm import tqdm

    from offramp.calibrate.run import verification

    with tqdm(range(repeats), desc="verify", unit="draw", leave=False) as bar:
        return verification(trace, way, goal, price, repeats=repeats, seed=seed, progress=bar)


def _must_pay(found: Calibration) -> None:
    """Full depth has no risk: a plan that is predicted to take as long is none."""
    if found.found.cost >= 1:
        goal = found.goal
        raise OfframpError(
            f"cannot certify a plan that pays: the cheapest found with {goal.risk} at most "
            f"{goal.alpha} is predicted to cost {found.found.cost:.0%} of full depth; a cheaper "
            "check, other exits or a tuned model would change that"
        )


def _drift(model: Model, trace: Trace, found: Calibration, batch_size: int) -> Drift | None:
    """Measure what the policy's own text loses on the held-out prompts, under a progress bar."""
    from offramp.calibrate.drift import measure, prompts_of
    from offramp.calibrate.risks import RISKS

    if RISKS[found.goal.risk].own is None:
        return None
    held_out = found.parts.held_out
    from tqdm import tqdm

    with tqdm(total=len(held_out), desc="drift", unit="prompt", leave=False) as bar:
        return measure(
            model.backbone,
            prompts_of(trace, held_out.tolist()),
            found.replays.losses[found.goal.risk][found.found.setting][held_out],
            found.run,
            found.goal.risk,
            eos=model.eos,
            batch_size=batch_size,
            progress=bar.update,
        )
