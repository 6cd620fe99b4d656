"""The narrow-task experiments: scores, splits, made-up prompts, taking turns, and going on."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import narrow
import narrow_race
import narrow_tokens
import pytest
import ship_narrow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_arms import Answers, Arm, Clock, Labels, answer_all, open_arms, shown
from narrow_data import Pair, apart, news, synthetic
from narrow_scores import coverage

import offramp
from offramp.batch import Text
from offramp.checks import Tokens
from offramp.evaluate.intervals import Difference, paired
from offramp.evaluate.meanings import Meaning, as_prompt, parse_meaning, parse_prompt
from offramp.evaluate.overlap import common, rouge_l
from offramp.hf.delta import is_grouped, rounded
from offramp.hf.load import load_checkpoint
from offramp.step import step
from offramp.tune.data import Example
from tests.test_delta import save_wide

LAW = settings(deadline=None, max_examples=60)
short = st.lists(st.sampled_from("abc"), max_size=7)
sentences = st.lists(st.sampled_from(["a", "bit", "of", "text", "here"]), max_size=9).map(" ".join)
values = st.sampled_from(["The Eagle", "Ranch", "3 out of 5", "£20-25", "Café Rouge", "no"])
meanings = st.dictionaries(
    st.sampled_from(["name", "food", "area", "near", "rating"]), values, min_size=1
).map(lambda found: tuple(found.items()))


# -- scores


@LAW
@given(short, short)
def test_the_common_subsequence_is_the_longest_there_is(own: list[str], other: list[str]) -> None:
    """As long as the longest among all subsequences of both."""

    def parts(items: list[str]) -> set[tuple[str, ...]]:
        return {part for size in range(len(items) + 1) for part in combinations(items, size)}

    assert common(own, other) == max(len(part) for part in parts(own) & parts(other))


def test_rouge_is_the_published_one() -> None:
    """The example of Lin (2004), section 3.1: three of four words in order, and two of four."""
    reference = ["police killed the gunman"]
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("Police, the GUNMAN!", reference) == pytest.approx(2 * 3 / (3 + 4))


@LAW
@given(sentences, st.lists(sentences, min_size=1, max_size=4))
def test_rouge_takes_the_best_reference(text: str, references: list[str]) -> None:
    """It lies between 0 and 1, is 1 for the text itself, and no reference lowers it."""
    each = [rouge_l(text, [reference]) for reference in references]
    assert 0 <= min(each) <= max(each) == rouge_l(text, references) <= 1
    assert rouge_l(text, [*references, text]) == (1 if text else 0)
    assert each == [rouge_l(reference, [text]) for reference in references]


def test_a_value_is_covered_as_whole_words() -> None:
    """Case and punctuation do not matter; a piece of a word is no word; prices are not asked."""
    asked = (("name", "The Mill"), ("food", "Fast food"), ("price", "£20-25"), ("near", "Ranch"))
    assert coverage("the mill: fast-food near RANCH.", asked) == 1
    assert coverage("The Miller has fast food near Rancho", asked) == pytest.approx(1 / 3)
    assert coverage("", asked) == 0


scores = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30)


@LAW
@given(scores, st.floats(-2, 2))
def test_a_shift_moves_the_interval_and_nothing_else(own: list[float], shift: float) -> None:
    """A constant gain is that gain without doubt, and adds to any other difference."""
    found = paired([score + shift for score in own], own)
    assert (found.low, found.mean, found.high) == pytest.approx((shift,) * 3, abs=1e-6)
    other = list(reversed(own))
    plain, moved = paired(own, other), paired([score + shift for score in own], other)
    for end in ("low", "mean", "high"):
        assert getattr(moved, end) == pytest.approx(getattr(plain, end) + shift, abs=1e-6)
    assert plain.low <= plain.mean + 1e-9
    assert plain.mean <= plain.high + 1e-9


def test_the_interval_is_that_of_paired_differences() -> None:
    """Two standard errors of the gains to each side, however much the texts differ among them."""
    generator = torch.Generator().manual_seed(0)
    hard = 10 * torch.rand(400, generator=generator)
    gains = torch.randn(400, generator=generator)
    found = paired((hard + gains).tolist(), hard.tolist())
    error = 1.96 * gains.std().item() / 20
    assert found.mean == pytest.approx(gains.mean().item(), abs=1e-5)
    assert found.high - found.mean == pytest.approx(error, rel=0.05)
    assert found.mean - found.low == pytest.approx(error, rel=0.05)


def test_a_verdict_is_the_side_of_the_interval() -> None:
    """And what does not pair up has none."""
    ends = {(0.1, 0.2): "higher", (-0.2, -0.1): "lower", (-0.1, 0.2): "not lower"}
    for (low, high), verdict in ends.items():
        assert Difference((low + high) / 2, low, high, 0.5).verdict == verdict
    for other in ([1.0], []):
        with pytest.raises(ValueError, match="against"):
            paired(other * 2, other)
    with pytest.raises(ValueError, match="0 scores"):
        paired([], [])


# -- rows


pairs = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy")), max_size=8)


@LAW
@given(pairs, pairs, pairs)
def test_no_prompt_is_in_two_splits(train: list[Pair], dev: list[Pair], test: list[Pair]) -> None:
    """What is tested stays, what is only trained on gives way, and nothing else is lost."""
    kept = apart({"train": train, "dev": dev, "test": test})
    prompts = [{prompt for prompt, _ in kept[name]} for name in kept]
    assert list(kept) == ["train", "dev", "test"]
    assert not any(a & b for a, b in combinations(prompts, 2))
    assert kept["test"] == test
    assert kept["dev"] == [pair for pair in dev if pair[0] not in prompts[2]]
    assert set(train) <= {*kept["train"], *(p for p in train if p[0] in prompts[1] | prompts[2])}


@LAW
@given(meanings)
def test_a_prompt_says_its_meaning(meaning: Meaning) -> None:
    """Read back from the prompt, or from the data's own form, it is the same."""
    assert parse_prompt(as_prompt(meaning)) == meaning
    assert parse_meaning(", ".join(f"{key}[{value}]" for key, value in meaning)) == meaning


