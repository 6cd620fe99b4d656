"""Scores of narrow tasks: ROUGE-L, slot coverage, paired bootstrap intervals. Pure functions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

LITERAL = ("name", "type", "food", "area", "near")
"""Attributes whose values a good text repeats word by word; prices and ratings are paraphrased."""
RESAMPLES = 10_000
_CHUNK = 1000


def words(text: str) -> list[str]:
    """Return the runs of a-z and 0-9 of the lower-cased text: the words that ROUGE compares.

    As the package ``rouge_score`` has them, without stemming; so a letter with an accent parts a
    word, in text and reference alike.
    """
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(text: str, references: Iterable[str]) -> float:
    """Return ROUGE-L: the best F1 over the references, 0 to 1 (Lin 2004, one summary sentence).

    Precision and recall are the longest common subsequence of words, over the words of the text and
    of the reference.
    """
    return max(_f1(words(text), words(reference)) for reference in references)


def _f1(own: Sequence[str], other: Sequence[str]) -> float:
    return 2 * common(own, other) / (len(own) + len(other)) if own and other else 0.0


def common(own: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    above = [0] * (len(other) + 1)
    for word in own:
        row = [0]
        for j, match in enumerate(other):
            row.append(above[j] + 1 if word == match else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def coverage(text: str, meaning: Iterable[tuple[str, str]]) -> float:
    """Return the share of the meaning's literal values that the text holds as whole words."""
    own = f" {' '.join(words(text))} "
    wanted = [" ".join(words(value)) for key, value in meaning if key in LITERAL]
    return statistics.fmean(f" {value} " in own for value in wanted) if wanted else 1.0


@dataclass(frozen=True)
class Difference:
    """How much better one arm scores than another on the same texts."""

    mean: float
    low: float
    """End of the 95% interval: a loss down to here is not excluded."""
    high: float
    lower_share: float
    """Share of resamples in which it scores worse."""

    @property
    def verdict(self) -> Literal["higher", "not lower", "lower"]:
        """Say which side of 0 the interval lies on; "not lower" where it holds 0: none is shown."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "not lower"


def paired(scores: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Difference:
    """Return the mean of score minus baseline with its 95% percentile bootstrap interval.

    Texts are drawn with replacement, a text's two scores always together (Koehn 2004).

    Raises:
        ValueError: not as many scores as of the baseline, or none.
    """
    if len(scores) != len(baseline) or not scores:
        raise ValueError(f"{len(scores)} scores against {len(baseline)}")
    own = torch.tensor(scores, dtype=torch.float64)
    gains = own - torch.tensor(baseline, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    size, means = len(gains), []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = torch.randint(size, (_CHUNK, size), generator=generator)
        means.append(gains[drawn].mean(-1))
    resampled = torch.cat(means)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(resampled, ends).tolist()
    return Difference(gains.mean().item(), low, high, (resampled < 0).double().mean().item())
