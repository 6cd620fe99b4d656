"""How a certificate is shown: a table, what its risk means, and what verification found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp.cli.output import table

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.calibrate.run import Calibration
    from offramp.calibrate.verify import Verification
    from offramp.certificate import Drift
    from offramp.plan import Plan


def show(
    plan: Plan,
    found: Calibration,
    checked: Verification | None,
    console: Console,
) -> None:
    """Print what was certified, beside what held-out text and the policy's own text say."""
    from offramp.calibrate.risks import RISKS

    made = plan.certificate
    assert made is not None
    drift = made.drift
    pairs = ", ".join(f"{depth}: {value:.4g}" for depth, value in found.run.thresholds.items())
    bound = "bound on the mean" if made.delta is None else "p-value"
    rows = [
        ("risk", f"{made.risk}"),
        ("alpha", f"{made.alpha:g}"),
        ("delta", "none" if made.delta is None else f"{made.delta:g}"),
        ("method", made.method),
        ("settings replayed", f"{made.settings}"),
        (f"thresholds on {found.run.signal}", pairs),
        ("sequences tested", f"{made.n}"),
        ("risk on them", f"{found.found.risk:.4f}"),
        (bound, f"{made.value:.4g}"),
        ("predicted time" if made.measured else "predicted weights read", f"{made.cost:.1%}"),
        (f"risk on {made.held_out.n} held out", f"{made.held_out.risk:.4f}"),
        *_drift_rows(drift),
    ]
    table("certificate", ("", ""), rows, console)
    console.print(f"{made.risk}: {RISKS[made.risk].says}.")
    if made.held_out.risk > made.alpha:
        console.print("The held-out risk is above alpha: be wary of this certificate.")
    if checked is not None:
        console.print(_said(checked))


def _drift_rows(drift: Drift | None) -> list[tuple[str, str]]:
    if drift is None:
        return [("drift", "not measured")]
    return [
        (f"risk on the policy's own text ({drift.n})", f"{drift.own_text:.4f}"),
        ("drift against the full model's text", f"{drift.gap:+.4f}"),
    ]


def _said(checked: Verification) -> str:
    """Say what the repeats showed."""
    verdict = "as good as they say" if checked.holds else "NOT as good as they say"
    return (
        f"Verified on {checked.repeats} draws: {checked.certified} certified, {checked.violations} "
        f"violated alpha (up to {checked.allowed} are chance): certificates are {verdict}. Mean "
        f"risk {checked.mean_risk:.4f}, mean cost {checked.mean_cost:.1%}."
    )
