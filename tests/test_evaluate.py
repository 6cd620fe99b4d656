"""The comparison of a plan with full depth: what it must equal, how it goes on, what it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import offramp
from offramp.errors import OfframpError, UsageError
from offramp.evaluate.items import Item
from offramp.evaluate.kept import Group, facts_of
from offramp.evaluate.run import Judged, Settings, compare
from offramp.evaluate.tasks import Kind, Task
from offramp.journal import append
from offramp.policy import Threshold
from offramp.text import encode
from offramp.trace import record, replay
from tests.test_cli import Shell, shell
from tests.tools import own_answer, own_logits

__all__ = ["shell"]

FULL = offramp.Plan()
EXITS = Threshold("max_prob", ((2, 0.25), (4, 0.3)))
LEAVING = offramp.Plan(run=offramp.Exit(signal="max_prob", thresholds=dict(EXITS.thresholds)))
SMALL = Settings(max_new_tokens=6, batch_size=2)
WORDS = ("sun", "moon", "a star", "rain, then snow", "the hill", "x")


def task(kind: Kind, *scores: str, name: str = "made-up", count: int = 6) -> Task:
    """A task of short texts; of a choice, every letter that may be right is one token."""

    def make(_: Sequence[Path], draw: random.Random) -> list[Item]:
        asked = [f"{word} {i}" for i, word in enumerate((WORDS * 3)[:count])]
        return [Item(text, (draw.choice("ab"), "c")) for text in asked]

    return Task(name, kind, make, scores, most=1 if kind == "choice" else None)


CHOICE = task("choice", "accuracy", name="choice")
ANSWER = task("answer", "rouge_l", "chrf", "exact_match", "f1", name="answer")
READING = task("reading", name="reading")
ALL = [CHOICE, ANSWER, READING]


def compared(
    model: offramp.Model,
    plan: offramp.Plan,
    tasks: Sequence[Task],
    settings: Settings = SMALL,
    kept: Path | None = None,
) -> list[Judged]:
    """What comes of these tasks."""
    asked = [(one, one.items(None, settings.seed)) for one in tasks]
    return compare(model, plan, asked, settings, kept=kept, show=False)


def groups(path: Path) -> list[Group]:
    """What was kept."""
    return [Group.model_validate_json(line) for line in path.read_text().splitlines()[1:]]


def scores(judged: Sequence[Judged]) -> str:
    """Everything that no clock has a say in, as text."""
    told = [one.as_dict() for one in judged]
    timed = ("seconds", "time_ratio", "time_per_token_ratio")
    return json.dumps([{k: v for k, v in one.items() if k not in timed} for one in told])


def row(judged: Judged, name: str) -> Any:
    """One score."""
    return next(one for one in judged.rows if one.score == name)


# -- what it must equal


def test_full_depth_is_equal_to_itself(tiny: offramp.Model) -> None:
    """Every difference is 0, with no interval around it; nothing is saved, and all is paid once."""
    for one in compared(tiny, FULL, ALL):
        for found in one.rows:
            gain = found.difference
            assert (gain.mean, gain.low, gain.high, found.verdict) == (0, 0, 0, "equal")
            assert found.plan == found.full
        assert (one.costs["layers_saved"], one.costs["flops_saved"]) == (0, 0)
        assert one.costs["mean_depth"] == 6
        assert one.costs["tokens"]["plan"] == one.costs["tokens"]["full"]


def test_the_full_model_is_hugging_faces(tiny: offramp.Model, tmp_path: Path) -> None:
    """Its greedy texts, the accuracy of its first tokens, and the loss it gives to answers."""
    kept = tmp_path / "kept"
    choice, answer = compared(tiny, LEAVING, [CHOICE, ANSWER], kept=kept)
    written = [one for group in groups(kept) for one in group.full.answers]
    items = ANSWER.items(None, 0)
    prompts = [encode(tiny.tokenizer, item.prompt, raw=True) for item in items]
    own = [own_answer(tiny.backbone, ids, 6) for ids in prompts]  # type: ignore[arg-type]
    assert [list(one.ids) for one in written[6:]] == own
    texts = [tiny.tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    assert [one.text for one in written[6:]] == texts
    assert len(set(texts)) > 3
    right = [
        tiny.tokenizer.decode(ids[:1]) in item.references
        for ids, item in zip(own, CHOICE.items(None, 0), strict=True)
    ]
    assert choice.rows[0].full.mean == pytest.approx(sum(right) / len(right))
    plan = [one for group in groups(kept)[3:] for one in group.plan.answers]
    for ids, found in zip(prompts, plan, strict=True):
        logits = own_logits(tiny.backbone, [*ids, *found.ids])  # type: ignore[arg-type]
        told = logits[len(ids) - 1 : -1].log_softmax(-1)
        loss = -told[range(len(found.ids)), list(found.ids)].mean().item()
        assert found.loss == pytest.approx(loss, abs=1e-4)
    means = [sum(one.loss or 0 for one in arm) / 6 for arm in (plan, written[6:])]
    found_row = row(answer, "loss_of_answer")
    assert [found_row.plan.mean, found_row.full.mean] == pytest.approx(means)


def test_accuracy_is_the_share_of_right_first_tokens(tiny: offramp.Model) -> None:
    """What the model says is right is all right; anything else is wrong."""
    prompts = [item.prompt for item in CHOICE.items(None, 0)]
    said = [tiny.generate(p, max_new_tokens=1, raw=True).outputs[0].token_ids[0] for p in prompts]
    texts = [tiny.tokenizer.decode([token]) for token in said]
    items = [Item(p, (text,)) for p, text in zip(prompts, texts, strict=True) if text.isascii()]
    assert len(items) > 2
    [judged] = compare(tiny, FULL, [(CHOICE, items)], SMALL, show=False)
    assert judged.rows[0].full.mean == 1
    wrong = [Item(item.prompt, ("~" if item.references != ("~",) else "q",)) for item in items]
    [judged] = compare(tiny, FULL, [(CHOICE, wrong)], SMALL, show=False)
    assert judged.rows[0].full.mean == 0


def test_perplexity_is_the_direct_one_and_the_replays(tiny: offramp.Model, tmp_path: Path) -> None:
    """At full depth the model's own; under exits what a replay says, and at a depth its trace."""
    texts = [encode(tiny.tokenizer, item.prompt, raw=True) for item in READING.items(None, 0)]
    own = [
        torch.nn.functional.cross_entropy(
            own_logits(tiny.backbone, ids)[:-1],  # type: ignore[arg-type]
            torch.tensor(ids[1:]),
            reduction="sum",
        ).item()
        for ids in texts
    ]
    count = sum(len(ids) - 1 for ids in texts)
    trace = record(tiny.backbone, [(ids, 1) for ids in texts], (2, 4))
    left = replay(trace, EXITS)
    assert len(left.depths.unique()) == 3
    cut = offramp.Plan(run=offramp.Path(layers=(0, 1)))
    for plan, losses in ((LEAVING, left.loss), (cut, trace.loss[:, 0])):
        kept = tmp_path / plan.run.kind
        [judged] = compared(tiny, plan, [READING], kept=kept)
        loss, perplexity = judged.rows
        assert loss.full.mean == pytest.approx(sum(own) / count, abs=1e-4)
        assert perplexity.full.mean == pytest.approx(math.exp(sum(own) / count), rel=1e-3)
        assert loss.plan.mean == pytest.approx(losses.double().mean().item(), abs=1e-4)
        assert perplexity.plan.mean == pytest.approx(math.exp(loss.plan.mean))
        if plan is LEAVING:
            depths = [d for g in groups(kept) for one in g.plan.answers for d in one.depths]
            assert depths == left.depths.tolist()


