"""The tables of what decides where to leave; ``tables.py`` writes them into the pages."""

from __future__ import annotations

from typing import Any

from paper_tables import compared, deviations


def oracle(record: dict[str, Any]) -> str:
    """Return what a depth per text could gain, what is noise, and what a router recovers."""
    lines = [
        "| text, score | layers | fixed | weak oracle | oracle | held-out | null | route "
        "| recovered (95%) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ends = []
    for arm in record["arms"]:
        name = f"{arm['text']}, {arm['score']}"
        for row in arm["rows"][::2]:
            upto = sum(cost <= row["budget"] for cost in arm["costs"])
            cells = (
                *(row["fixed"], arm["weak"][upto - 1], row["oracle"]),
                *(row["held_out"], row["null"], row["route"]),
            )
            shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            lines.append(
                f"| {name} | {row['budget']:g} | {' | '.join(shown)} | {_recovered(row)} |"
            )
        ends.append(_summed_up(name, arm))
    forced = record["arms"][0]["teacher_forced"]
    return "\n".join([*lines, "", *ends]) + (
        f"\n\n{record['model']}, {record['weights']}, {record['max_new_tokens']} tokens of each "
        f"text, {'teacher-forced' if forced else 'each depth on its own text'}. Written by "
        f"`{record['command']}`."
    )


def _summed_up(name: str, arm: dict[str, Any]) -> str:
    """Return in a sentence what the oracle gains, and what is noise; answers have no halves."""
    (low, high), half = arm["smallest_interval"], arm["smallest_held_out"]
    halved = arm["held_out_gain"] is not None
    null = arm["null_gain"]
    if null is not None:
        chance = f", {null:.3f} by seed alone"
    elif arm["teacher_forced"]:
        chance = "; no null: whatever tokens are drawn, the full model agrees with itself on each"
    else:
        chance = "; no null: nothing is drawn"
    return (
        f"- {name}: {arm['texts']} texts, full model {arm['full']:.3f}; the oracle equals it "
        f"at {arm['smallest']:.1f} layers ({low:.1f} to {high:.1f})"
        + (f", held out {'never' if half is None else f'at {half:.1f}'}" if halved else "")
        + f". With depth for free it gains {arm['gain']:.3f}"
        + (f", {arm['held_out_gain']:.3f} held out" if halved else "")
        + f"{chance}. The router explains {arm['router']['explained']:.1%} of what differs between "
        "texts."
    )


def _recovered(row: dict[str, Any]) -> str:
    if row["recovered"] is None:
        return ""
    low, high = row["recovered_interval"]
    return f"{row['recovered']:.0%} ({low:.0%} to {high:.0%})"


def skip_exit(record: dict[str, Any]) -> str:
    """Return what skipping and exiting do at equal numbers of layers."""
    lines = [
        *compared(record),
        "",
        "| layers | arm | loss | agreement | KL | cosine | cosine, norm on one side |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    whole = [{"layers": "all", "arm": "full", **record["full"]}]
    lines += [
        f"| {row['layers']} | {row['arm']} | {row['loss']:.2f} | {row['agreement']:.1%} "
        f"| {row['kl']:.2f} | {row['cosine']:.3f} | {row['cosine_no_norm']:.3f} |"
        for row in [*record["rows"], *whole]
    ]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['tokens']} tokens of {record['data']}, teacher-forced; "
        f"greedy paths were searched on {record['tokens_searched']} others. "
        f"{deviations(record)} Written by "
        f"`{record['command']}`."
    )


def control(record: dict[str, Any]) -> str:
    """Return what controlled speculation takes of plain decoding."""
    lines = [
        "| text | contestant | time to plain (95%) | quartiles | drafted | right |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        (low, high), (first, third) = row["time_ratio_interval"], row["time_ratio_quartiles"]
        lines.append(
            f"| {row['text']} | {row['name']} | {row['time_ratio']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {first:.3f}-{third:.3f} | {row['drafted']} | {row['accepted']} |"
        )
    machine = record["machine"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['weights']}, {record['tokens']} tokens, "
        f"{machine['threads']} threads of {machine['processor']}; {record['rounds']} rounds in "
        f"turns, all tokens equal. Written by `{record['command']}`."
    )


def policies(record: dict[str, Any]) -> str:
    """Return every policy at equal risk: depth, operations, predicted and measured time."""
    lines = [
        "| risk asked | policy | risk on held-out texts (95%) | mean depth | operations "
        "| predicted time | measured time (quartiles) | mean depth then |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for row in record["rows"]:
        if "risk" not in row:
            notes.append(f"{row['name']} at {row['alpha']:g}: {row['note']}")
            continue
        low, high = row["risk_interval"]
        operations = f"{row['flops_ratio']:.2f}" if "flops_ratio" in row else ""
        took = then = ""
        if "time_ratio" in row:
            first, last = row["time_ratio_quartiles"]
            took = f"{row['time_ratio']:.2f} ({first:.2f}-{last:.2f})"
            then = f"{row['own_mean_depth']:.1f}"
        lines.append(
            f"| {row['alpha']:g} | {row['name']} | {row['risk']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['mean_depth']:.1f} | {operations} | {row['predicted_ratio']:.2f} | {took} "
            f"| {then} |"
        )
    agreement = ", ".join(f"{share:.0%} at {depth}" for depth, share in record["agreement"].items())
    left = f" Not in the table: {'; '.join(notes)}." if notes else ""
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['weights']}, exits look through {record['check']}, "
        f"tokens that leave are chosen by {record['head']}; a risk is asked of the half that "
        f"chooses; {record['texts']} texts, {record['tokens']} tokens; agreement with the last "
        f"layer {agreement}. Full depth = 1.{left} Written by `{record['command']}`."
    )


