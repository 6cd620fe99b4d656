"""The README's table: each paper's claim, what came out here, and where that is worse or better."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
SHOWN = (
    "lite_tuned",
    "narrow_ag_news",
    "adainfer",
    "adainfer_tuned",
    "narrow_adainfer",
    "skip_exit",
    "skip_gates",
    "oracle",
    "sorted",
)
"""The records that the table is made of, in the order that :func:`claims` takes them."""


def claims(*records: Record) -> str:
    """Return one row per paper: what it claims, what is here, where that is worse or better."""
    by = dict(zip(SHOWN, records, strict=True))
    rows = [
        ("LITE", *_lite(by["lite_tuned"], by["narrow_ag_news"])),
        ("AdaInfer", *_adainfer(by["adainfer"], by["adainfer_tuned"], by["narrow_adainfer"])),
        (
            "Dynamic layer selection",
            *_selection(by["skip_exit"], by["skip_gates"], by["oracle"]),
        ),
        ("Sorted LLaMA", *_sorted(by["sorted"])),
    ]
    lines = ["| paper | claims | here | worse or better than claimed |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _worse(ours: float, claimed: float) -> str:
    """Return whether more, which is good, was reached."""
    return "Worse" if ours < claimed else "No worse"


def _lite(record: Record, narrow: Record) -> tuple[str, str, str]:
    point = record["points"][0]
    every, last = point["sets"]["all"], record["last_layer"]
    task = next(arm for arm in narrow["arms"] if arm["layers_saved"])
    gap = task["differences"]["accuracy"]
    operations = every["operations_saved"]
    return (
        "38% (7B) and 46% (13B) of compute saved in open chat, as good an answer",
        f"{every['layers_saved']:.0%} of layers saved; {abs(operations):.0%} "
        f"{'fewer' if operations > 0 else 'more'} operations, checks counted; "
        f"{point['clock']['tokens']['median']:.2f} of the time per token; meaning "
        f"{every['similarity']:.2f}",
        f"{_worse(operations, 0.3786)}; the last layer's loss goes from {last['before']:.2f} to "
        f"{last['after']:.2f}. On a narrow task (AG News), with other exits: "
        f"{task['layers_saved']:.0%} of layers, "
        f"{task['clock']['to_baseline']['total']:.2f} of the time, "
        f"{100 * gap['mean']:+.1f} points ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})",
    )


def _adainfer(untaught: Record, tuned: Record, narrow: Record) -> tuple[str, str, str]:
    plain, taught = (
        next(
            row
            for row in record["means"]
            if (row["kind"], row["scope"], row["check"]) == ("svm", "task", "full")
        )
        for record in (untaught, tuned)
    )
    sentiment = next(
        row
        for row in tuned["rows"]
        if (row["kind"], row["scope"], row["check"], row["task"]) == ("svm", "task", "full", "sst2")
    )
    lost = 100 * (taught["full_accuracy"] - taught["accuracy"])
    judged = tuned["tasks"]["sst2"]["texts"] // 2
    return (
        "17.8% of layers saved, up to 43% on sentiment, under 1 point lost, model untouched",
        f"{plain['layers_saved']:.1%}, model untouched; {taught['layers_saved']:.1%} with tuned "
        f"exits on {taught['tasks']} of {len(tuned['tasks'])} tasks, "
        f"{sentiment['layers_saved']:.1%} on sentiment, {lost + 0:.1f} points lost of {judged} "
        "items a task",
        f"{_worse(taught['layers_saved'], 0.178)}. Operations, every look counted: "
        f"{plain['flops_ratio']:.2f} and {taught['flops_ratio']:.2f} of full depth's. "
        + _on_topics(narrow),
    )


def _on_topics(record: Record) -> str:
    """Return what AdaInfer's classifiers save where a model was tuned for one task."""
    said = [
        f"{arm['layers_saved']:.0%} of layers and "
        f"{100 * arm['differences']['accuracy']['mean']:+.1f} points by "
        f"{arm['name'].removeprefix('AdaInfer, ')}, "
        f"{arm['clock']['to_baseline']['total']:.2f} of the time"
        for arm in record["arms"]
        if arm["layers_saved"]
    ]
    return f"On a narrow task (AG News), tuned exits: {'; '.join(said)}"


def _selection(skipped: Record, gated: Record, peeked: Record) -> tuple[str, str, str]:
    most = max(row["layers"] for row in skipped["rows"])
    arms = {row["arm"]: row for row in skipped["rows"] if row["layers"] == most}
    same = {arm: row["agreement"] for arm, row in arms.items()}
    evenly, leaving = arms["uls"], arms["exit"]
    tokens = "better" if evenly["agreement"] > leaving["agreement"] else "worse"
    loss = "better" if evenly["loss"] < leaving["loss"] else "worse"
    gates = max(
        (row for row in gated["rows"] if row["arm"] == "gates, hidden input"),
        key=lambda row: row["alpha"],
    )
    chosen = next(
        row for row in gated["rows"] if row["arm"] == f"{round(gates['layers'])} by cosine"
    )
    arm = peeked["arms"][0]
    least, share = (layers / arm["costs"][-1] for layers in (arm["costs"][0], arm["smallest"]))
    pays = "do not pay, as there" if gates["loss"] > chosen["loss"] else "pay"
    more = "less" if arm["gain"] < arm["null_gain"] else "more"
    return (
        "skipping layers is gentler than exiting; the state does not help a gate; an oracle needs "
        "23.3% of the layers",
        f"{most} layers say the full model's token on {same['cosine']:.0%} where chosen, "
        f"{same['uls']:.0%} where evenly spread, {same['exit']:.0%} as an exit; gates on the state "
        f"have loss {gates['loss']:.2f}, as many chosen layers {chosen['loss']:.2f}; the oracle "
        f"needs {share:.0%} ({least:.0%} is the least it could choose)",
        f"Evenly spread layers, the paper's, are {tokens} than an exit by tokens, {loss} by loss. "
        f"Gates {pays}. The oracle: {_worse(-share, -0.233).lower()}, and it gains {more} than "
        f"chance ({arm['gain']:.3f}, {arm['null_gain']:.3f})",
    )


def _sorted(record: Record) -> tuple[str, str, str]:
    loss = {(row["model"], row["depth"]): row["loss"] for row in record["depths"]}
    last = record["num_layers"]
    depth = max(depth for name, depth in loss if name == "sorted" and depth < last)
    speed = {point["name"]: 1 / point["clock"]["tokens"]["median"] for point in record["points"]}
    fixed = max(speed[point["name"]] for point in record["points"] if point["draft"] is not None)
    wrong = sum(point["mismatched_texts"] or 0 for point in record["points"])
    side = "better" if loss["sorted", depth] < loss["sft", depth] else "worse"
    harm = loss["sorted", last] / loss["sft", last] - 1
    return (
        "sub-models beat those of plain tuning and of heads per exit; 1.16x by self-speculation "
        "(answers change), 1.34x by confidence",
        f"{depth} of {last} layers: loss {loss['sorted', depth]:.2f}, plain "
        f"{loss['sft', depth]:.2f}, heads {loss['ict', depth]:.2f}, cut out and tuned alone "
        f"{loss['extracted', depth]:.2f}; {fixed:.2f}x by the best draft, "
        f"{speed['copied']:.2f}x by confidence",
        f"Sub-models are {side} than plain tuning's; at full depth {harm:+.0%} loss. Speed by "
        f"drafts: {_worse(fixed, 1.16).lower()}, but {wrong} answers change; by confidence: "
        f"{_worse(speed['copied'], 1.34).lower()}",
    )
