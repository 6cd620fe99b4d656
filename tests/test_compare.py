"""Every experiment ends beside its paper, and what a record says of that is made of its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import adainfer
import adainfer_figures
import claims_table
import compare
import deciding_tables
import oracle
import paper_tables
import pytest
import skip_exit
import skip_gates

from offramp.checks import FULL_HEAD, Shortlist
from offramp.evaluate.items import Item
from offramp.tune.run import tune
from tests.test_tune_loop import settings

ROOT = Path(__file__).parent.parent
RECORDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")}
COMPARED = sorted(name for name, record in RECORDS.items() if "comparison" in record)
WORDS = ["cat", "dog", "sun", "sea", "oak", "red"]


def here(record: dict[str, Any], what: str) -> str:
    """Return what a record says of itself in the row of that name."""
    program = sys.modules[Path(record["command"].split()[1]).stem]
    rows = {row["what"]: row["here"] for row in program.comparison(record)}
    return str(rows[what])


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Return a function that runs an experiment, sees its table and returns its record."""

    def once(program: ModuleType, *words: str) -> Any:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *words, "--out", str(out)])
        program.main()
        record = json.loads(out.read_text())
        assert record["deviations"]
        assert record["comparison"]
        assert record["comparison"] == program.comparison(record)
        shown = capsys.readouterr().out
        assert "| | paper | here | same metric, same definition? |" in shown
        assert all(f"| {row['here']} | {row['same']} |" in shown for row in record["comparison"])
        return record

    return once


def test_all_four_papers_have_records() -> None:
    kept = {"lite", "adainfer", "adainfer_tuned", "skip_exit", "skip_gates", "oracle", "sorted"}
    assert kept <= set(COMPARED)


@pytest.mark.parametrize("name", COMPARED)
def test_a_kept_table_is_what_its_record_says(name: str) -> None:
    """Nobody edits one by hand, and renewing it changes nothing."""
    record = RECORDS[name]
    assert compare.renewed(record) == record
    stale = record | {"comparison": []}
    assert compare.renewed(stale) == record


def test_compare_renews_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of before there was a table gets one, and loses nothing."""
    path, old = tmp_path / "old.json", dict(RECORDS["oracle"])
    del old["comparison"], old["deviations"]
    path.write_text(json.dumps(old))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path)])
    compare.main()
    assert json.loads(path.read_text()) == RECORDS["oracle"]


def test_skip_exit_ends_in_a_table(run: Callable[..., Any], checkpoint: Path) -> None:
    text = checkpoint.parent / "text.txt"
    text.write_text(" ".join(WORDS) * 120)
    words = ["--model", str(checkpoint), "--keep", "2", "4", "--loss-keep", "4", "--limit", "3"]
    record = run(skip_exit, "--data", str(text), *words)
    assert record["num_layers"] == 6
    by = {(row["arm"], row["layers"]): row for row in record["rows"]}
    skip, leave = by["uls", 4], by["exit", 4]
    assert here(record, "cosine of end states, 4 layers evenly spread against the first 4") == (
        f"{skip['cosine']:.3f} against {leave['cosine']:.3f} "
        f"(in the paper's way {leave['cosine_no_norm']:.3f})"
    )
    better = sum(by["uls", n]["agreement"] > by["exit", n]["agreement"] for n in (2, 4))
    said = here(record, "evenly spread layers (ULS) against exiting")
    assert said.endswith(f"{better} by equal tokens")
    assert "of 2 depths" in said


def test_skip_gates_ends_in_a_table(
    run: Callable[..., Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {w}:", "completion": f" {w} {w} {i}"} for i in (1, 2) for w in WORDS]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n")
    monkeypatch.setattr(skip_gates, "SEEN", 0)
    for kind in ("hidden", "fixed"):
        chosen = settings("skip", alpha=1.0, gate_input=kind, epochs=1)
        tune(str(checkpoint), [str(rows)], chosen, tmp_path / kind)
    folders = [str(tmp_path / kind) for kind in ("hidden", "fixed")]
    for given in (folders, folders[:1]):  # one kind of gates will do
        record = run(
            *(skip_gates, "--sft", str(checkpoint), "--gates", *given),
            *("--data", str(rows), "--limit", "2"),
        )
        gated = record["rows"][1]
        assert here(record, "layers of a token, gates on the hidden state") == (
            f"{gated['layers']:.1f} of 6 ({gated['layers'] / 6:.0%}), alpha 1"
        )


def test_oracle_ends_in_a_table(run: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    lines = [
        {"instruction": f"{a} {b} {c}", "input": "", "reference": f"{a}, {b}; {c}! " * 4}
        for a in WORDS
        for b in WORDS
        for c in WORDS[:2]
    ]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ["--model", str(checkpoint), "--first", "2", "--look", "2", "--max-new-tokens", "24"]
    record = run(oracle, "--data", str(data), *words)
    arm = record["arms"][0]
    assert here(record, "reference, match: the same gain by chance alone") == (
        f"{arm['null_gain']:+.3f}"
    )
    said = here(record, "reference, match: layers at which the oracle equals the full model")
    assert said.startswith(f"{arm['smallest'] / 6:.1%} (")
    text = deciding_tables.oracle(record)
    rows = [
        line.split(" | ") for line in text.splitlines() if line.startswith("| reference, match")
    ]
    assert [row[3] for row in rows] == [f"{value:.3f}" for value in arm["weak"][::2]]
    assert text.count("no null: whatever tokens are drawn") == 1  # of agreement


def test_adainfer_ends_in_a_table(
    run: Callable[..., Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task is asked, judged and timed; on the page, task by task."""

    def few(name: str, _data: Path, limit: int, _seed: int) -> list[Item]:
        return [Item(f"{name} {a} {b}", (b,)) for a in WORDS for b in WORDS][:limit]

    monkeypatch.setattr(adainfer, "items", few)
    monkeypatch.setattr(adainfer, "CHECKS", (FULL_HEAD, Shortlist(size=64)))
    words = ["--exits", "2,4,5", "--weights", "fp32", "--limit", "12"]
    record = run(adainfer, str(checkpoint), *words, "--data", str(tmp_path))
    tasks = set(record["tasks"])
    assert {row["task"] for row in record["measured"]} == tasks
    assert all(row["same_depths"] == 1 for row in record["measured"])
    fitted = [
        row
        for row in record["rows"]
        if (row["kind"], row["scope"], row["check"]) == ("svm", "cross", "full")
        and "refused" not in row
    ]
    saved = sum(row["layers_saved"] for row in fitted) / len(fitted)
    what = "layers saved on average, SVM fitted on the other tasks"
    assert here(record, what) == f"{saved:.1%}"
    text = paper_tables.adainfer(record)
    assert "48 items judged, 6 of each task" in text
    assert "8 of 8 tasks timed" in text
    assert "not timed" not in text
    for task in tasks:
        assert text.count(f"\n| {task} | ") == 3


