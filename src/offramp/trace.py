"""One full pass over texts, with everything a policy could have seen; replays of policies on it.

Because waiting tokens get exact keys and values, what a policy would have done on a text is a
function of one full pass over it: thousands of policies are judged by table look-ups, and each
replay gives the very depths of the real loop.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.backbone import Backbone
from offramp.batch import Span, Text
from offramp.checks import FULL_HEAD, Check, GateFile, Head
from offramp.classifier import Classified
from offramp.decode import MAX_WAITING
from offramp.errors import OfframpError, UsageError
from offramp.files import write_tensors
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
    the token after one position. E exits; the full head after the last layer is apart from them.
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
    """``[T, E + 1]`` int32: what ``head`` chooses at each exit; last, what the full one does."""
    loss: Tensor
    """``[T, E + 1]`` fp32: cross-entropy of the text's own next token, in nats."""
    scores: dict[str, Tensor]
    """Every registered signal, ``[T, E]`` fp32, computed from what ``check`` saw."""
    hidden: Tensor | None = None
    """``[T, E + 1, D]``: the states, where they were kept."""
    check: str = "full"
    """The check whose scores these are, as it calls itself: ``str(check)``."""
    head: str = "full"
    """What chooses the token of a row that leaves, likewise; losses are always the full head's."""
    prompts: tuple[int, ...] | None = None
    """What each text's prompt is known by (:func:`offramp.sketch.keys`), where that was noted."""

    @cached_property
    def agrees(self) -> Tensor:
        """Return ``[T, E]`` bool: the exit's choice is the last layer's."""
        return self.chosen[:, :-1] == self.chosen[:, -1:]

    @cached_property
    def targets(self) -> Tensor:
        """Return the texts' own next token at every counted row, ``[T]`` int32."""
        texts = self.ids.split(list(self.lengths))
        return torch.cat([ids[len(ids) - n :] for ids, n in zip(texts, self.rows, strict=True)])

    def must_choose_by(self, head: Head) -> None:
        """Refuse another head than the one by which the trace's exits chose (UsageError)."""
        if str(head) != self.head:
            raise UsageError(
                f"the trace's exits chose by the head {self.head}, not {head}; record it with "
                "this one"
            )

    def part(self, texts: Sequence[int]) -> Trace:
        """Return the trace of some of its texts, by their indices, in this order."""
        if list(texts) == list(range(len(self.rows))):
            return self
        ids = self.ids.split(list(self.lengths))
        rows = torch.arange(sum(self.rows)).split(list(self.rows))
        kept = torch.cat([rows[i] for i in texts])
        return replace(
            self,
            ids=torch.cat([ids[i] for i in texts]),
            lengths=tuple(self.lengths[i] for i in texts),
            rows=tuple(self.rows[i] for i in texts),
            prompts=None if self.prompts is None else tuple(self.prompts[i] for i in texts),
            chosen=self.chosen[kept],
            loss=self.loss[kept],
            scores={name: column[kept] for name, column in self.scores.items()},
            hidden=None if self.hidden is None else self.hidden[kept],
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        facts = {
            "format": _FORMAT,
            "exits": self.exits,
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
            "lengths": self.lengths,
            "rows": self.rows,
            "check": self.check,
            "head": self.head,
            "prompts": self.prompts,
        }
        tensors = {"ids": self.ids, "chosen": self.chosen, "loss": self.loss}
        tensors |= {f"scores.{name}": column for name, column in self.scores.items()}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        write_tensors(path, tensors, {"offramp": json.dumps(facts)})


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
        prompts = facts.get("prompts")
        if prompts is not None and len(prompts) != len(facts["rows"]):
            raise ValueError("prompts of other texts")
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
            check=str(facts.get("check", "full")),
            head=str(facts.get("head", "full")),
            prompts=None if prompts is None else tuple(map(int, prompts)),
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
    check: Check = FULL_HEAD,
    head: Head = FULL_HEAD,
    ends: Collection[int] = (),
) -> Trace:
    """Run every text once at full depth and write down what each exit sees.

    Args:
        backbone: what runs the layers.
        texts: (token ids, number of leading tokens that are given and not counted).
        exits: depths to look at; every depth by default, with a short head the last one, too.
        keep_hidden: keep the states, so that policies that look at them can be replayed too.
        check: what the signals are computed from; losses are always the full head's.
        head: what chooses at an exit, as in :class:`offramp.Exit`; it is the check, too, where that
            is the full one.
        ends: tokens that end a text, which a short head can choose as well.

    Raises:
        UsageError: exits the model lacks, a check or a head it cannot make, or no text with a
            counted token.
    """
    depth = backbone.shape.num_layers
    short = head != FULL_HEAD
    exits = tuple(range(1, depth + short)) if exits is None else tuple(exits)
    check_exits(exits, depth, short_head=short)
    check = head if check == FULL_HEAD else check
    for part in (check, head):
        part.must_fit(backbone.shape)
    eyes = _Eyes(check.look(backbone), head.choose(backbone, ends))
    parts = [_record_one(backbone, list(ids), given, exits, eyes) for ids, given in texts]
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
        check="full" if eyes.look is None else str(check),
        head=str(head),
    )


@dataclass(frozen=True, eq=False)
class _Eyes:
    """How an exit reads its rows; None: by the full head."""

    look: Readout | None
    """What signals are computed from."""
    choose: Readout | None
    """What chooses the token."""


@dataclass
class _Part:
    """The trace of one text."""

    ids: list[int]
    hidden: Tensor
    chosen: Tensor
    loss: Tensor
    scores: dict[str, Tensor]


