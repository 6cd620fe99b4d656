"""The experiments beside the papers: what is saved, the papers' settings, answers kept, tables."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import adainfer
import kept
import lite
import oracle
import papers
import pytest
import skip_exit
import sorted as sorted_llama
import sorted_figures
import torch
import tuning
from adainfer_tasks import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept, answered, first_rows, traced
from lite_figures import SETS, by_exit, curve
from narrow_arms import Arm
from papers import LITE_7B, SOFT_13B, layers_saved, operations_saved, saved_at, token_cost
from quality import quality

import offramp
from offramp.cost import full_depth
from offramp.plan import execute
from offramp.request import Request
from tests.conftest import save_tiny
from tests.test_cli import Shell, shell

__all__ = ["shell"]

ROOT = Path(__file__).parent.parent
LAW = settings(deadline=None, max_examples=60)
papers_settings = st.sampled_from([LITE_7B, SOFT_13B])
PROMPTS = [[5, 80, 9], [7, 7, 200, 31, 64], [90, 14], [33, 61, 120, 8]]


def exit_plan(kv: Any, thresholds: dict[int, float]) -> offramp.Plan:
    return offramp.Plan(run=offramp.Exit(signal="max_prob", thresholds=thresholds, kv=kv))


def at_half(model: offramp.Model) -> dict[int, float]:
    """Return thresholds at which about half of the tokens leave at each exit."""
    plain = [[*p, *run_alone(model, offramp.Plan(), p)[0]] for p in PROMPTS]
    trace = offramp.record(model.backbone, [(ids, 1) for ids in plain], (2, 4))
    middle = trace.scores["max_prob"].median(0).values.tolist()
    return dict(zip((2, 4), middle, strict=True))


def run_alone(
    model: offramp.Model, plan: offramp.Plan, prompt: list[int], count: int = 12
) -> tuple[list[int], list[int]]:
    """Return tokens and depths."""
    request = Request(list(prompt), count, eos=model.eos)
    done = list(execute(model.backbone, [request], plan.run, batch_size=1))
    return [token.id for token in done], [token.depth for token in done]


# -- the papers' settings


@LAW
@given(papers_settings, st.integers(2, 90))
def test_a_papers_exits_fit_any_depth(paper: papers.Setting, num_layers: int) -> None:
    """Ascending, inside the model; at the paper's own depth they and the thresholds are its own."""
    exits = paper.exits(num_layers)
    assert list(exits) == sorted(set(exits))
    assert exits[0] >= 1
    assert exits[-1] < num_layers
    assert paper.exits(paper.num_layers) == tuple(paper.thresholds)
    assert paper.at(paper.thresholds, paper.num_layers) == paper.thresholds


@LAW
@given(papers_settings, st.integers(2, 90), st.data())
def test_thresholds_are_those_of_the_nearest_exit(
    paper: papers.Setting, num_layers: int, data: st.DataObject
) -> None:
    """No exit of the paper is nearer, deeper exits are never stricter, all scales alike."""
    exits = data.draw(st.lists(st.integers(1, num_layers - 1), min_size=1, unique=True))
    found = paper.at(sorted(exits), num_layers)
    for stop, value in found.items():
        gaps = {own: abs(own / paper.num_layers - stop / num_layers) for own in paper.thresholds}
        near = [own for own, gap in gaps.items() if gap <= min(gaps.values()) + 1e-9]
        assert value == paper.thresholds[min(near)]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    doubled = paper.at([2 * stop for stop in sorted(exits)], 2 * num_layers)
    assert list(doubled.values()) == list(found.values())


# -- what is saved


depths = st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=20)


@LAW
@given(depths, st.floats(0, 10), st.floats(0, 0.5))
def test_checks_and_fills_only_cost(found: list[int], head: float, fill: float) -> None:
    """For nothing they save what layers do; full depth pays for the checks it made in vain."""
    free = saved_at(found, (2, 4), 6, 0, 0)
    assert free == pytest.approx(layers_saved(found, 6))
    assert free is not None
    for stop in (2, 4, 6):
        assert token_cost(stop, (2, 4), 6, head, fill) >= token_cost(stop, (), 6, 0, 0)
    assert saved_at([6], (2, 4), 6, head, fill) == pytest.approx(-2 * head / (6 + head))
    assert saved_at([6], (), 6, head, fill) == 0
    assert saved_at([], (2, 4), 6, head, fill) is layers_saved([], 6) is None


