"""The race: who takes part, what a turn measures, and turns in one order, A B C A B C ..."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from offramp.errors import OfframpError

_SETTLE = 0.02
"""Seconds before a turn: the threads of the turn before stop spinning and sleep."""


@dataclass(frozen=True)
class Case:
    """What every contestant does in a turn: read these prompts, then write as many tokens."""

    prompts: list[list[int]]
    """Token ids; all of one length where they make a batch."""
    tokens: int
    """New tokens per prompt, 2 or more: the first one belongs to reading."""
    alone: bool = False
    """Whether they are answered one after the other in a turn, rather than as one batch."""

    @property
    def batch(self) -> int:
        """Return the number of texts at once."""
        return 1 if self.alone else len(self.prompts)

    @property
    def read(self) -> int:
        """Return the number of tokens in all prompts."""
        return sum(map(len, self.prompts))

    @property
    def context(self) -> int:
        """Return the number of tokens in a prompt, on average."""
        return round(self.read / len(self.prompts))

    @property
    def parts(self) -> list[Case]:
        """Return what a contestant is given at once."""
        return [Case([ids], self.tokens) for ids in self.prompts] if self.alone else [self]


@dataclass(frozen=True)
class Sample:
    """One turn of one contestant."""

    prefill: float
    """Seconds until every text had its first token."""
    decode: float
    """Seconds after that."""
    decoded: int
    """Tokens written in those seconds, all texts together."""
    outputs: list[list[int]]
    decode_bytes: float | None = None
    """Bytes of weights, keys and values read while decoding, where known."""
    prefill_flops: float | None = None
    """Operations of reading the prompts, where known."""
    decode_flops: float | None = None
    """Operations of decoding, looks at exits and what is caught up included, where known."""
    predicted: float | None = None
    """Seconds that the cost model, measured on this machine, says the decoding takes."""


def together(samples: Sequence[Sample]) -> Sample:
    """Return the parts of one turn as a turn; what is not known of one part is not known."""

    def added(name: str) -> float | None:
        values = [getattr(sample, name) for sample in samples]
        return None if None in values else sum(values)

    return Sample(
        sum(sample.prefill for sample in samples),
        sum(sample.decode for sample in samples),
        sum(sample.decoded for sample in samples),
        [text for sample in samples for text in sample.outputs],
        decode_bytes=added("decode_bytes"),
        prefill_flops=added("prefill_flops"),
        decode_flops=added("decode_flops"),
        predicted=added("predicted"),
    )


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes turns."""

    name: str
    measure: Callable[[Case], Sample]
    """Takes a part of a turn, or raises OfframpError with the reason why it cannot."""
    kind: str
    """``own fast`` or ``own hf`` for a backbone of ours, else the name of the engine."""
    weights: str | None = None
    """The format of the weights, where known."""
    full: bool = False
    """Whether it is a backbone of ours that runs every layer for every token, one by one."""
    lossless: bool = True
    note: str = ""
    """What is timed, where that is not plain."""


@dataclass(frozen=True)
class Ceiling:
    """What the machine could do at one moment."""

    bytes_per_second: float
    operations: Mapping[str, float]
    """Per second, in products of matrices of ``fp32``, ``int8`` and perhaps ``bf16`` numbers."""

    def products(self, weights: str | None) -> float:
        """Return operations per second for weights held so, by what may multiply them.

        That is numbers as wide, or wider where a machine multiplies those faster.
        """
        kinds = ("fp32", "bf16", "int8")
        last = kinds.index(weights or "fp32") if weights in (None, *kinds) else len(kinds)
        return max(self.operations[kind] for kind in kinds[: last + 1] if kind in self.operations)


@dataclass
class Race:
    """All turns of one case that count: ``samples[i][r]`` is contestant i in round r."""

    case: Case
    contestants: Sequence[Contestant]
    samples: list[list[Sample]]
    reasons: list[str | None]
    """Why a contestant did not finish."""
    ceilings: list[Ceiling] = field(default_factory=list)


def absent(name: str, reason: str, weights: str | None = None) -> Contestant:
    """Return a contestant that cannot take part, and says why."""

    def refuse(_case: Case) -> Sample:
        raise OfframpError(reason)

    return Contestant(name, refuse, name, weights)


def race(
    contestants: Sequence[Contestant],
    case: Case,
    rounds: int,
    ceiling: Callable[[], Ceiling],
    tick: Callable[[str], object],
) -> Race:
    """Let everybody take a turn, round after round; the first round warms up and is not kept.

    Args:
        contestants: in the order of their turns; who fails once is out of this case.
        case: what to do.
        rounds: rounds that count.
        ceiling: measures the machine, once per round.
        tick: told who has had a turn.
    """
    run = Race(case, contestants, [[] for _ in contestants], [None] * len(contestants))
    for turn in range(rounds + 1):
        for i, contestant in enumerate(contestants):
            if run.reasons[i] is None:
                time.sleep(_SETTLE)
                try:
                    sample = together([contestant.measure(part) for part in case.parts])
                    run.samples[i] += [sample] if turn else []
                except (OfframpError, MemoryError, RuntimeError) as error:
                    run.reasons[i] = str(error) or type(error).__name__
            tick(contestant.name)
        time.sleep(_SETTLE)
        measured = ceiling()
        run.ceilings += [measured] if turn else []
    return run
