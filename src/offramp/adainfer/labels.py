"""What a classifier learns from: features and labels of a trace; traces joined, and parted by text.

Pure functions of traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from offramp.classifier import Label
from offramp.errors import UsageError
from offramp.features import DEPTH, check_features, features
from offramp.probe import Probe
from offramp.trace import Trace


def labels(trace: Trace, label: Label) -> Tensor:
    """Return ``[T, E]`` bool: whether it is right to leave a row at each exit.

    ``final``: the exit chooses what the last layer does (AdaInfer, and the default). ``gold``: it
    chooses the text's own next token. ``stable``: it chooses what the last layer does, and so does
    every later exit of the trace.
    """
    if label == "gold":
        return trace.chosen[:, :-1] == trace.targets[:, None]
    if label == "final":
        return trace.agrees
    return trace.agrees.int().flip(1).cummin(1).values.flip(1).bool()


def table(trace: Trace, names: tuple[str, ...]) -> Tensor:
    """Return the features of every row at every exit, ``[T, E, F]`` fp64.

    Raises:
        UsageError: a name is no feature, the trace has no such score, or one is not finite.
    """
    check_features(names)
    missing = [name for name in names if name != DEPTH and name not in trace.scores]
    if missing or not trace.exits:
        raise UsageError(
            f"the trace has no {missing[0]}; record it again"
            if missing
            else "the trace has no exit to fit a classifier for"
        )
    columns = []
    for k, depth in enumerate(trace.exits):
        known = {name: values[:, k] for name, values in trace.scores.items()}
        columns.append(features(Probe(depth, trace.num_layers, None, None, scores=known), names))
    found = torch.stack(columns, 1)
    for f, name in enumerate(names):
        if not found[..., f].isfinite().all():
            raise UsageError(
                f"the trace's {name} is not a finite number everywhere: nothing can be fitted to "
                "it; leave it out, or record the trace again"
            )
    return found


def joined(traces: Sequence[Trace]) -> Trace:
    """Return one trace of the texts of several, without their hidden states unless all have them.

    Raises:
        UsageError: none, or they are of different models, exits or checks.
    """
    if not traces:
        raise UsageError("there is no trace to fit on")
    first = traces[0]
    for other in traces[1:]:
        for what in ("fingerprint", "exits", "check", "head"):
            if vars(other)[what] != vars(first)[what]:
                raise UsageError(
                    f"the traces differ in their {what}: {vars(first)[what]} and "
                    f"{vars(other)[what]}; record them alike"
                )
    names = sorted(set.intersection(*(set(trace.scores) for trace in traces)))
    hidden = [trace.hidden for trace in traces if trace.hidden is not None]
    asked = [trace.prompts for trace in traces if trace.prompts is not None]
    return replace(
        first,
        ids=torch.cat([trace.ids for trace in traces]),
        lengths=tuple(n for trace in traces for n in trace.lengths),
        rows=tuple(n for trace in traces for n in trace.rows),
        chosen=torch.cat([trace.chosen for trace in traces]),
        loss=torch.cat([trace.loss for trace in traces]),
        scores={name: torch.cat([trace.scores[name] for trace in traces]) for name in names},
        hidden=torch.cat(hidden) if len(hidden) == len(traces) else None,
        prompts=tuple(chain(*asked)) if len(asked) == len(traces) else None,
    )
