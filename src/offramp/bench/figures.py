"""From turns to rows: medians with quartiles, and ratios taken within a round.

A busy machine slows a whole round; the ratio of two turns of one round hardly changes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

from offramp.bench.race import Contestant, Race, Sample

Quartiles = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One contestant in one case. What could not be measured or is not known is None."""

    name: str
    batch: int
    context: int
    weights: str | None
    lossless: bool
    note: str
    reason: str | None
    """Why there are no figures."""
    prefill_tokens_per_second: float | None = None
    prefill_quartiles: Quartiles | None = None
    decode_tokens_per_second: float | None = None
    """All texts together."""
    decode_quartiles: Quartiles | None = None
    decode_tokens_per_second_per_sequence: float | None = None
    full: str | None = None
    """The contestant that ratios are against: ours, at full depth."""
    ratio_to_full: float | None = None
    """Decoding speed, of this one to the full one's: 2 is twice as fast."""
    ratio_quartiles: Quartiles | None = None
    prefill_ratio_to_full: float | None = None
    predicted_ratio: float | None = None
    """What the cost model says ``ratio_to_full`` should be."""
    operations_to_full: float | None = None
    """Operations of decoding a token, every look and everything caught up included, of full
    depth's: 0.6 saves 40%."""
    ceiling_share: float | None = None
    """Bytes per second of decoding, as a share of what the memory gave in the same round."""
    prefill_ceiling_share: float | None = None
    """Operations per second of reading, as a share of a matrix product's of such weights."""
    reference: str | None = None
    """The contestant whose tokens these should be."""
    mismatches: int | None = None
    """Positions with another token than the reference's, in the worst round."""
    compared: int | None = None
    """Positions compared."""


def rows(run: Race) -> list[Row]:
    """Return a row per contestant."""
    return [_row(run, i) for i in range(len(run.contestants))]


def spread(values: Iterable[float]) -> tuple[float, Quartiles]:
    """Return the median, and the quartiles around it."""
    known = list(values)
    low, middle, high = (
        statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3
    )
    return middle, (low, high)


def _row(run: Race, index: int) -> Row:
    who, case, samples = run.contestants[index], run.case, run.samples[index]
    shared = (who.name, case.batch, case.context, who.weights, who.lossless, who.note)
    if run.reasons[index] is not None:
        return Row(*shared, run.reasons[index])
    prefill, prefill_quartiles = spread(case.read / s.prefill for s in samples)
    decode, decode_quartiles = spread(_speed(s) for s in samples)
    rounds = list(zip(samples, run.ceilings, strict=True))
    full, full_samples = _other(run, index, _full)
    pairs = list(zip(samples, full_samples, strict=False))
    speeds = [_speed(own) / _speed(other) for own, other in pairs]
    reference, expected = _other(run, index, _reference)
    wrong = [mismatches(s.outputs, e.outputs) for s, e in zip(samples, expected, strict=False)]
    return Row(
        *shared,
        reason=None,
        prefill_tokens_per_second=prefill,
        prefill_quartiles=prefill_quartiles,
        decode_tokens_per_second=decode,
        decode_quartiles=decode_quartiles,
        decode_tokens_per_second_per_sequence=decode / case.batch,
        full=full,
        ratio_to_full=_median(speeds),
        ratio_quartiles=spread(speeds)[1] if speeds else None,
        prefill_ratio_to_full=_median(other.prefill / own.prefill for own, other in pairs),
        predicted_ratio=_median(_predicted(own, other) for own, other in pairs),
        operations_to_full=_median(_operations(own, other) for own, other in pairs),
        ceiling_share=_median(
            s.decode_bytes and s.decode_bytes / s.decode / c.bytes_per_second for s, c in rounds
        ),
        prefill_ceiling_share=_median(
            s.prefill_flops and s.prefill_flops / s.prefill / c.products(who.weights)
            for s, c in rounds
        ),
        reference=reference,
        mismatches=max(wrong, default=None),
        compared=len(case.prompts) * case.tokens if wrong else None,
    )


def mismatches(outputs: list[list[int]], expected: list[list[int]]) -> int:
    """Return at how many positions texts differ; a missing token differs, too."""
    pairs = [
        pair
        for own, other in zip(outputs, expected, strict=True)
        for pair in zip_longest(own, other)
    ]
    return sum(a != b for a, b in pairs)


def _speed(sample: Sample) -> float:
    return sample.decoded / sample.decode


def _predicted(own: Sample, full: Sample) -> float | None:
    """Return the predicted speed against full depth: its cost per token over ours."""
    if own.predicted is None or full.predicted is None:
        return None
    return full.predicted / full.decoded / (own.predicted / own.decoded)


def _operations(own: Sample, full: Sample) -> float | None:
    """Return the operations of a token, of those at full depth."""
    if own.decode_flops is None or full.decode_flops is None:
        return None
    return own.decode_flops / own.decoded / (full.decode_flops / full.decoded)


def _full(who: Contestant, other: Contestant) -> int:
    """Rank contestants as the full depth to compare ``who`` with: its own backbone's first."""
    same = (other.kind == who.kind) + (other.weights == who.weights)
    return 1 + same if other.full else 0


def _reference(who: Contestant, other: Contestant) -> int:
    """Rank contestants as those whose tokens ``who`` should write."""
    if other is who:
        return 0
    same = other.weights == who.weights
    return 2 * (other.full and same) + (other.kind == "hf")


def _other(
    run: Race, index: int, rank: Callable[[Contestant, Contestant], int]
) -> tuple[str | None, list[Sample]]:
    """Return the name and the turns of the contestant ranked first, among those that finished."""
    who = run.contestants[index]
    ranked = [
        (rank(who, other), other.name, samples)
        for other, samples, reason in zip(run.contestants, run.samples, run.reasons, strict=True)
        if reason is None
    ]
    best, name, samples = max(ranked, key=lambda item: item[0])
    return (name, samples) if best else (None, [])


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