def test_the_price_of_a_token_is_what_the_meter_counts(tiny: offramp.Model, tmp_path: Path) -> None:
    """Checks, heads and fills of copied states; attention is what the price leaves out."""
    plan = exit_plan("copy", at_half(tiny))
    done = answered(Arm("a", tiny, plan), PROMPTS, 12, 2, tmp_path)
    shape = tiny.backbone.shape
    assert set(Counter(done.later)) == {2, 4, 6}
    work, prompts = done.work, full_depth([(p, 1) for p, _ in done.sizes], shape, 1)
    weights = (
        shape.layer_weights * (work.layer_tokens - prompts.layer_tokens)
        + shape.head_weights * (work.head_rows - prompts.head_rows)
        + shape.fill_weights * work.fill_rows
    )
    head, fill = (part / shape.layer_weights for part in (shape.head_weights, shape.fill_weights))
    priced = sum(token_cost(depth, (2, 4), 6, head, fill) for depth in done.later)
    assert weights / shape.layer_weights == pytest.approx(priced)


def test_full_depth_saves_nothing(tiny: offramp.Model, tmp_path: Path) -> None:
    """By any way of counting; a sub-model saves its layers, and more with prompts than without."""
    shape = tiny.backbone.shape
    full = answered(Arm("full", tiny, offramp.Plan()), PROMPTS, 8, 3, tmp_path)
    saved = operations_saved(full.work, full.sizes, shape)
    assert (saved.generated, saved.whole) == pytest.approx((0, 0))
    assert layers_saved(full.later, 6) == 0
    one = answered(Arm("one", tiny, offramp.Plan()), PROMPTS, 1, 3, tmp_path)
    assert operations_saved(one.work, one.sizes, shape).generated is None
    asked = answered(Arm("asked", tiny, exit_plan("copy", {2: 1.0})), PROMPTS, 8, 3, tmp_path)
    loss = operations_saved(asked.work, asked.sizes, shape)
    assert loss.generated is not None
    assert loss.generated < loss.whole < 0  # the prompt is no dearer; every later token is


# -- answers kept


