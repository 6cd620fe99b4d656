"""Tables of results beside those of papers: *paper | here | same metric, same definition?*."""

from __future__ import annotations

from typing import Any


def compared(record: dict[str, Any]) -> list[str]:
    """Return the rows of *paper | here | same metric, same definition?* as a table."""
    lines = ["| | paper | here | same metric, same definition? |", "|---|---:|---:|---|"]
    cells = ("what", "paper", "here", "same")
    return lines + [f"| {' | '.join(row[c] for c in cells)} |" for row in record["comparison"]]


def _tuned(record: dict[str, Any]) -> str:
    """Return which model was asked, with a word on how it was tuned."""
    recipe = "not tuned" if record["recipe"] is None else f"recipe {record['recipe']}"
    machine = record["machine"]
    return (
        f"{record['model']} ({recipe}), {record['weights']}, {record['num_layers']} layers, "
        f"{machine['threads']} thread(s) of {machine['processor']}"
    )


def deviations(record: dict[str, Any]) -> str:
    """Return in a sentence what was done in another way than in the paper."""
    return "Other than in the paper: " + "; ".join(record["deviations"]) + "."


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def beside(record: dict[str, Any]) -> str:
    """Return the rows of *paper | here* alone; the record's own table stands on another page."""
    return "\n".join(compared(record)) + (
        f"\n\n{deviations(record)} Written by `{record['command']}`."
    )


