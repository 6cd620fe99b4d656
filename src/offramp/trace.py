"""One full pass over texts, with everything a policy could have seen; replays of policies on it.

Because waiting tokens get exact keys and values, what a policy would have done on a text is a
function of one full pass over it: thousands of policies are judged by table look-ups, and each
replay gives the very depths of the real loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Span, Text
from offramp.decode import MAX_WAITING
from offramp.errors import OfframpError, UsageError
from offramp.files import write_whole
from offramp.policy import Policy, Threshold, check_exits
from offramp.probe import Probe, Readout
from offramp.signals import find, registry, score

_FORMAT = 1
_BUDGET = 2**26
"""Logits kept at once while recording, in elements (256 MiB in fp32)."""


@dataclass(frozen=True)
class Trace:
    """What every exit would have said of every token of some texts.

    Rows are the counted positions of all texts, one after the other: row t stands for the choice of
    the token after one position. E exits, the last layer apart.
    """

    exits: tuple[int, ...]
    num_layers: int
    fingerprint: str
    ids: Tensor
    """``[sum of lengths]`` int32: the texts."""
    lengths: tuple[int, ...]
    """Tokens of each text."""
    rows: tuple[int, ...]
    """Counted rows of each text: its last ``rows`` positions but one."""
    chosen: Tensor
    """``[T, E + 1]`` int32: the most probable token at each exit and at the last layer."""
    loss: Tensor
    """``[T, E + 1]`` fp32: cross-entropy of the text's own next token, in nats."""
    scores: dict[str, Tensor]
    """Every registered signal, ``[T, E]`` fp32."""
    hidden: Tensor | None = None
    """``[T, E + 1, D]``: the states, where they were kept."""

    @cached_property
    def agrees(self) -> Tensor:
        """Return ``[T, E]`` bool: the exit's choice is the last layer's."""
        return self.chosen[:, :-1] == self.chosen[:, -1:]

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        facts = {
            "format": _FORMAT,
            "exits": self.exits,
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
            "lengths": self.lengths,
            "rows": self.rows,
        }
        tensors = {"ids": self.ids, "chosen": self.chosen, "loss": self.loss}
        tensors |= {f"scores.{name}": column for name, column in self.scores.items()}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        metadata = {"offramp": json.dumps(facts)}
        write_whole(path, lambda beside: _save(tensors, beside, metadata))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # safetensors has its own words for a full disk
        raise OSError(str(error)) from error