def test_kept_answers_are_those_alone(
    tiny: offramp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, depths and loss of each text; a second look makes nothing, a killed one the rest."""
    arm = Arm("a", tiny, exit_plan("exact", at_half(tiny)))
    done = answered(arm, PROMPTS, 7, 3, tmp_path)
    for i, prompt in enumerate(PROMPTS):
        assert run_alone(tiny, arm.plan, prompt, 7) == (done.written[i], done.depths[i])
        ids = [*prompt, *done.written[i]]
        seen = offramp.record(tiny.backbone, [(ids, len(prompt))], ())
        assert done.loss[i] == pytest.approx(seen.loss.sum().item(), rel=1e-4)
    made = list(tmp_path.iterdir())
    assert len(made) == 2
    made[0].unlink()
    asked: list[int] = []
    answer = kept._answer

    def watched(arm: Arm, batch: list[list[int]], count: int) -> dict[str, Any]:
        asked.append(len(batch))
        return answer(arm, batch, count)

    monkeypatch.setattr(kept, "_answer", watched)
    assert answered(arm, PROMPTS, 7, 3, tmp_path) == done
    assert len(asked) == 1
    for other in (Arm("b", tiny, offramp.Plan()), arm):  # another plan; another length
        answered(other, PROMPTS[:3], 6, 3, tmp_path)
    assert len(asked) == 3


def test_a_kept_trace_is_the_trace(tiny: offramp.Model, tmp_path: Path) -> None:
    """Whatever the batches; and its figures are those of its tokens."""
    texts = [([*p, *run_alone(tiny, offramp.Plan(), p)[0]], len(p)) for p in PROMPTS]
    whole = offramp.record(tiny.backbone, texts, (2, 4))
    for _ in range(2):
        found = traced(tiny.backbone, texts, (2, 4), 3, tmp_path)
        assert found.rows == whole.rows
        assert torch.equal(found.chosen, whole.chosen)
    first = first_rows(whole.rows)
    assert first.sum() == len(texts)
    assert all(
        part.tolist() == [True] + [False] * (len(part) - 1) for part in first.split(whole.rows)
    )
    for k, row in enumerate(by_exit(whole)):
        assert row["agreement"] == pytest.approx(whole.agrees[:, k].double().mean().item())
        assert sum(part["tokens"] for part in row["reliability"]) == len(whole.chosen)
    rows = curve(whole)[1:]
    saved = [row["layers_saved"] for row in rows]
    assert saved == sorted(saved, reverse=True)  # a stricter bar saves no more


def test_nothing_kept_is_of_another_model_or_version(
    tiny: offramp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer or a trace made by anything else is made again, and neither lies over the other."""
    other = offramp.load(str(save_tiny(tmp_path / "other", seed=7)), backbone="hf")
    folder = tmp_path / "kept"

    def made(model: offramp.Model) -> tuple[Any, int]:
        texts = [(prompt, 1) for prompt in PROMPTS]
        done = answered(Arm("a", model, offramp.Plan()), PROMPTS, 5, 4, folder)
        plain, hidden = (
            traced(model.backbone, texts, (2, 4), 4, folder, keep_hidden=one)
            for one in (False, True)
        )
        assert plain.hidden is None
        assert hidden.hidden is not None
        assert plain.fingerprint == hidden.fingerprint == model.backbone.fingerprint
        return done, len(list(folder.iterdir()))

    own, first = made(tiny)
    assert first == 3
    assert made(other)[1] == 2 * first
    assert made(tiny) == (own, 2 * first)
    monkeypatch.setattr(kept, "versions", lambda: {"torch": "another"})
    assert made(tiny) == (own, 3 * first)


def test_the_same_answers_are_as_good(tiny: offramp.Model, tmp_path: Path) -> None:
    """Every likeness of a text to itself is whole, an empty one's too."""
    full = answered(Arm("a", tiny, offramp.Plan()), PROMPTS, 8, 3, tmp_path)
    empty = Kept([[5]], [[256]], [[6]], [0.5], {})
    for one in (full, empty):
        found = quality(one, one, tiny.tokenizer, lambda own, other: [1.0] * len(own))
        assert found["same_text"] == found["rouge_l"] == found["length_ratio"] == 1
        assert found["loss"] == found["full_loss"]
    halved = Kept(full.prompts, [new[:4] for new in full.written], [], full.loss, {})
    short = quality(halved, full, tiny.tokenizer)
    assert short["length_ratio"] == pytest.approx(0.5)
    assert short["same_text"] == 0
    assert short["similarity"] is None
    assert short["rouge_l"] is not None
    assert short["rouge_l"] < 1


# -- the whole experiments, on a tiny model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets of a few rows, as they lie in the folder of data."""
    rows = [
        {"set": name, "instruction": f"Say {word}", "input": ""}
        for name in SETS
        for word in ("ab", "cd", "ef")
    ]
    folder = tmp_path / "data"
    _write(folder / "lite_test_sets" / "all_730.jsonl", rows)
    _write(folder / "pandalm_test" / "prompts_unique.jsonl", rows)
    for name in ("antonym", "present-past"):
        pairs = [{"input": f"in{i}", "output": f"{'ab'[i % 2]}{i}"} for i in range(14)]
        place = folder / "function_vectors" / "abstractive" / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(pairs))
    reviews = "".join(f"{i % 2} it is {word}\n" for i, word in enumerate("abcdefghijklmn"))
    (folder / "sst2_and_small_cls").mkdir()
    (folder / "sst2_and_small_cls" / "stsa.binary.dev").write_text(reviews)
    learnt = [{"instruction": f"Tell {i}", "input": "", "output": f"It is {i}."} for i in range(9)]
    _write(folder / "alpaca_52k" / "alpaca_data_52k.jsonl.gz", learnt)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def tables() -> ModuleType:
    """The module of the tables of papers."""
    spec = importlib.util.spec_from_file_location("paper_tables", ROOT / "docs/paper_tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs an experiment and returns its record."""

    def once(program: ModuleType, *words: str) -> Any:
        out = tmp_path / "out.json"
        small = ["--max-new-tokens", "6", "--rounds", "1", "--prompts", "2", "--weights", "fp32"]
        given = [*words, "--data", str(data), "--out", str(out), *small]
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *given])
        program.main()
        record = json.loads(out.read_text())
        assert str(tmp_path) not in json.dumps(record)
        return record

    return once