LIKENESS = ("similarity_to_full", "rouge_l_to_full", "chrf_to_full", "token_agreement")


def evaluated(record: dict[str, Any]) -> str:
    """Return what a plan saves on each task, and how near its answers are to full depth's."""
    lines = [
        "| task | items | meaning | ROUGE-L | chrF | the same token | loss of the answer (full "
        "depth's own) | tokens | operations saved | time per token (quartiles) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in record["tasks"]:
        scores = {row["score"]: row for row in task["scores"]}
        like = " | ".join(
            f"{row['plan']['mean']:.2f} ({row['plan']['low']:.2f}-{row['plan']['high']:.2f})"
            for row in (scores[name] for name in LIKENESS)
        )
        loss, took = scores["loss_of_answer"], task["time_per_token_ratio"]
        tokens = task["tokens"]["plan"] / task["tokens"]["full"]
        lines.append(
            f"| {task['task']} | {task['items']} | {like} "
            f"| {loss['plan']['mean']:.2f} ({loss['full']['mean']:.2f}) | {tokens:.2f} "
            f"| {task['flops_saved']:.1%} | {took['median']:.2f} ({took['low']:.2f}-"
            f"{took['high']:.2f}) |"
        )
    machine = record["machine"]
    asked = "No judge was asked." if record["judge"] is None else "A judge was asked, too."
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['weights']}, the certified plan; answers of up to "
        f"{record['max_new_tokens']} tokens, one by one, {machine['threads']} threads of "
        f"{machine['processor']}; meaning is the cosine by MiniLM; all likeness is to full "
        f"depth's answer, with 95% intervals over items. {asked} "
        f"Written by `{record['command']}`."
    )


def sublayers(record: dict[str, Any]) -> str:
    """Return what is lost where whole layers, or attention and MLP apart, are left out."""
    lines = [
        "| weights left, in layers | whole layers out | loss | agreement | halves out | loss "
        "| agreement |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    halves = record["rows"]["halves"]
    for whole in record["rows"]["layers"]:
        count = sum(row["layers"] > whole["layers"] - 0.01 for row in halves)
        half, out = halves[count - 1], [str(row["removed"]) for row in halves[1:count]]
        attentions, mlps = ({o[:-1] for o in out if o[-1:] == mark} for mark in "am")
        gone = {o for o in out if o.isdigit()} | attentions & mlps
        lines.append(
            f"| {whole['layers']:g} | {record['rows']['layers'].index(whole)} "
            f"| {whole['loss']:.2f} | {whole['agreement']:.0%} "
            f"| {len(attentions - gone)} attention, {len(mlps - gone)} MLP, {len(gone)} whole "
            f"| {half['loss']:.2f} | {half['agreement']:.0%} |"
        )
    times = [
        f"| {context} | " + " | ".join(_span(by[name]) for name in ("layers", "halves")) + " |"
        for context, by in record["clock"].items()
    ]
    kept = len(record["paths"]["layers"])
    lines += [
        "",
        f"| tokens before | {kept} whole layers, time to all | halves of that weight, likewise |",
        "|---:|---:|---:|",
        *times,
    ]
    machine = record["machine"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}; nats per token and equal choices on {record['tokens']} tokens of "
        f"{record['data']} that had no say; times in {record['timed_weights']}, "
        f"{machine['threads']} threads of {machine['processor']}, medians and quartiles of "
        f"{record['rounds']} rounds in turns. Written by `{record['command']}`."
    )


def _span(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def race(record: dict[str, Any]) -> str:
    """Return certified plans beside full depth and other engines, on prompts of people."""
    lines = [
        "| contestant | decode, tokens/s (quartiles) | to ours at full depth | predicted "
        "| operations of a token saved | other tokens than its reference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    one_model = record.get("others", record["model"]) == record["model"]
    for row in record["rows"]:
        if row["reason"] is not None:  # such as a plan that is certified for another format
            continue
        (low, high), (first, third) = row["decode_quartiles"], row["ratio_quartiles"]
        known = row["predicted_ratio"], row["operations_to_full"]
        said = "" if known[0] is None else f"{known[0]:.2f}"
        saved = "" if known[1] is None else f"{1 - known[1]:.1%}"
        same = one_model and row["compared"] is not None
        other = f"{row['mismatches']} of {row['compared']}" if same else ""
        lines.append(
            f"| {row['name']} | {row['decode_tokens_per_second']:.0f} ({low:.0f}-{high:.0f}) "
            f"| {row['ratio_to_full']:.2f} ({first:.2f}-{third:.2f}) | {said} | {saved} "
            f"| {other} |"
        )
    machine = record["machine"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {machine['threads']} threads of {machine['processor']}; medians "
        f"and quartiles of {record['rounds']} rounds in turns; against full depth in the same "
        "format where that takes part. One other token shifts all that follows it. Written by "
        f"`{record['command']}`."
    )


def skip_gates(record: dict[str, Any]) -> str:
    """Return gates that skip layers beside a fixed input and chosen paths."""
    lines = [
        *compared(record),
        "",
        "| arm | alpha | layers of a token (spread) | loss, nats | right | operations |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['arm']} | {'' if row['alpha'] is None else format(row['alpha'], 'g')} "
        f"| {row['layers']:.1f} ({row['spread']:.1f}) | {row['loss']:.2f} "
        f"| {row['right']:.0%} | {row['operations']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['tuned_on']:,} tokens of tuning each, {record['texts']} "
        f"held-out rows, {record['tokens']} tokens; operations of whole texts. "
        f"{deviations(record)} Written by "
        f"`{record['command']}`."
    )