@pytest.mark.parametrize("text", ["", "name", "name[A | B]", "name[A], ", "name[A] food[B]"])
def test_what_a_prompt_could_not_say_is_refused(text: str) -> None:
    """Not half read."""
    if text == "":
        assert parse_meaning(text) == ()
        return
    with pytest.raises(ValueError, match="no meaning"):
        parse_meaning(text)


KNOWN: list[Meaning] = [
    (("name", "Cotto"), ("food", "English"), ("near", "Ranch")),
    (("name", "Aromi"), ("area", "riverside")),
    (("name", "Cocum"), ("food", "Chinese"), ("area", "city centre")),
]
TESTED: list[Meaning] = [
    (("name", "Cotto"), ("area", "riverside")),
    (("name", "The Silver Fox"), ("food", "Thai")),
]


@pytest.mark.parametrize("seed", [0, 1])
def test_made_up_meanings_are_new_and_like_the_known_ones(seed: int) -> None:
    """Neither known nor tested, no value invented that is tested; half of known values alone."""
    made = synthetic(KNOWN, TESTED, 20, random.Random(seed))
    assert made == synthetic(KNOWN, TESTED, 20, random.Random(seed))
    assert len({frozenset(meaning) for meaning in made}) == len(made) == 20
    assert not {frozenset(m) for m in made} & {frozenset(m) for m in KNOWN + TESTED}
    shapes = {tuple(key for key, _ in meaning) for meaning in KNOWN}
    assert {tuple(key for key, _ in meaning) for meaning in made} <= shapes
    known, tested = ({pair for m in some for pair in m} for some in (KNOWN, TESTED))
    invented = [set(meaning) - known for meaning in made]
    assert 5 <= sum(not new for new in invented) <= 15
    assert not {value for new in invented for _, value in new} & {value for _, value in tested}


def test_where_no_more_meanings_can_be_made_it_ends() -> None:
    """One attribute of one value, and five invented ones."""
    assert len(synthetic([(("type", "pub"),)], [], 20, random.Random(0))) == 5


