"""Re-checks a share of a certified plan's own answers at full depth, and alarms by betting."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from offramp.backbone import Backbone
from offramp.calibrate.drift import Monitor, replayed_losses
from offramp.calibrate.risks import RISKS
from offramp.certificate import Certificate
from offramp.errors import UsageError
from offramp.plan import Plan
from offramp.runs import Exit

_CONFORMAL_DELTA = 0.05
"""Of an alarm under a certificate without a delta."""


def audited(plan: Plan, share: float) -> tuple[Exit, Certificate]:
    """Return the policy and the certificate that an audit is about.

    Raises:
        UsageError: a plan without a certificate, or whose risk is about given text; or a share
            outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UsageError(f"--audit is a share of the answers, above 0 and up to 1, not {share}")
    if not isinstance(plan.run, Exit) or plan.certificate is None:
        raise UsageError("--audit checks a certified plan in use; make one with offramp calibrate")
    if not RISKS[plan.certificate.risk].same_on_own_text:
        raise UsageError(
            f"--audit re-checks the policy's own text, and {plan.certificate.risk} is about text "
            "that was given; certify disagreement or divergence"
        )
    return plan.run, plan.certificate


def audit(
    backbone: Backbone,
    answers: Iterable[tuple[Sequence[int], int]],
    plan: Plan,
    share: float,
    *,
    eos: Collection[int] = (),
    seed: int = 0,
) -> Monitor:
    """Return the monitor of a plan's risk after re-checking some of its greedy answers.

    Each re-check is one full pass over a text: what the full model would have said at each of its
    tokens, and what that is to the policy's loss. Whole sequences are drawn, as in the certificate.

    Args:
        backbone: the model.
        answers: (token ids with the prompt, prompt tokens), in the order they were written.
        plan: a certified plan, which wrote them.
        share: of the answers that is re-checked, each by its own coin.
        eos: tokens that end a text, which a short head can choose as well.
        seed: of the coins.

    Raises:
        UsageError: no certificate, or a share outside (0, 1].
    """
    run, made = audited(plan, share)
    monitor, coin = Monitor(made.alpha, made.delta or _CONFORMAL_DELTA), random.Random(seed)
    for ids, given in answers:
        if coin.random() < share:
            [loss] = replayed_losses(backbone, [(ids, given)], run, made.risk, eos).tolist()
            monitor.update(loss)
    return monitor
