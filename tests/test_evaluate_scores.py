"""What evaluate scores with: equal to reference implementations, intervals that cover."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from offramp.evaluate.intervals import Difference, interval, paired
from offramp.evaluate.overlap import chrf, exact, f1, plain_squad, plain_trivia, rouge_l
from offramp.evaluate.scores import LEAST, verdict

LAW = settings(deadline=None, max_examples=50)
tokens = st.sampled_from(["The", "a", "an", "bit", "of", "don't", "x_y", "café", "U.S.", "`q", "3"])
sentences = st.lists(tokens, max_size=8).map(" ".join)
several = st.lists(sentences, min_size=1, max_size=3)

# -- scores of texts


@LAW
@given(sentences, several)
def test_rouge_is_the_packages(text: str, references: list[str]) -> None:
    """``rougeL`` without stemming, the best of the references."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = max(scorer.score(right, text)["rougeL"].fmeasure for right in references)
    assert rouge_l(text, references) == pytest.approx(expected)


def grams(text: str, size: int) -> Counter[str]:
    """Its runs of so many letters."""
    return Counter(text[i : i + size] for i in range(len(text) - size + 1))


@LAW
@given(st.text("ab c", min_size=8, max_size=14), st.text("ab c", min_size=8, max_size=14))
def test_chrf_is_its_formula(text: str, reference: str) -> None:
    """F2 of the mean precision and recall of runs of 1 to 6 letters, spaces apart."""
    own, other = ("".join(one.split()) for one in (text, reference))
    if min(len(own), len(other)) < 6:
        return
    sums = [0.0, 0.0]
    for size in range(1, 7):
        a, b = (
            Counter(one[i : i + size] for i in range(len(one) - size + 1)) for one in (own, other)
        )
        same = (a & b).total()
        sums = [sums[0] + same / a.total() / 6, sums[1] + same / b.total() / 6]
    precision, recall = sums
    expected = 5 * precision * recall / (4 * precision + recall) if precision else 0
    assert chrf(text, [reference]) == pytest.approx(expected)
    assert chrf(text, [reference, text]) == pytest.approx(1)


def squad_script(text: str) -> str:
    """SQuAD v1.1's own ``normalize_answer``."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(text.lower())))


def trivia_script(text: str) -> str:
    """TriviaQA's own ``normalize_answer``."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def handle_punc(text: str) -> str:
        exclude = {*string.punctuation, "\u2018", "\u2019", "\u00b4", "`"}
        return "".join(ch if ch not in exclude else " " for ch in text)

    spaced = remove_articles(handle_punc(text.replace("_", " ").lower()))
    return " ".join(spaced.split()).strip()


def f1_script(prediction: str, truth: str) -> float:
    """Both scripts' own ``f1_score``, of normalised texts."""
    own, right = prediction.split(), truth.split()
    same = sum((Counter(own) & Counter(right)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(own), 1.0 * same / len(right)
    return (2 * precision * recall) / (precision + recall)


@LAW
@given(sentences, several)
def test_short_answers_are_judged_by_the_official_scripts(text: str, rights: list[str]) -> None:
    """Exact match and F1, the best over the right answers."""
    for plain, script in ((plain_squad, squad_script), (plain_trivia, trivia_script)):
        own, known = plain(text), [plain(right) for right in rights]
        assert [own, *known] == [script(one) for one in (text, *rights)]
        assert exact(own, known) == max(float(own == right) for right in known)
        assert f1(own, known) == pytest.approx(max(f1_script(own, right) for right in known))


# -- intervals

values = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)


@settings(deadline=None, max_examples=15)
@given(values, st.integers(0, 9))
def test_the_same_seed_gives_the_same_interval(scores: list[float], seed: int) -> None:
    """And it holds the mean; against itself, a column differs by 0 however it is shown."""
    found = interval(scores, seed)
    assert found == interval(scores, seed)
    assert found.mean == pytest.approx(sum(scores) / len(scores), abs=1e-9)
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    counts = [1.0 + i for i in range(len(scores))]
    for shown in (None, torch.exp):
        same = paired(scores, scores, seed, weights=counts, shown=shown)
        assert (same.mean, same.low, same.high, same.lower_share) == (0, 0, 0, 0)


def test_a_weight_is_that_many_items_in_the_mean() -> None:
    """A text of three tokens counts three times; what is shown of a mean is shown of its ends."""
    scores, counts = [0.5, 2.0, 1.0], [1.0, 3.0, 2.0]
    assert interval(scores, weights=counts).mean == pytest.approx((0.5 + 6 + 2) / 6)
    plain, shown = (interval(scores, weights=counts, shown=one) for one in (torch.clone, torch.exp))
    for end in ("mean", "low", "high"):
        assert getattr(shown, end) == pytest.approx(
            torch.tensor(getattr(plain, end)).exp().item(), rel=1e-3
        )
    gain = paired([2.0] * 3, [1.0] * 3, shown=torch.exp)
    assert gain.mean == pytest.approx(torch.e**2 - torch.e, rel=1e-6)


def test_the_interval_covers() -> None:
    """95% of intervals hold the true mean of a skewed score, within what 150 trials can tell."""
    draw = torch.Generator().manual_seed(0)
    samples = torch.empty(150, 40).exponential_(1, generator=draw)
    found = [interval(sample.tolist(), i) for i, sample in enumerate(samples)]
    covered = sum(one.low <= 1 <= one.high for one in found) / len(found)
    assert 0.86 <= covered <= 0.99
    assert sum(one.high - one.low for one in found) / len(found) < 4 / 40**0.5


def test_no_scores_have_no_interval() -> None:
    """It is an error, and no number."""
    with pytest.raises(ValueError, match="0 scores"):
        interval([])


def test_a_verdict_knows_which_way_is_better() -> None:
    """And says nothing where the interval holds 0, or of a handful of items."""

    def said(low: float, high: float, better: str, items: int = LEAST) -> str:
        return verdict(Difference((low + high) / 2, low, high, 0.5), better, items)  # type: ignore[arg-type]

    assert said(0.1, 0.2, "higher") == said(-0.2, -0.1, "lower") == "better"
    assert said(-0.2, -0.1, "higher") == said(0.1, 0.2, "lower") == "worse"
    assert (said(0.1, 0.2, "neither"), said(-0.2, -0.1, "neither")) == ("higher", "lower")
    assert said(-0.1, 0.2, "higher") == "no difference shown"
    assert said(0.1, 0.2, "higher", LEAST - 1) == "too few items"
    assert said(0, 0, "higher", 1) == "equal"
