"""AdaInfer's figures beside those of a record; pure.

The paper's averages are of its abstract; its figures for single tasks and its time are as others
quote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from papers import compared, percent

PRUNED, SENTIMENT, LOST, FASTER = "17.8%", "up to 43%", "< 1 point", "1.30x at best"
QUOTED = {"mmlu": (28.91, 45.30, 43.73), "commonsense_qa": (27.90, 61.43, 53.00)}
"""Llama-2-7B: layers of 32, accuracy of full depth and of AdaInfer, percent (SpecEE, table 4)."""
QUOTED_LAYERS = 32
SCOPES = {"task": "its own task", "cross": "the other tasks"}
UNKNOWN = "not known to us"


def comparison(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the paper's figures beside those of the record."""
    return [
        *_averages(record),
        *_sentiment(record),
        *_quoted(record),
        *_looks(record),
        *_time(record),
    ]


def judged(record: dict[str, Any], tasks: Iterable[str]) -> int:
    """Return how many items judge the classifiers: of each task, the half nobody was fitted to."""
    return sum(record["tasks"][name]["texts"] // 2 for name in tasks)


def fitted(record: dict[str, Any], kind: str, scope: str, check: str = "full") -> dict[str, Any]:
    """Return the rows of a classifier by task, but for tasks that it cannot be fitted for."""
    return {
        row["task"]: row
        for row in record["rows"]
        if (row["kind"], row["scope"], row["check"]) == (kind, scope, check)
        and "refused" not in row
    }


def lost(rows: Sequence[dict[str, Any]]) -> float:
    """Return the points of accuracy lost on average to full depth; below 0 they are gained."""
    gaps = [100 * (row["full_accuracy"] - row["accuracy"]) for row in rows]
    return round(fmean(gaps), 1) + 0.0  # no minus zero


def _averages(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for kind, name in (("svm", "SVM"), ("crf", "CRF")):
        for scope in SCOPES:
            rows = fitted(record, kind, scope)
            if not rows:
                continue
            what = f"layers saved on average, {name} fitted on {SCOPES[scope]}"
            saved = percent(fmean(row["layers_saved"] for row in rows.values()))
            size = (
                f"{judged(record, rows)} items judged, {len(rows)} of "
                f"{len(record['tasks'])} tasks could be fitted"
            )
            said = PRUNED if kind == "svm" else "not told apart"
            found += [
                compared(what, said, saved, f"yes; {size}"),
                compared(
                    "accuracy lost by it",
                    LOST if kind == "svm" else "not told apart",
                    f"{lost(list(rows.values())):.1f} points",
                    "yes: an average over tasks",
                ),
            ]
    return found


def _sentiment(record: dict[str, Any]) -> list[dict[str, Any]]:
    known = {scope: fitted(record, "svm", scope).get("sst2") for scope in SCOPES}
    here = [
        f"{percent(row['layers_saved'])} fitted on {SCOPES[scope]}"
        for scope, row in known.items()
        if row
    ]
    return [compared("layers saved on sentiment", SENTIMENT, ", ".join(here), "SST-2 here")]


def _quoted(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows, found = fitted(record, "svm", "task"), []
    for task, (layers, full, left) in QUOTED.items():
        if task in rows:
            saved, row = 1 - layers / QUOTED_LAYERS, rows[task]
            found.append(
                compared(
                    f"{task}: layers saved, points lost",
                    f"{percent(saved)}, {full - left:.1f}",
                    f"{percent(row['layers_saved'])}, {lost([row]):.1f}",
                    f"Llama-2-7B, as SpecEE quotes the paper; SVM, {judged(record, [task])} items "
                    "here",
                )
            )
    return found


def _looks(record: dict[str, Any]) -> list[dict[str, Any]]:
    checks = dict.fromkeys(row["check"] for row in record["rows"])
    spent = {check: list(fitted(record, "svm", "task", check).values()) for check in checks}
    whole = [
        f"{fmean(row['flops_ratio'] for row in rows):.2f} by {check}"
        for check, rows in spent.items()
        if rows
    ]
    token = [
        f"{fmean(row['decode_flops_ratio'] for row in rows):.2f} by {check}"
        for check, rows in spent.items()
        if rows
    ]
    counted = "SVM of the own task, every look counted; full depth = 1"
    return [
        compared("operations of a prompt", UNKNOWN, ", ".join(whole), counted),
        compared("operations of one more token", UNKNOWN, ", ".join(token), counted),
    ]


def _time(record: dict[str, Any]) -> list[dict[str, Any]]:
    timed = [row for row in record["measured"] if row["check"] == "full"]
    return [
        compared(
            "speed",
            FASTER,
            f"{1 / fmean(row['seconds_ratio'] for row in timed):.2f}x",
            "wall-clock, one by one; the paper's as others quote it; SVM of all tasks, "
            f"{len(timed)} of {len(record['tasks'])} tasks timed",
        )
    ]