def test_what_no_classifier_could_be_fitted_for_is_said() -> None:
    """Averages are over the other tasks, and the page tells which are left out, and why."""
    record = RECORDS["adainfer_tuned"]
    left = {row["task"] for row in record["rows"] if "refused" in row and row["scope"] == "task"}
    assert left
    text = paper_tables.adainfer(record)
    assert f"for {8 - len(left)} of 8 tasks; of " in text
    for task in left:
        assert f"of {task} none: no row is right at any exit" in text
        assert f"\n| {task} | " in text
    none = deepcopy(record)
    for row in none["rows"]:
        if (row["kind"], row["scope"], row["check"]) == ("svm", "task", "full"):
            row["refused"] = "why (this)"
    rows = {row["what"] for row in adainfer_figures.comparison(none)}
    assert "layers saved on average, SVM fitted on its own task" not in rows


def test_the_readmes_words_follow_the_figures() -> None:
    """Better figures turn worse into better, paper by paper."""
    records = [deepcopy(RECORDS[name]) for name in claims_table.SHOWN]
    lines = claims_table.claims(*records).splitlines()
    assert len(lines) == 2 + 4
    by = dict(zip(claims_table.SHOWN, records, strict=True))
    by["lite_tuned"]["points"][0]["sets"]["all"]["operations_saved"] = 0.5
    for row in by["adainfer_tuned"]["means"]:
        row["layers_saved"] = 0.2
    for row in by["skip_exit"]["rows"]:
        row["agreement"] = 0.1 if row["arm"] == "exit" else 0.9
    for row in by["skip_gates"]["rows"]:
        row["loss"] = 1.0 if row["arm"].startswith("gates") else 2.0
    by["oracle"]["arms"][0] |= {"smallest": 6.0, "gain": 0.3}
    for point in by["sorted"]["points"]:
        point["clock"]["tokens"]["median"] = 0.5
    lite, ada, selection, whole = claims_table.claims(*records).splitlines()[2:]
    assert "50% fewer operations" in lite
    assert "| No worse; " in lite
    assert "| No worse. " in ada
    assert "better than an exit by tokens" in selection
    assert "Gates pay. The oracle: no worse, and it gains more than chance" in selection
    assert "drafts: no worse" in whole
    assert "confidence: no worse" in whole