def test_news_is_one_readable_line() -> None:
    """No marks of other formats, and a bounded length that ends with a word."""
    line = news(
        "Q &lt;b&gt;up&lt;/b&gt;", 'AT amp;T\\pays  #36;10; it #39;s &#38; "so" &quot;on&quot;'
    )
    assert line == 'Q up . AT &T pays $10; it \'s & "so" "on"'
    long = news("word " * 50, "other " * 50)
    assert 300 < len(long) <= 320
    assert long.endswith(("word", "other"))


# -- arms


def test_a_slow_round_changes_no_ratio() -> None:
    """Ratios are within a round; per token a short answer saves nothing."""
    steady = [[[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]], [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]]
    busy = [
        [[r * t for r, t in zip(turns, (1, 9, 3), strict=True)] for turns in arm] for arm in steady
    ]
    for seconds in (steady, busy):
        found = Clock(seconds, [[10, 10], [5, 10]]).against(1, 0)
        assert found["answers"] == pytest.approx({"median": 5 / 8, "low": 9 / 16, "high": 11 / 16})
        assert found["tokens"] == pytest.approx({"median": 7 / 8, "low": 13 / 16, "high": 15 / 16})
        assert found["total"] == pytest.approx(4 / 6)


def test_labels_are_compared_among_themselves() -> None:
    """The choice is the most probable token; what a short head cannot see is no label."""
    logits = torch.tensor([[0.0, 3.0, 5.0, 1.0, 9.0]])
    for tokens, best in [((1, 3), 1), ((3, 0), 3), ((1, 99), 1), ((98, 99), -1)]:
        choose = Labels(tokens)
        assert choose(logits, [0], 1) == [4]
        assert choose.best == best


@pytest.mark.parametrize("depth", [2, 6])
def test_an_arms_answers_are_its_plans(tiny: offramp.Model, depth: int) -> None:
    """Labels and choices by the logits of those layers, and the layers counted."""
    head = Tokens(tokens=(3, 40, 70, 200))
    plan = offramp.Plan(run=offramp.Path(layers=tuple(range(depth)), head=head))
    prompts = [[5, 80, 9], [7, 7, 200, 31, 64]]
    found = answer_all(Arm("a", tiny, plan), prompts, 1, [40, 200], 2)
    for prompt, new, label in zip(prompts, found.written, found.labels, strict=True):
        text = Text(list(prompt), tiny.backbone.open())
        [logits] = step(tiny.backbone, [text], layers=range(depth)).logits
        allowed = torch.tensor([*head.tokens, *tiny.eos])
        assert new == [int(allowed[logits[allowed].argmax()])]
        assert label == max((40, 200), key=lambda token: float(logits[token]))
    assert found.layers_saved == pytest.approx(1 - depth / 6)
    assert found.depths == [[depth], [depth]]
    assert found.operations < 1


def test_no_folder_of_this_machine_is_shown() -> None:
    """In a command with its paths, wherever they stand in a word."""
    assert [
        shown(word) for word in ("/a/b/c.json", "12:tokens:/a/b.json", "~/x/y", "runs/a", "e2e")
    ] == [*("c.json", "12:tokens:b.json", "y", "runs/a", "e2e")]