def load_trace(path: Path) -> Trace:
    """Return the trace in a file.

    Raises:
        OfframpError: it cannot be read or is no trace.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["offramp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["format"] != _FORMAT:
            raise OfframpError(f"{path} is a trace of format {facts['format']}, not {_FORMAT}")
        return Trace(
            exits=tuple(facts["exits"]),
            num_layers=facts["num_layers"],
            fingerprint=facts["fingerprint"],
            ids=tensors["ids"],
            lengths=tuple(facts["lengths"]),
            rows=tuple(facts["rows"]),
            chosen=tensors["chosen"],
            loss=tensors["loss"],
            scores={
                name.removeprefix("scores."): tensor
                for name, tensor in tensors.items()
                if name.startswith("scores.")
            },
            hidden=tensors.get("hidden"),
        )
    except OSError as error:
        raise OfframpError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise OfframpError(f"{path} is no offramp trace") from error


@torch.no_grad()
def record(
    backbone: Backbone,
    texts: Iterable[tuple[Sequence[int], int]],
    exits: Sequence[int] | None = None,
    *,
    keep_hidden: bool = False,
) -> Trace:
    """Run every text once at full depth and write down what each exit sees.

    Args:
        backbone: what runs the layers.
        texts: (token ids, number of leading tokens that are given and not counted).
        exits: depths to look at; every depth by default.
        keep_hidden: keep the states, so that policies that look at them can be replayed too.

    Raises:
        UsageError: exits the model lacks, or no text with a counted token.
    """
    depth = backbone.shape.num_layers
    exits = tuple(range(1, depth)) if exits is None else tuple(exits)
    check_exits(exits, depth)
    parts = [_record_one(backbone, list(ids), given, exits) for ids, given in texts]
    if not sum(len(part.hidden) for part in parts):
        raise UsageError("there is nothing to trace: no text has a token to predict")
    names = sorted(registry()) if exits else []
    return Trace(
        exits=exits,
        num_layers=depth,
        fingerprint=backbone.fingerprint,
        ids=torch.tensor([token for part in parts for token in part.ids], dtype=torch.int32),
        lengths=tuple(len(part.ids) for part in parts),
        rows=tuple(len(part.hidden) for part in parts),
        chosen=torch.cat([part.chosen for part in parts]),
        loss=torch.cat([part.loss for part in parts]),
        scores={name: torch.cat([part.scores[name] for part in parts]) for name in names},
        hidden=torch.cat([part.hidden for part in parts]) if keep_hidden else None,
    )


@dataclass
class _Part:
    """The trace of one text."""

    ids: list[int]
    hidden: Tensor
    chosen: Tensor
    loss: Tensor
    scores: dict[str, Tensor]


def _record_one(backbone: Backbone, ids: list[int], given: int, exits: tuple[int, ...]) -> _Part:
    first = max(given, 1) - 1
    states = _states(backbone, ids, exits)[first:-1]  # the last position predicts nothing known
    targets = torch.tensor(ids[first + 1 :], device=states.device)
    chunk = max(_BUDGET // (backbone.shape.vocab_size * (len(exits) + 1)), 1)
    columns = [
        _judge(backbone, rows, wanted, exits)
        for rows, wanted in zip(states.split(chunk), targets.split(chunk), strict=True)
        if len(rows)
    ]
    names = sorted(registry()) if exits else []
    empty = torch.zeros(0, len(exits) + 1)
    return _Part(
        ids,
        states.cpu(),
        torch.cat([chosen for chosen, _, _ in columns] or [empty.int()]),
        torch.cat([loss for _, loss, _ in columns] or [empty]),
        {n: torch.cat([s[n] for _, _, s in columns] or [empty[:, :-1]]) for n in names},
    )


def _states(backbone: Backbone, ids: list[int], exits: Sequence[int]) -> Tensor:
    """Return the state of every position at each exit and at the end, ``[T, E + 1, D]``."""
    text = Text(ids, backbone.open())
    spans = (Span(text, 0, len(ids)),)
    try:
        hidden, states = backbone.embed(spans), []
        stops = (*exits, backbone.shape.num_layers)
        for start, stop in zip((0, *stops), stops, strict=False):
            hidden = backbone.run(range(start, stop), hidden, spans)
            states.append(hidden)
        return torch.stack(states, 1)
    finally:
        backbone.close(text.slot)


def _judge(
    backbone: Backbone, states: Tensor, targets: Tensor, exits: Sequence[int]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return choices and losses ``[n, E + 1]`` and signals ``[n, E]`` of some rows."""
    depth = backbone.shape.num_layers
    probe: Probe | None = None
    chosen, loss = [], []
    scores: dict[str, list[Tensor]] = {name: [] for name in registry()}
    for column, stop in enumerate((*exits, depth)):
        probe = Probe(stop, depth, states[:, column], backbone.readout, previous=probe)
        chosen.append(probe.top.int())
        loss.append(
            torch.nn.functional.cross_entropy(probe.logits.float(), targets, reduction="none")
        )
        if stop < depth:
            for name, signal_column in scores.items():
                signal_column.append(score(probe, name).float())
    return (
        torch.stack(chosen, 1).cpu(),
        torch.stack(loss, 1).cpu(),
        {name: torch.stack(column, 1).cpu() for name, column in scores.items() if column},
    )