def _record_one(
    backbone: Backbone, ids: list[int], given: int, exits: tuple[int, ...], eyes: _Eyes
) -> _Part:
    first = max(given, 1) - 1
    states = _states(backbone, ids, exits)[first:-1]  # the last position predicts nothing known
    targets = torch.tensor(ids[first + 1 :], device=states.device)
    chunk = max(_BUDGET // (backbone.shape.vocab_size * (len(exits) + 1)), 1)
    columns = [
        _judge(backbone, rows, wanted, exits, eyes)
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
            hidden = backbone.run(range(start, stop), hidden, spans) if start < stop else hidden
            block = backbone.blocks.get(stop)
            states.append(hidden if block is None else backbone.run([block], hidden, spans))
        return torch.stack(states, 1)
    finally:
        backbone.close(text.slot)


def _judge(
    backbone: Backbone,
    states: Tensor,
    targets: Tensor,
    exits: Sequence[int],
    eyes: _Eyes,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return choices and losses ``[n, E + 1]`` and signals ``[n, E]`` of some rows."""
    depth = backbone.shape.num_layers
    probe: Probe | None = None
    chosen, loss = [], []
    scores: dict[str, list[Tensor]] = {name: [] for name in registry()}
    for column, stop in enumerate((*exits, depth)):
        probe = Probe(stop, depth, states[:, column], backbone.readout, probe, look=eyes.look)
        choose = None if column == len(exits) else eyes.choose
        picks = probe.logits if choose is None else choose(states[:, column], stop)
        chosen.append(picks.argmax(-1).int())
        loss.append(
            torch.nn.functional.cross_entropy(probe.logits.float(), targets, reduction="none")
        )
        if column < len(exits):
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
    check: Check = FULL_HEAD,
    head: Head = FULL_HEAD,
    backbone: Backbone | None = None,
) -> Replay:
    """Return what ``policy`` would have done on these texts, ``kv="exact"``.

    Args:
        trace: the full pass.
        policy: its exits must be among the trace's.
        max_waiting: as in :func:`offramp.decode.decode`.
        exit_prompt: as in :func:`offramp.decode.decode`; else each text's first row stays.
        check: what the policy's signal is computed from.
        head: what chooses the token of a row that leaves; it is the check, too, where that is full.
        backbone: the model, for a trace that kept hidden states: the policy may then look at
            anything, through any check, at any subset of the exits.

    Raises:
        UsageError: the trace lacks what the policy asks for, or its scores are of another check, or
            its choices of another head.
    """
    trace.must_choose_by(head)
    check = head if check == FULL_HEAD else check
    columns = _columns(trace, policy)
    leaves = _decisions(trace, policy, columns, check, backbone)
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


def _decisions(
    trace: Trace, policy: Policy, columns: list[int], check: Check, backbone: Backbone | None
) -> Tensor:
    """Return ``[T, exits of the policy]`` bool: whether it would leave there if asked."""
    leaves = torch.zeros(len(trace.chosen), len(columns), dtype=torch.bool)
    readout: Readout | None = None
    look: Readout | None = None
    table = trace.scores
    if trace.hidden is not None and backbone is not None:
        readout, look, table = backbone.readout, check.look(backbone), {}
    else:
        _check_same(trace, policy, check)
        _check_look_back(trace, policy)
    probe: Probe | None = None
    for k, column in enumerate(columns):
        hidden = None if trace.hidden is None else trace.hidden[:, column]
        known = {name: values[:, column] for name, values in table.items()}
        depth = trace.exits[column]
        probe = Probe(depth, trace.num_layers, hidden, readout, probe, known, look)
        leaves[:, k] = policy.leave(probe)
    return leaves


def _check_same(trace: Trace, policy: Policy, check: Check) -> None:
    """Scores seen through one check say nothing of another; a gate looks at no scores."""
    wanted = policy.classifier.facts.check if isinstance(policy, Classified) else str(check)
    if not isinstance(check, GateFile) and wanted != trace.check:
        raise UsageError(
            f"the trace's scores were seen by the check {trace.check}, not {wanted}; record it "
            "with this check, or keep hidden states and replay it with the backbone"
        )


def _check_look_back(trace: Trace, policy: Policy) -> None:
    """A signal that compares with the exit before was recorded for the trace's own exits only."""
    match policy:
        case Threshold():
            looks_back = find(policy.signal).looks_back
        case Classified():
            looks_back = policy.classifier.looks_back
        case _:
            looks_back = False
    if looks_back and policy.exits != trace.exits[: len(policy.exits)]:
        raise UsageError(
            f"this policy compares neighbouring exits, and the trace was recorded at "
            f"{list(trace.exits)}, not {list(policy.exits)}; record it at these exits, or with "
            "keep_hidden=True"
        )


def _bounded(trace: Trace, wanted: Tensor, max_waiting: int, exit_prompt: bool) -> Tensor:
    """Return the columns after the loop's own two rules: prompts stay, and queues are bounded."""
    full, result = len(trace.exits), []
    ran_all = {column for column, depth in enumerate(trace.exits) if depth == trace.num_layers}
    ran_all.add(full)
    for part, length in zip(wanted.split(list(trace.rows)), trace.lengths, strict=True):
        waiting, columns = 0, part.tolist()
        for t, column in enumerate(columns):
            if waiting >= max_waiting or (t == 0 and not exit_prompt):
                columns[t] = column = full
            # With the first counted row, the whole prompt waits.
            more = length - len(columns) if t == 0 else 1
            waiting = 0 if column in ran_all else waiting + more
        result += columns
    return torch.tensor(result, dtype=torch.long)