def test_what_is_saved_is_what_generate_counts(tiny: offramp.Model) -> None:
    """Checks, fills and all, over the same tokens."""
    for plan in (
        LEAVING,
        LEAVING.model_copy(update={"run": LEAVING.run.model_copy(update={"kv": "copy"})}),
    ):
        [judged] = compared(tiny, plan, [ANSWER], Settings(max_new_tokens=6, batch_size=6))
        prompts = [item.prompt for item in ANSWER.items(None, 0)]
        done = tiny.generate(prompts, plan=plan, max_new_tokens=6, raw=True, batch_size=6)
        told = done.figures.as_dict()
        assert judged.costs["flops_ratio"] == pytest.approx(told["flops_ratio"])
        assert judged.costs["mean_depth"] == pytest.approx(told["mean_depth"])
        assert judged.costs["tokens"]["plan"] == told["tokens"]


def test_likeness_is_1_for_the_same_answer_and_only_then_asked(tiny: offramp.Model) -> None:
    """Whatever the judge says of equal texts."""
    asked = [(ANSWER, ANSWER.items(None, 0))]
    for plan, expected in ((FULL, 1.0), (offramp.Plan(run=offramp.Path(layers=(0,))), 0.25)):
        [judged] = compare(
            tiny, plan, asked, SMALL, likeness=lambda own, _: [0.25] * len(own), show=False
        )
        assert row(judged, "similarity_to_full").plan.mean == expected