def test_lite_ends_in_a_table(
    run: Callable[..., Any], checkpoint: Path, tables: ModuleType
) -> None:
    """Sets add up to all; every figure of the paper has ours beside it and what differs."""
    words = (str(checkpoint), "--exits", "2,4", "--limit", "2", "--sweep", "0", "1")
    record = run(lite, *words)
    assert record["prompts"] == dict.fromkeys(SETS, 2)
    paper, exact, nothing, all_ = (point["sets"]["all"] for point in record["points"])
    assert nothing["layers_saved"] == pytest.approx(4 / 6)  # at 0 all leave at the first exit
    assert all_["layers_saved"] == 0
    assert all_["same_text"] == 1
    assert all_["operations_saved"] < 0
    assert exact["layers_saved"] is not None
    for point in record["points"]:
        every, each = point["sets"]["all"], [point["sets"][name] for name in SETS]
        assert every["tokens"] == sum(row["tokens"] for row in each)
        assert sum(point["histogram"].values()) == every["tokens"] - 8
    again = run(lite, *words)
    for one, other in zip(record["points"], again["points"], strict=True):
        assert {**one, "clock": 0} == {**other, "clock": 0}
    text = tables.lite(record)
    assert {"37.86%", "46.35%"} <= set(re.findall(r"\d\d\.\d\d%", text))
    assert f"{paper['operations_saved']:.1%}" in text
    assert all(row["same"] for row in record["comparison"])
    assert text.count("\n| paper's thresholds | ") == 5 + 1  # sets and all; tokens by depth


@pytest.mark.parametrize("kept_out", [4, 0])
def test_what_became_of_the_last_layer_is_what_tuning_told(
    shell: Shell, checkpoint: Path, tmp_path: Path, kept_out: int
) -> None:
    """On rows kept out; a tuning that kept none out watched others."""
    rows = [{"prompt": f"Say {i}", "completion": f"it is {i}"} for i in range(12)]
    for name, some in (("learnt", rows), ("watched", rows[:5])):
        _write(tmp_path / f"{name}.jsonl", some)
    status, _, _ = shell(
        *("tune", checkpoint, "--recipe", "sft", "--length", 64, "--precision", "fp32"),
        *("--data", tmp_path / "learnt.jsonl", "--held-out", kept_out),
        *("--watch", tmp_path / "watched.jsonl", "--out", tmp_path / "tuned"),
    )
    assert status == 0
    told = json.loads((tmp_path / "tuned" / "report.json").read_text())
    text = next(name for name in told["after"] if ("held out" in name) == bool(kept_out))
    losses = lite._last_layer(tmp_path / "tuned")
    assert losses == {when: told[when][text][-1]["loss"] for when in ("before", "after")}
    assert losses["before"] != losses["after"]
    assert lite._last_layer(checkpoint) is None