@dataclass(frozen=True)
class Replay:
    """What a policy would have done, row by row of the trace."""

    depths: Tensor
    """``[T]`` int64: layers that would have chosen."""
    chosen: Tensor
    """``[T]`` int32: the token that would have been chosen."""
    loss: Tensor
    """``[T]`` fp32: cross-entropy of the text's own next token at that depth."""


def replay(
    trace: Trace,
    policy: Policy,
    *,
    max_waiting: int = MAX_WAITING,
    exit_prompt: bool = False,
    readout: Readout | None = None,
) -> Replay:
    """Return what ``policy`` would have done on these texts, ``kv="exact"``.

    Args:
        trace: the full pass.
        policy: its exits must be among the trace's.
        max_waiting: as in :func:`offramp.decode.decode`.
        exit_prompt: as in :func:`offramp.decode.decode`; else each text's first row stays.
        readout: the backbone's, for a trace that kept hidden states: the policy may then look at
            anything, at any subset of the exits.

    Raises:
        UsageError: the trace lacks what the policy asks for.
    """
    columns = _columns(trace, policy)
    leaves = _decisions(trace, policy, columns, readout)
    full = len(trace.exits)
    wanted = torch.full((len(leaves),), full)
    for k in reversed(range(len(columns))):
        wanted[leaves[:, k]] = columns[k]
    column = _bounded(trace, wanted, max_waiting, exit_prompt)
    stops = torch.tensor([*trace.exits, trace.num_layers])
    take = column[:, None]
    return Replay(
        stops[column], trace.chosen.gather(1, take)[:, 0], trace.loss.gather(1, take)[:, 0]
    )


def _columns(trace: Trace, policy: Policy) -> list[int]:
    missing = [depth for depth in policy.exits if depth not in trace.exits]
    if missing:
        raise UsageError(f"the trace has exits {list(trace.exits)}, and lacks {missing}")
    return [trace.exits.index(depth) for depth in policy.exits]


def _decisions(trace: Trace, policy: Policy, columns: list[int], readout: Readout | None) -> Tensor:
    """Return ``[T, exits of the policy]`` bool: whether it would leave there if asked."""
    leaves = torch.zeros(len(trace.chosen), len(columns), dtype=torch.bool)
    probe: Probe | None = None
    for k, column in enumerate(columns):
        if trace.hidden is not None and readout is not None:
            probe = Probe(
                trace.exits[column], trace.num_layers, trace.hidden[:, column], readout, probe
            )
        else:
            _check_look_back(trace, policy)
            scores = {name: values[:, column] for name, values in trace.scores.items()}
            probe = Probe(trace.exits[column], trace.num_layers, None, None, probe, scores)
        leaves[:, k] = policy.leave(probe)
    return leaves


def _check_look_back(trace: Trace, policy: Policy) -> None:
    """A signal that compares with the exit before was recorded for the trace's own exits only."""
    looks_back = isinstance(policy, Threshold) and find(policy.signal).looks_back
    if looks_back and policy.exits != trace.exits[: len(policy.exits)]:
        raise UsageError(
            f"the signal compares neighbouring exits, and the trace was recorded at "
            f"{list(trace.exits)}, not {list(policy.exits)}; record it at these exits, or with "
            "keep_hidden=True"
        )


def _bounded(trace: Trace, wanted: Tensor, max_waiting: int, exit_prompt: bool) -> Tensor:
    """Return the columns after the loop's own two rules: prompts stay, and queues are bounded."""
    full, result = len(trace.exits), []
    for part, length in zip(wanted.split(list(trace.rows)), trace.lengths, strict=True):
        waiting, columns = 0, part.tolist()
        for t, column in enumerate(columns):
            if waiting >= max_waiting or (t == 0 and not exit_prompt):
                columns[t] = column = full
            # With the first counted row, the whole prompt waits.
            waiting = 0 if column == full else waiting + (length - len(columns) if t == 0 else 1)
        result += columns
    return torch.tensor(result, dtype=torch.long)