# -- going on


def test_a_judge_sees_both_answers_and_those_without_a_verdict_do_not_count(
    tiny: offramp.Model,
) -> None:
    """Wins count 1, ties a half; what was asked is told, and which answer is whose."""
    told: list[tuple[str, str, str]] = []

    def judge(texts: Sequence[tuple[str, str, str]]) -> list[float | None]:
        told.extend(texts)
        return [1.0, 0.5, 0.0, 1.0, None, None]

    asked = [(ANSWER, ANSWER.items(None, 0))]
    [judged] = compare(tiny, LEAVING, asked, SMALL, judge=judge, show=False)
    found = row(judged, "preferred")
    assert (found.plan.mean, found.full.mean, found.better) == (0.625, 0.5, "higher")
    assert [prompt for prompt, _, _ in told] == [item.prompt for item in ANSWER.items(None, 0)]
    [plain] = compare(tiny, FULL, asked, SMALL, show=False)
    assert "preferred" not in [one.score for one in plain.rows]
    prompts = [encode(tiny.tokenizer, one, raw=True) for one, _, _ in told]
    own = [own_answer(tiny.backbone, ids, 6) for ids in prompts]  # type: ignore[arg-type]
    texts = [tiny.tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    assert [full for _, _, full in told] == texts
    assert [plan for _, plan, _ in told] != texts


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_was_killed_goes_on(
    tiny: offramp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Byte for byte the scores of one that was not, and nothing is asked twice."""
    unbroken = scores(compared(tiny, LEAVING, ALL))
    kept, asked = tmp_path / "kept", []

    def dies(path: Path, found: dict[str, Any]) -> None:
        asked.append((found["task"], found["number"]))
        if len(asked) == stop:
            path.write_text(path.read_text() + json.dumps(found)[:99])  # cut off by the kill
            asked.pop()
            raise KeyboardInterrupt
        append(path, found)

    monkeypatch.setattr("offramp.evaluate.run.append", dies)
    with pytest.raises(KeyboardInterrupt):
        compared(tiny, LEAVING, ALL, kept=kept)
    stop = 0
    assert scores(compared(tiny, LEAVING, ALL, kept=kept)) == unbroken
    assert len(asked) == len(set(asked)) == 9
    assert scores(compared(tiny, LEAVING, ALL, kept=kept)) == unbroken
    assert len(asked) == 9


def test_results_of_anything_else_are_refused(
    tiny: offramp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan, seed or version; other items; a file that holds something else."""
    kept = tmp_path / "kept"
    compared(tiny, LEAVING, [CHOICE], kept=kept)
    whole = kept.read_text()
    with pytest.raises(OfframpError, match="answers with another plan"):
        compared(tiny, FULL, [CHOICE], kept=kept)
    with pytest.raises(OfframpError, match="answers with another seed"):
        compared(tiny, LEAVING, [CHOICE], Settings(seed=1, max_new_tokens=6, batch_size=2), kept)
    with pytest.raises(OfframpError, match="other items of choice"):
        compared(tiny, LEAVING, [task("choice", "accuracy", name="choice", count=5)], kept=kept)
    for wrong in ("{}\n{}\n", whole + "{}\n", "[]\n1\n", "no\nyes\n"):
        kept.write_text(wrong)
        with pytest.raises(OfframpError, match="holds"):
            compared(tiny, LEAVING, [CHOICE], kept=kept)
    kept.write_text(whole)
    monkeypatch.setattr("offramp.evaluate.kept.versions", lambda: {"offramp": "9"})
    with pytest.raises(OfframpError, match="answers with another versions"):
        compared(tiny, LEAVING, [CHOICE], kept=kept)
    assert kept.read_text() == whole


def test_a_plans_files_are_part_of_it(tiny: offramp.Model, tmp_path: Path) -> None:
    """A list of tokens that changed is another plan, though its name is the same."""
    file = tmp_path / "gates"
    file.write_text("one")
    plan = offramp.Plan(run=offramp.Exit(signal="x", thresholds={2: 0.5}, classifier=str(file)))
    first = facts_of(tiny, plan)
    file.write_text("two")
    assert facts_of(tiny, plan) != first


# -- what it refuses


def test_what_cannot_be_compared_is_refused(tiny: offramp.Model) -> None:
    """No item that fits, a draft that would know the text, a head that cannot write it."""
    long = [Item("x" * 300, ("a",))]
    with pytest.raises(OfframpError, match="none of 1 items of choice fits into the 256 tokens"):
        compare(tiny, FULL, [(CHOICE, long)], SMALL, show=False)
    some = [Item("x", ("a",)), *long]
    [judged] = compare(tiny, FULL, [(CHOICE, some)], SMALL, show=False)
    assert (judged.items, judged.left_out) == (1, 1)
    draft = offramp.Plan(run=offramp.Speculate(draft=(0, 1)))
    with pytest.raises(UsageError, match="lossless"):
        compared(tiny, draft, [READING])
    assert row(compared(tiny, draft, [ANSWER])[0], "token_agreement").verdict == "equal"
    head = {"kind": "shortlist", "size": 9}
    run_ = offramp.Path.model_validate({"kind": "path", "layers": [0], "head": head}, strict=False)
    with pytest.raises(OfframpError, match="cannot write every token of reading"):
        compared(tiny, offramp.Plan(run=run_), [READING])


# -- the command


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of a user's own rows."""
    file = tmp_path / "mine.jsonl"
    made = [
        {"prompt": "hi", "references": ["ho", "hey"]},
        {"instruction": "say", "input": "it", "output": "it"},
        {"messages": [{"role": "user", "content": "a"}], "reference": "b"},
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    return file


def test_the_command_tells_what_the_library_finds(
    shell: Shell, checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    """As a table, as JSON on the last line, and as a file that a report shows."""
    out = tmp_path / "out.json"
    words = ("evaluate", checkpoint, "--tasks", rows, "--exit", 2, "--max-new-tokens", 5)
    status, told, _ = shell(*words, "--out", out)
    assert status == 0
    assert "rouge l" in told
    assert "saved by the plan" in told
    record = shell.json(*words, "--out", out)
    assert record == json.loads(out.read_text())
    assert record["seed"] == 0
    [judged] = record["tasks"]
    assert (judged["task"], judged["items"]) == ("mine.jsonl", 3)
    assert [one["score"] for one in judged["scores"]][:2] == ["rouge_l", "chrf"]
    assert judged["mean_depth"] == 2
    assert judged["layers_saved"] == pytest.approx(4 / 6)
    page = tmp_path / "page.html"
    assert shell("report", out, "--out", page)[0] == 0
    assert "mine.jsonl" in page.read_text()


def test_every_mistake_is_one_sentence(
    shell: Shell, checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model loads, where it can be."""
    exit_ = ("evaluate", checkpoint, "--exit", 2, "--tasks")
    shell.refused(2, "name different tasks", *exit_[:-1])
    shell.refused(2, "name different tasks", *exit_, "sst2,sst2")
    shell.refused(2, "there is no task 'sst3'; there are vicuna, koala", *exit_, "sst3")
    shell.refused(2, "name the folder with --data", *exit_, "sst2")
    shell.refused(1, "get it from SST-2", *exit_, "sst2", "--data", tmp_path)
    shell.refused(2, "name what to compare", "evaluate", checkpoint, "--tasks", rows)
    place = tmp_path / "ag_news" / "test.csv"
    place.parent.mkdir()
    for text, said in (("", "has no items"), ('"9","a","b"\n', "is not what AG News")):
        place.write_text(text)
        shell.refused(1, said, *exit_, "ag_news", "--data", tmp_path)
    for line, said in (
        ('{"prompt": "a", "references": [1]}', "list of texts"),
        ('{"text": "a"}', "asks nothing"),
        ("3", "not a JSON object"),
        ('{"prompt": "a", "reference": "b"}\n{"prompt": "c"}', "row 2 has no reference"),
        ("", "holds no rows"),
    ):
        rows.write_text(line + "\n")
        shell.refused(1, said, *exit_, rows)
    rows.write_text('{"prompt": "a"}\n')
    shell.refused(2, "name it with --out", *exit_, rows, "--judge", "http://localhost/v1")
    bad = ("--judge", "localhost", "--out", tmp_path / "out.json")
    shell.refused(2, "must be http:// or https://", *exit_, rows, *bad)
    keyed = ("--judge", "http://localhost/v1", "--out", tmp_path / "o.json", "--judge-key", "NONE_")
    shell.refused(2, "the judge's key is not in the environment", *exit_, rows, *keyed)
    monkeypatch.setattr("offramp.evaluate.similarity.find_spec", lambda _: None)
    shell.refused(1, "offramp[similarity]", *exit_, rows, "--similarity")
    monkeypatch.setattr("offramp.evaluate.overlap.find_spec", lambda _: None)
    shell.refused(1, "offramp[evaluate]", *exit_, rows)