def test_sorted_ends_in_a_table(
    run: Callable[..., Any],
    checkpoint: Path,
    tmp_path: Path,
    tables: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every depth of every model is judged; speculation writes the very same."""
    monkeypatch.setattr(sorted_llama, "SEEN", 4)
    cut = save_tiny(tmp_path / "cut", layers=4, seed=1)
    record = run(
        *(sorted_llama, "--sorted", str(checkpoint), "--sft", str(checkpoint)),
        *("--extracted", str(cut), "--exits", "2,4", "--limit", "3", "--answers"),
    )
    judged = [(row["model"], row["depth"]) for row in record["depths"]]
    both = [(name, depth) for name in ("sorted", "sft") for depth in (2, 4, 6)]
    assert judged == [*both, ("extracted", 4)]
    assert [(row["model"], row["depth"]) for row in record["answers"]] == judged
    assert record["answers"][2]["same_text"] == 1
    drafts = [point for point in record["points"] if point["kind"] in ("speculate", "adapt")]
    assert [point["quality"]["same_text"] for point in drafts] == [1, 1, 1]
    assert all(0 <= point["rejected"] <= 1 for point in drafts[:2])
    text = tables.sorted_llama(record)
    for words in ("1.34x", "1.16x", "-0.165 (12 of 40)", "| extracted | 4 |"):
        assert words in text
    rows = {row["what"] for row in record["comparison"]}
    assert "sorted against extracted, depth 4" in rows


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs an experiment with these words alone, and returns its record."""

    def once(program: ModuleType, *words: object) -> Any:
        out = tmp_path / "out.json"
        called = [f"{program.__name__}.py", *map(str, words), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", called)
        program.main()
        record = json.loads(out.read_text())
        folders = [str(word) for word in words if "/" in str(word)]
        assert not [place for place in [str(tmp_path), *folders] if place in out.read_text()]
        names = [Path(str(word)).name if "/" in str(word) else str(word) for word in words]
        shown = f"python experiments/{called[0]} {' '.join(names)} --out out.json"
        assert record["command"] == shown
        return record

    return once


def test_adainfer_does_not_mix_models(
    alone: Callable[..., Any],
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One place for results, two models: each has its own traces, and the first its own figures."""
    some = {name: TASKS[name] for name in ("sst2", "antonym", "present-past")}
    monkeypatch.setattr(adainfer, "TASKS", some)
    monkeypatch.setattr(adainfer, "CHECKS", (offramp.checks.FULL_HEAD,))
    words = ("--exits", "2,4", "--weights", "fp32", "--data", data, "--limit", 6)
    other = save_tiny(tmp_path / "other", seed=5)
    first, second = (alone(adainfer, model, *words) for model in (checkpoint, other))
    assert first["tasks"] != second["tasks"]
    kept_files = len(list((tmp_path / "out.answers").iterdir()))
    again = alone(adainfer, checkpoint, *words)
    assert (again["tasks"], again["rows"]) == (first["tasks"], first["rows"])
    assert len(list((tmp_path / "out.answers").iterdir())) == kept_files
    assert [facts["texts"] for facts in first["tasks"].values()] == [6, 6, 6]


def test_the_oracle_goes_on_and_is_cut_down(
    alone: Callable[..., Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run answers and traces nothing, and says the same."""
    some = [arm for arm in oracle.ARMS if arm[1] != "match"]  # a random model never matches
    monkeypatch.setattr(oracle, "ARMS", some)
    rows = [
        {"instruction": f"Say {i}", "input": "", "reference": f"It is {i * 7}, no more."}
        for i in range(30)
    ]
    _write(tmp_path / "asked.jsonl", [*rows, {"instruction": "x", "input": "", "reference": ""}])
    few = ("--first", 3, "--look", 2, "--max-new-tokens", 8, "--limit", 24)
    words = ("--data", tmp_path / "asked.jsonl", "--model", checkpoint, *few)
    first = alone(oracle, *words)
    assert max(arm["texts"] for arm in first["arms"]) <= 24
    monkeypatch.setattr(kept, "record", None)
    monkeypatch.setattr(kept, "answer_all", None)
    assert alone(oracle, *words) == first


def test_skip_exit_says_how_it_was_called(
    alone: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    """And judges as many texts as it was told."""
    text = tmp_path / "text.txt"
    text.write_text("A line of words, and one more. " * 120)
    words = ("--data", text, "--model", checkpoint, "--keep", 4, "--loss-keep", 5, "--limit", 2)
    record = alone(skip_exit, *words)
    assert record["tokens"] == 2 * 127
    assert {row["arm"] for row in record["rows"]} == {"exit", "uls", "cosine"}


def test_what_is_not_lossless_ends_the_run(tiny: offramp.Model) -> None:
    """A draft that wrote another token, in full precision."""
    full = Kept([[5]], [[7, 8]], [[6, 6]], [1.0], {})
    other = Kept([[5]], [[7, 9]], [[6, 6]], [1.0], {})
    arm = Arm("draft", tiny, offramp.Plan(run=offramp.Speculate(draft=(0, 1))))
    with pytest.raises(offramp.OfframpError, match="1 answers are not"):
        sorted_figures.point(arm, other, full, None)


def test_the_commands_that_make_the_models_parse() -> None:
    """Every option that the docstrings show exists."""
    from typer.main import get_command

    from offramp.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    texts = [str(program.__doc__).replace("\\\n", " ") for program in (lite, sorted_llama)]
    lines = [line.split() for text in texts for line in text.splitlines() if "offramp " in line]
    shown = [words for words in lines if words[0] == "offramp"]
    assert len(shown) == 6
    for _, verb, *arguments in shown:
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known


TARGETS = ("paper-lite", "paper-adainfer", "paper-layers", "paper-sorted", "policies")


def _recipe(target: str, *words: str) -> list[list[str]]:
    """Return the commands of experiments that a target would run, as words."""
    asked = ["make", "--dry-run", "--old-file=.venv/.ready", target, *words]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if "experiments/" in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("limit", [(), ("LIMIT=3",)])
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_tunes_what_its_experiments_read(target: str, limit: tuple[str, ...]) -> None:
    """Arms that exist, behind those they start from; options that exist; a try spares results."""
    runs, out = ("runs-3", "runs-3") if limit else ("runs", "results")
    made: set[str] = set()
    for script, *words in _recipe(target, "DATA=data", *limit):
        source = (ROOT / script).read_text()
        options = [word for word in words if word.startswith("--")]
        assert [option for option in options if f'"{option}"' not in source] == (
            [one for one in ("--sorted", "--sft", "--ict") if one in words and "sorted" in script]
        )
        assert ("--limit" in options) == bool(limit)
        if script.endswith("tuning.py"):
            task = next(word for word in words if word in tuning.TASKS)
            named = words[words.index("--only") + 1 :] if "--only" in words else None
            for arm in tuning.TASKS[task]:
                if named is None or arm.name in named:
                    assert arm.start is None or f"{runs}/{task}-{arm.start}" in made
                    made.add(f"{runs}/{task}-{arm.name}")
            continue
        written = words[words.index("--out") + 1]
        assert written.startswith(f"{out}/")
        assert limit or (ROOT / written).is_file()
        ours = {word for word in words if word.startswith(f"{runs}/")} - {written}
        models = {word for word in ours if not word.startswith(f"{runs}/data/")}
        assert models <= made
    assert made


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_target_asks_for_the_data() -> None:
    """Before anything is run."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        _recipe("paper-lite")
    assert "say DATA=" in failed.value.stderr


def test_every_arm_can_be_tuned() -> None:
    """Its options are those of `offramp tune`; a try changes how much, and nothing else."""
    from typer.main import get_command

    from offramp.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    known = {option for parameter in verbs["tune"].params for option in parameter.opts}
    for task, arms in tuning.TASKS.items():
        names = [arm.name for arm in arms]
        assert len(set(names)) == len(names)
        for arm in arms:
            words = tuning.tune_command(arm, task, Path("data"), Path("runs"))
            assert {word for word in words if word.startswith("--")} <= known
            assert (arm.start, arm.of) == (None, None) or {arm.start, arm.of} - {None} <= set(names)
            assert arm.cut is None or words[4] == f"runs/cut-{arm.cut}"


def test_a_draft_is_compared_with_the_papers_nearest() -> None:
    """By share of the depth; with the shallower one of two."""
    for depth in range(1, 40):
        like = sorted_figures.nearest(sorted_figures.SPECULATED, depth, 40)
        gaps = {own: abs(own - depth) for own in sorted_figures.SPECULATED}
        assert gaps[like] == min(gaps.values())
    assert sorted_figures.nearest(sorted_figures.SPECULATED, 14, 40) == 12