def lite(record: dict[str, Any]) -> str:
    """Return LITE's figures beside ours, then exits, operating points, and the sets one by one."""
    lines = [*compared(record), "", "| exit | agreement | confidence | calibration error |"]
    lines.append("|---:|---:|---:|---:|")
    lines += [
        f"| {row['depth']} | {row['agreement']:.0%} | {row['confidence']:.2f} "
        f"| {row['calibration_error']:.2f} |"
        for row in record["exits"]
    ]
    lines += [
        "",
        "| operating point | set | layers saved | operations saved | meaning | words | tokens "
        "| loss, of full depth's | time per token |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for point in record["points"]:
        for name, row in point["sets"].items():
            took = point["clock"]["tokens"]
            time = f"{took['median']:.2f} ({took['low']:.2f}-{took['high']:.2f})"
            lines.append(
                f"| {point['name']} | {name} | {_cell(row['layers_saved'], '.1%')} "
                f"| {_cell(row['operations_saved'], '.1%')} | {_cell(row['similarity'], '.2f')} "
                f"| {row['rouge_l']:.2f} | {row['length_ratio']:.2f} "
                f"| {row['loss'] / row['full_loss']:.2f} | {time if name == 'all' else ''} |"
            )
    lines += ["", "| operating point | plan | tokens by depth |", "|---|---|---|"]
    for point in record["points"]:
        total = sum(point["histogram"].values())
        shares = (f"{depth}: {count / total:.0%}" for depth, count in point["histogram"].items())
        lines.append(f"| {point['name']} | {point['plan']} | {', '.join(shares)} |")
    sizes = ", ".join(f"{count} of {name}" for name, count in record["prompts"].items())
    return "\n".join(lines) + (
        f"\n\n{_tuned(record)}; prompts: {sizes}, up to {record['max_new_tokens']} new tokens. "
        "Operations count layers, attention, every check, head and fill; meaning, words and tokens "
        "are to the model's own answer at full depth, and so is time, of "
        f"{record['timed_prompts']} prompts alone and in turns, {record['rounds']} rounds, median "
        f"and quartiles. {deviations(record)} Written by `{record['command']}`."
    )


def sorted_llama(record: dict[str, Any]) -> str:
    """Return Sorted LLaMA's figures beside ours, then the sub-models, and what accelerates."""
    lines = [*compared(record), "", "| model | depth | held-out loss | agreement |"]
    lines.append("|---|---:|---:|---:|")
    lines += [
        f"| {row['model']} | {row['depth']} | {row['loss']:.2f} | {row['agreement']:.0%} |"
        for row in record["depths"]
    ]
    lines += [
        "",
        "| way | time per token | drafts rejected | operations saved | same text | words |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for point in record["points"]:
        took, kept = point["clock"]["tokens"], point["quality"]
        lines.append(
            f"| {point['name']} | {took['median']:.2f} ({took['low']:.2f}-{took['high']:.2f}) "
            f"| {_cell(point['rejected'], '.1%')} | {_cell(point['operations_saved'], '.1%')} "
            f"| {kept['same_text']:.0%} | {kept['rouge_l']:.2f} |"
        )
    if record["answers"]:
        lines += ["", "| answers of | depth | words | tokens |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['model']} | {row['depth']} | {row['rouge_l']:.2f} "
            f"| {row['length_ratio']:.2f} |"
            for row in record["answers"]
        ]
    return "\n".join(lines) + (
        f"\n\n{_tuned(record)}; {record['held_out']} held-out rows, {record['prompts']} prompts, "
        f"up to {record['max_new_tokens']} new tokens. Time is to the same model's plain decoding, "
        f"of {record['timed_prompts']} prompts alone and in turns, {record['rounds']} rounds, "
        "median and quartiles: below 1 is faster. Words: ROUGE-L to the plain answer. "
        f"{deviations(record)} Written by `{record['command']}`."
    )


def adainfer(record: dict[str, Any]) -> str:
    """Return AdaInfer's figures beside ours, then task by task, and each classifier on average."""
    lines = [*compared(record), "", *_by_task(record), "", *_on_average(record)]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, operations of the whole prompt against full depth, every look "
        f"through the head counted. {_judged(record)} {deviations(record)} Written by "
        f"`{record['command']}`."
    )


KINDS = {"svm": "SVM", "crf": "CRF", "rule": "rule"}
FITTED_ON = {"task": "itself", "cross": "the others", "all": "all"}


def _by_task(record: dict[str, Any]) -> list[str]:
    """Return layers saved, accuracy lost and operations of each task, and the time where known."""
    cells = {
        (row["task"], row["scope"], row["kind"]): _saved_and_lost(row)
        for row in record["rows"]
        if row["check"] == "full"
    }
    times = {
        row["task"]: f"{row['seconds_ratio']:.2f}"
        for row in record["measured"]
        if row["check"] == "full"
    }
    names = " | ".join(f"{name}: layers saved, points lost, operations" for name in KINDS.values())
    lines = [f"| task | right at full depth | fitted on | {names} | time, SVM |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for task in record["tasks"]:
        whole = next(row for row in record["rows"] if row["task"] == task and "refused" not in row)
        for scope, name in FITTED_ON.items():
            found = " | ".join(cells[task, scope, kind] for kind in KINDS)
            took = times.get(task, "not timed") if scope == "all" else ""
            lines.append(f"| {task} | {whole['full_accuracy']:.0%} | {name} | {found} | {took} |")
    return lines


def _saved_and_lost(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "none"
    lost = round(100 * (row["full_accuracy"] - row["accuracy"])) + 0
    return f"{row['layers_saved']:.1%}, {lost}, {row['flops_ratio']:.2f}"


def _on_average(record: dict[str, Any]) -> list[str]:
    lines = [
        "| classifier | fitted on | looks through | tasks | accuracy (full depth) | mean depth "
        "| layers saved | operations | without looking |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {row['kind']} | {row['scope']} | {row['check']} | {row['tasks']} "
        f"| {row['accuracy']:.3f} ({row['full_accuracy']:.3f}) | {row['mean_depth']:.1f} "
        f"| {row['layers_saved']:.1%} | {row['flops_ratio']:.2f} "
        f"| {row['flops_ratio_without_checks']:.2f} |"
        for row in record["means"]
    ]


def _judged(record: dict[str, Any]) -> str:
    """Return on how few items all this stands, what could not be fitted, and what was timed."""
    tasks = record["tasks"]
    halves = {name: facts["texts"] // 2 for name, facts in tasks.items()}
    refused = {
        row["task"]: row["refused"].split(" (")[0]
        for row in record["rows"]
        if "refused" in row and (row["kind"], row["scope"], row["check"]) == ("svm", "task", "full")
    }
    why = "".join(f"; of {task} none: {reason}" for task, reason in refused.items())
    timed = list(dict.fromkeys(row["task"] for row in record["measured"]))
    run = "; ".join(
        f"{row['task']} through {row['check']}: the loop's depths are the replay's on "
        f"{row['same_depths']:.0%} of items, operations {row['flops_ratio']:.2f}, time "
        f"{row['seconds_ratio']:.2f} of full depth"
        for row in record["measured"]
    )
    return (
        f"{sum(halves.values())} items judged, {'/'.join(map(str, dict.fromkeys(halves.values())))}"
        f" of each task, and as many fitted to: one item is "
        f"{100 / min(halves.values()):.0f} points. A classifier of its own could be fitted for "
        f"{len(tasks) - len(refused)} of {len(tasks)} tasks{why}. {len(timed)} of {len(tasks)} "
        f"tasks timed, by the classifier of all tasks: {run}."
    )