@pytest.fixture
def run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs the experiment on the tiny model and returns the arms' rows."""
    rows = [
        {"prompt": f"name: {name} | food: {food}\nText:", "completion": f" {name} has {food}."}
        for name in ("Ab", "Cd", "Ef")
        for food in ("x", "y")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))

    def once(*arms: tuple[str, str]) -> list[dict[str, Any]]:
        words = ["e2e", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.json")]
        words += ["--max-new-tokens", "6", "--rounds", "1", "--prompts", "2", "--weights", "fp32"]
        words += [word for name, plan in arms for word in ("--arm", name, str(checkpoint), plan)]
        monkeypatch.setattr(sys, "argv", ["narrow.py", *words])
        narrow.main()
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["texts"] == 6  # one of each prompt
        assert str(tmp_path) not in json.dumps(record)
        found: list[dict[str, Any]] = record["arms"]
        return found

    return once


def test_a_comparison_goes_on_where_it_stopped(
    run: Callable[..., list[dict[str, Any]]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was answered is not asked again; a new arm is compared with what was."""
    first = run(("full", "full"), ("three", "3"))
    rows, made = str(tmp_path / "rows.jsonl"), str(tmp_path / "list.json")
    words = [str(checkpoint), "--rows", rows, "--catalogue", rows, "--out", made]
    monkeypatch.setattr(sys, "argv", ["narrow_tokens.py", *words])
    narrow_tokens.main()
    asked = []

    def watched(arm: Arm, *rest: Any) -> Answers:
        asked.append(arm.name)
        return answer_all(arm, *rest)

    monkeypatch.setattr(narrow, "answer_all", watched)
    second = run(("full", "full"), ("three", "3"), ("list", f"3:tokens:{made}"))
    assert asked == ["list"]
    for one, other in zip(first, second, strict=False):
        assert {**one, "clock": 0} == {**other, "clock": 0}
    base, three, listed = second
    assert (base["layers_saved"], three["layers_saved"]) == (0, 0.5)
    assert base["differences"]["rouge_l"]["verdict"] == "not lower"
    assert base["clock"]["to_baseline"]["total"] == 1
    assert listed["operations"] < three["operations"]
    letters = json.loads(Path(made).read_text())
    assert 256 in letters  # the end of a text
    assert len(letters) == 1 + len(set(" Ab has x.Cd has y.Ef"))
    monkeypatch.setattr(narrow, "versions", lambda: {"torch": "another"})
    run(("full", "full"), ("three", "3"))
    assert asked == ["list", "full", "three"]  # what another version said is not merged


def test_others_race_the_first_arms_model(
    run: Callable[..., list[dict[str, Any]]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At full depth, over the same texts: their tokens are its, and all speeds are against it."""
    run(("full", "full"))  # which writes the rows
    source, out = str(checkpoint), tmp_path / "race.json"
    words = ["--rows", str(tmp_path / "rows.jsonl"), "--weights", "fp32", "--against", "hf"]
    words += ["--arm", "all", source, "full", "--arm", "three", source, "3", "--out", str(out)]
    words += ["--prompts", "2", "--tokens", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["narrow_race.py", *words])
    narrow_race.main()
    record = json.loads(out.read_text())
    assert str(tmp_path) not in json.dumps(record)
    whole, three, other = record["rows"]
    assert (whole["ratio_to_full"], whole["operations_to_full"]) == (1, 1)
    assert 0.4 < three["operations_to_full"] < 0.7
    assert (other["name"], other["full"], other["mismatches"]) == ("hf fp32", whole["name"], 0)


def test_arms_of_one_model_share_it(checkpoint: Path, tmp_path: Path) -> None:
    """And a plan that does not fit is refused before anything is answered."""
    source = str(checkpoint)
    arms = open_arms([("a", source, "full"), ("b", source, "2:shortlist:9")], "fp32")
    assert arms[0].model is arms[1].model
    assert [arm.full for arm in arms] == [True, False]
    [other] = open_arms([("c", f"{source}@int8", "full")], "fp32")
    assert (arms[0].model.backbone.weights, other.model.backbone.weights) == ("fp32", "int8")
    with pytest.raises(offramp.UsageError):
        open_arms([("a", source, "9")], "fp32")


def test_a_change_learns_to_bear_its_rounding(tmp_path: Path) -> None:
    """Rounded, it then says more nearly what the tuned model says than untaught."""
    base = save_wide(tmp_path / "base")
    tuned, tokenizer, _ = load_checkpoint(str(base))
    draw = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    examples = [
        Example(torch.randint(4, 259, (12,), generator=draw).tolist(), 3) for _ in range(64)
    ]
    teacher, origin = load_checkpoint(str(tmp_path / "tuned"))[0], load_checkpoint(str(base))[0]
    taught = load_checkpoint(str(tmp_path / "tuned"))[0]
    assert ship_narrow.teach(origin, taught, examples, 12 * 16 * 30) == 12 * 16 * 30

    def distance(model: Any) -> float:
        with torch.no_grad():
            for (_, weight), (_, before) in zip(
                model.named_parameters(), origin.named_parameters(), strict=True
            ):
                if is_grouped(weight.shape):
                    weight.copy_(before + rounded(weight - before))
            return float(ship_narrow._divergence(model, teacher, examples))

    untaught = load_checkpoint(str(tmp_path / "tuned"))[0]
    assert distance(taught) < 0.85 * distance(untaught)
