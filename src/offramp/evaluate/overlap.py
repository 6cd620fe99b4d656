"""Scores of a text against right ones: ROUGE-L, chrF, exact match and F1 of words. Pure."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from offramp.errors import OfframpError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = "\u2018\u2019\u00b4`"


def words(text: str) -> list[str]:
    """Return the runs of a-z and 0-9 of the lower-cased text: the words that ROUGE compares.

    As the package ``rouge_score`` has them, without stemming; so a letter with an accent parts a
    word, in text and reference alike.
    """
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(text: str, references: Iterable[str]) -> float:
    """Return ROUGE-L: the best F1 over the references, 0 to 1 (Lin 2004, one summary sentence).

    Precision and recall are the longest common subsequence of words, over the words of the text and
    of the reference. Equals ``rougeL`` of the package ``rouge_score``, which a test holds.
    """
    return max(_overlap(words(text), words(reference)) for reference in references)


def _overlap(own: Sequence[str], other: Sequence[str]) -> float:
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


def chrf(text: str, references: Iterable[str]) -> float:
    """Return chrF of a sentence, 0 to 1, as sacrebleu has it (Popovic 2015; n up to 6, beta 2).

    Raises:
        OfframpError: sacrebleu is not installed.
    """
    score: float = _chrf().sentence_score(text, list(references)).score
    return score / 100


@cache
def _chrf() -> Any:
    must_have_chrf()
    from sacrebleu.metrics import CHRF

    return CHRF()


def must_have_chrf() -> None:
    """Refuse to begin what cannot be scored.

    Raises:
        OfframpError: sacrebleu is not installed.
    """
    if find_spec("sacrebleu") is None:
        raise OfframpError("chrF of free text needs sacrebleu: pip install 'offramp[evaluate]'")


def plain_squad(text: str) -> str:
    """Return an answer without case, punctuation and articles, by SQuAD's own script (v1.1)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def plain_trivia(text: str) -> str:
    """Return the same by TriviaQA's own script: signs become spaces, quotes are signs, too."""
    signs = {*string.punctuation, *_QUOTES}
    kept = "".join(" " if letter in signs else letter for letter in text.lower())
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact(own: str, rights: Iterable[str]) -> float:
    """Return 1.0 if a plain answer is one of the right ones, else 0.0."""
    return float(own in list(rights))


def f1(own: str, rights: Iterable[str]) -> float:
    """Return the best F1 of words of a plain answer over the right ones (Rajpurkar et al. 2016)."""
    return max(_f1(own.split(), right.split()) for right in rights)


def _f1(own: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(own) & Counter(right)).total()
    return 2 * same / (len(own) + len(right)) if same else 0.0
