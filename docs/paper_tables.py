"""Tables of results beside those of papers: *paper | here | same metric, same definition?*."""

from __future__ import annotations

from typing import Any


def _compared(record: dict[str, Any]) -> list[str]:
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


def _deviations(record: dict[str, Any]) -> str:
    return "Other than in the paper: " + "; ".join(record["deviations"]) + "."


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def lite(record: dict[str, Any]) -> str:
    """Return LITE's figures beside ours, then exits, operating points, and the sets one by one."""
    lines = [*_compared(record), "", "| exit | agreement | confidence | calibration error |"]
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
        # The sets one by one for the paper's own setting; all together for the others.
        names = list(point["sets"]) if point is record["points"][0] else ["all"]
        for name in names:
            row = point["sets"][name]
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
        f"and quartiles. {_deviations(record)} Written by `{record['command']}`."
    )


def sorted_llama(record: dict[str, Any]) -> str:
    """Return Sorted LLaMA's figures beside ours, then the sub-models, and what accelerates."""
    lines = [*_compared(record), "", "| model | depth | held-out loss | agreement |"]
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
        f"{_deviations(record)} Written by `{record['command']}`."
    )
