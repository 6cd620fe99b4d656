"""What a fitted classifier does on texts it has not seen: per exit, and as a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.adainfer.labels import labels
from offramp.classifier import Classified, Classifier, Label
from offramp.errors import UsageError
from offramp.gate import Gate, GateWeights
from offramp.probe import Probe
from offramp.trace import Replay, Trace, replay

GATE_THRESHOLD = 0.5
"""A gate's own word, where a classifier's is 0."""


@dataclass(frozen=True)
class ExitFigures:
    """One exit."""

    depth: int
    right: float
    """Share of rows where it is right to leave, by the classifier's label."""
    accuracy: float
    """Share of rows where the classifier says so if, and only if, it is; all rows asked."""
    leaves: float
    """Share of rows that leave here, none earlier."""


@dataclass(frozen=True)
class Judgement:
    """A classifier as a policy at its own word, on texts it has not seen."""

    texts: int
    tokens: int
    mean_depth: float
    agreement: float
    """Share of tokens that are the full model's."""
    gold: float
    """Share of tokens that are the text's own."""
    full_gold: float
    """The same of the full model."""
    exits: tuple[ExitFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, ready for JSON."""
        return asdict(self)


Fit = Callable[[Trace], Classifier | GateWeights]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a classifier said of some texts, and the replay of it."""

    exits: tuple[int, ...]
    says: Tensor
    """``[T, E]`` bool: whether to leave."""
    done: Replay


def policy_of(fitted: Classifier | GateWeights) -> Classified | Gate:
    """Return the policy that follows a classifier's or a gate's own word at every exit."""
    if isinstance(fitted, GateWeights):
        return Gate(fitted, tuple((depth, GATE_THRESHOLD) for depth in fitted.exits))
    return Classified(fitted, tuple((depth, 0.0) for depth in fitted.facts.exits))


def judge(
    fitted: Classifier | GateWeights, trace: Trace, *, label: Label, exit_prompt: bool = False
) -> Judgement:
    """Return what a classifier does on a trace: of other texts, or of another task.

    Raises:
        UsageError: the trace is of another model, of another check, or lacks exits.
    """
    _must_go_together(fitted, trace)
    return _summed(trace, label, [(range(len(trace.lengths)), _seen(fitted, trace, exit_prompt))])


def cross_validate(
    fit: Fit, trace: Trace, *, label: Label, folds: int = 5, exit_prompt: bool = False
) -> Judgement:
    """Return what classifiers do on the texts that each was not fitted to.

    Text i belongs to fold ``i % folds``. As the tokens of a text are alike, texts are held out
    whole.

    Args:
        fit: makes a classifier of a trace.
        trace: all texts.
        label: when it is right to leave.
        folds: how many classifiers to fit.
        exit_prompt: as in :func:`offramp.trace.replay`.

    Raises:
        UsageError: fewer than 2 folds, fewer texts than folds, or what ``fit`` raises.
    """
    count = len(trace.lengths)
    if not 2 <= folds <= count:
        raise UsageError(
            f"{folds} folds of {count} texts: cross-validation takes 2 folds or more, and a text "
            "for each"
        )
    parts = []
    for fold in range(folds):
        held = range(fold, count, folds)
        fitted = fit(trace.part([i for i in range(count) if i % folds != fold]))
        parts.append((held, _seen(fitted, trace.part(held), exit_prompt)))
    return _summed(trace, label, parts)


def _seen(fitted: Classifier | GateWeights, trace: Trace, exit_prompt: bool) -> _Seen:
    policy = policy_of(fitted)
    done = replay(trace, policy, exit_prompt=exit_prompt)
    says, probe = [], None
    for depth in policy.exits:
        k = trace.exits.index(depth)
        hidden = None if trace.hidden is None else trace.hidden[:, k]
        known = {name: values[:, k] for name, values in trace.scores.items()}
        probe = Probe(depth, trace.num_layers, hidden, None, probe, known)
        says.append(policy.leave(probe))
    return _Seen(policy.exits, torch.stack(says, 1), done)


def _summed(trace: Trace, label: Label, parts: Sequence[tuple[Sequence[int], _Seen]]) -> Judgement:
    """Return the figures of all parts together, each of its own texts."""
    held = [(trace.part(texts), seen) for texts, seen in parts]
    exits = held[0][1].exits
    columns = [trace.exits.index(depth) for depth in exits]
    right = torch.cat([labels(own, label)[:, columns] for own, _ in held])
    says = torch.cat([seen.says for _, seen in held])
    depths = torch.cat([seen.done.depths for _, seen in held])
    chosen = torch.cat([seen.done.chosen for _, seen in held])
    final = torch.cat([own.chosen[:, -1] for own, _ in held])
    gold = torch.cat([own.targets for own, _ in held])
    return Judgement(
        texts=sum(len(texts) for texts, _ in parts),
        tokens=len(chosen),
        mean_depth=depths.double().mean().item(),
        agreement=_share(chosen == final),
        gold=_share(chosen == gold),
        full_gold=_share(final == gold),
        exits=tuple(
            ExitFigures(
                depth,
                right=_share(right[:, k]),
                accuracy=_share(says[:, k] == right[:, k]),
                leaves=_share(depths == depth),
            )
            for k, depth in enumerate(exits)
        ),
    )


def _share(rows: Tensor) -> float:
    return rows.double().mean().item()


def _must_go_together(fitted: Classifier | GateWeights, trace: Trace) -> None:
    """Refuse a trace of another model; exits and checks are the replay's to refuse."""
    own = fitted.fingerprint if isinstance(fitted, GateWeights) else fitted.facts.fingerprint
    if own != trace.fingerprint:
        raise UsageError(
            f"the trace is of a model of fingerprint {trace.fingerprint}, and the classifier of "
            f"one of {own}"
        )
