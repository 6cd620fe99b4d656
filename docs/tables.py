"""Writes the generated tables into README.md and docs/, from results/*.json.

python docs/tables.py           write them
python docs/tables.py --check   status 1 if one is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims_table import SHOWN, claims
from deciding_tables import (
    control,
    evaluated,
    oracle,
    policies,
    race,
    skip_exit,
    skip_gates,
    sublayers,
)
from paper_tables import adainfer, beside, lite, sorted_llama

ROOT = Path(__file__).parent.parent


def costs(record: dict[str, Any]) -> str:
    """Return the table of what depth costs and saves."""
    lines = [
        "| contestant | same tokens | time | operations | weights read |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        same = f"{row['same_tokens']:.0%}"
        if "flops_ratio" not in row:
            lines.append(f"| {row['name']} | {same} | 1 | | |")
            continue
        low, high = row["time_ratio_quartiles"]
        time = f"{row['time_ratio']:.2f} ({low:.2f}-{high:.2f})"
        work = f"{row['flops_ratio']:.2f} | {row['bytes_ratio']:.2f}"
        lines.append(f"| {row['name']} | {same} | {time} | {work} |")
    machine, versions = record["machine"], record["versions"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, fp32, {machine['threads']} thread(s) of {machine['processor']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}; {record['prompts']} "
        f"prompts one by one, {record['max_new_tokens']} new tokens, medians and quartiles of "
        f"{record['rounds']} interleaved rounds, against `generate` in the same round. Lower is "
        f"better. Written by `{record['command']}`."
    )


def lossless(record: dict[str, Any]) -> str:
    """Return the table of self-speculation against ``generate``, token by token."""
    lines = ["| setting | tokens | mismatches | drafts confirmed |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {row['tokens']} | {row['mismatched_tokens']} | {row['acceptance']:.1%} |"
        for name, row in record["settings"].items()
    ]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, fp32, greedy, {record['prompts']} prompts, "
        f"{record['max_new_tokens']} new tokens. Written by `{record['command']}`."
    )


def families(record: dict[str, Any]) -> str:
    """Return the table of opened families, and the list of refused ones."""
    accepted, refused = record["accepted"], record["refused"]
    head = list(accepted[0])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row.values())} |" for row in accepted]
    reasons = [f"- {row['family']}: {row['reason']}" for row in refused]
    broken = sum(row["HF early exit"] != "same text" for row in accepted)
    return "\n".join(
        [
            f"{len(accepted)} families opened; Hugging Face's own early exit fails on {broken} of "
            f"them. {len(refused)} refused. transformers {record['versions']['transformers']}; "
            f"written by `{record['command']}`.\n",
            *lines,
            "\nRefused:\n",
            *reasons,
        ]
    )


def bench(record: dict[str, Any]) -> str:
    """Return the table of the race against other engines."""
    lines = [
        "| contestant | prefill, tokens/s | decode, tokens/s | to ours at full depth | predicted "
        "| of the memory ceiling | other tokens than its reference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        low, high = row["decode_quartiles"]
        share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        said = "" if row["predicted_ratio"] is None else f"{row['predicted_ratio']:.2f}"
        wrong = "" if row["mismatches"] is None else f"{row['mismatches']} of {row['compared']}"
        lines.append(
            f"| {row['name']} | {row['prefill_tokens_per_second']:.0f} "
            f"| {row['decode_tokens_per_second']:.0f} ({low:.0f}-{high:.0f}) "
            f"| {row['ratio_to_full']:.2f} | {said} | {share} | {wrong} |"
        )
    machine, versions = record["machine"], record["versions"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, batch 1, {record['rows'][0]['context']} tokens of context, "
        f"{machine['threads']} threads of {machine['processor']} "
        f"({machine['memory_gb_per_second']:.0f} GB/s from memory in that run), torch "
        f"{versions['torch']}, transformers {versions['transformers']}; medians and quartiles of "
        f"{record['rounds']} interleaved rounds. Lossy rows write other tokens, and so may int4, "
        "whose states are rounded: one early difference shifts all that follows. Above 100% of the "
        "ceiling, a part came out of the processor's cache. "
        f"Written by `{record.get('command', 'offramp bench')}`."
    )


def clock(record: dict[str, Any]) -> str:
    """Return the table of single steps in turns, and what the cost model said."""
    lines = []
    for title, spread, rows in (
        ("what", "measured (quartiles)", record["figures"]),
        ("an exit that nobody takes", "median (95% interval of it)", record["checks"]),
    ):
        lines += [f"| {title} | {spread} | predicted |", "|---|---:|---:|"]
        for name, row in rows.items():
            said = "" if row["predicted"] is None else f"{row['predicted']:.2f}"
            edges = f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"| {name} | {row['median']:.2f} ({edges}) | {said} |")
        lines.append("")
    agreement = ", ".join(f"{form} {share:.1%}" for form, share in record["agreement"].items())
    return "\n".join(lines) + (
        f"\n{record['model']}, {record['weights']}, {record['machine']['threads']} threads, "
        f"{record['rounds']} rounds, {record['pairs']} for exits. Greedy choices equal to the "
        "generic backbone's in fp32, "
        f"teacher-forced on 1,024 tokens: {agreement}. Second start of the process to its first "
        f"token: {record['second_start_seconds']:.1f} s. Written by `{record['command']}`."
    )


def tuning(record: dict[str, Any]) -> str:
    """Return what each depth learnt, arm by arm, on examples kept out of training."""
    watched = min((set(row["after"]) for row in record["rows"].values()), key=len) - {"held out"}
    heads = "".join(f" on {name} |" for name in sorted(watched))
    lines = [
        f"| arm | tokens seen | depth | loss before | after | agreement before | after |{heads}"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(watched))
    for name, row in record["rows"].items():
        for index, new in enumerate(row["after"]["held out"]):
            old = row["before"]["held out"][index]
            others = [row["after"][text][index]["agreement"] for text in sorted(watched)]
            lines.append(
                f"| {name} | {row['tokens']:,} | {new['depth']} | {old['loss']:.2f} "
                f"| {new['loss']:.2f} | {old['agreement']:.0%} | {new['agreement']:.0%} |"
                + "".join(f" {share:.0%} |" for share in others)
            )
    commands = "; ".join(f"*{name}*: `{text}`" for name, text in record["arms"].items())
    return "\n".join(lines) + (
        "\n\nLoss in nats per token; agreement is with the arm's own last layer, on the text "
        f"learnt from. Written by `{record['command']}`. {commands}."
    )


def general(record: dict[str, Any]) -> str:
    """Return what exits learnt and what became of the last layer, on text that nobody learnt."""
    rows = {name: next(iter(row["after"].values())) for name, row in record["rows"].items()}
    depths, plain = [row["depth"] for row in rows["sft"]], rows["sft"][-1]["loss"]
    exits = ", ".join(map(str, depths[:-1]))
    lines = [
        f"| arm | tokens seen | loss at {exits} | agreement | loss of the last layer | to `sft` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in rows.items():
        last = found[-1]["loss"]
        lines.append(
            f"| {name} | {record['rows'][name]['tokens']:,} "
            f"| {' / '.join(format(row['loss'], '.2f') for row in found[:-1])} "
            f"| {' / '.join(format(row['agreement'], '.0%') for row in found[:-1])} "
            f"| {last:.3f} | {last / plain - 1:+.1%} |"
        )
    commands = "; ".join(f"*{name}*: `{text.strip()}`" for name, text in record["arms"].items())
    return "\n".join(lines) + (
        "\n\nNats per token and agreement with the arm's own last layer, on 200 rows of Alpaca "
        "that no arm learnt; tokens of the arm itself. Written by "
        f"`{record['command']}`. {commands}."
    )


def narrow(record: dict[str, Any]) -> str:
    """Return quality and time of tuned models under plans, beside full-depth fine-tuning."""
    score = "rouge_l" if record["task"] == "e2e" else "accuracy"
    lines = [
        f"| arm | plan | {score.replace('_', '-').replace('rouge-l', 'ROUGE-L')} "
        "| to the baseline (95%) | layers saved | time to the baseline, each text | in all |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["arms"]:
        took_all = row["clock"]["to_baseline"]["total"]
        weights = row.get("weights", record["weights"])
        plan = row["plan"] + ("" if weights == record["weights"] else f", {weights}")
        gap, times = row["differences"][score], row["clock"]["to_baseline"]["answers"]
        said = f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        took = f"{times['median']:.2f} ({times['low']:.2f}-{times['high']:.2f})"
        lines.append(
            f"| {row['name']} | {plan} | {row[score]:.3f} | {said} "
            f"| {row['layers_saved']:.0%} | {took} | {took_all:.2f} |"
        )
    machine = record["machine"]
    return "\n".join(lines) + (
        f"\n\n{record['texts']} texts, {record['weights']}, greedy, batch 1 on the clock, "
        f"{machine['threads']} threads of {machine['processor']}; medians and quartiles of "
        f"{record['rounds']} rounds over {record['timed_prompts']} prompts in turns. Written by "
        f"`{record['command']}`."
    )


def train_speed(record: dict[str, Any]) -> str:
    """Return what a training step costs, contestant by contestant."""
    lines = ["| step | tokens/s | time to `sft` | time to naive | memory it adds |"]
    lines.append("|---|---:|---:|---:|---:|")
    for row in record["rows"]:
        cells = [row["tokens_per_second"], row["time_to_sft"], row["time_to_naive"]]
        rate, sft, naive = (_spread(cell, 0 if i == 0 else 2) for i, cell in enumerate(cells))
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"| {row['name']} | {rate} | {sft} | {naive} | {memory} |")
    exits = ", ".join(map(str, record["exits"]))
    return "\n".join(lines) + (
        f"\n\n{record['model']}, exits {exits}, {record['tokens']:,} tokens a step, "
        f"{record['learnt']:,} of them learnt; {record['machine']['threads']} threads of "
        f"{record['machine']['processor']}; medians and quartiles of {record['rounds']} rounds in "
        f"turns. Written by `{record['command']}`."
    )


def certificates(record: dict[str, Any]) -> str:
    """Return how often certificates were violated, risk by risk and bound by bound."""
    lines = [
        "| risk | alpha | bound | certified | violations (allowed) | mean risk | mean cost "
        "| held-out above alpha |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        caught = "" if row["holds"] else " **caught**"
        allowed = "mean" if row["delta"] is None else f"{row['allowed']}"
        lines.append(
            f"| {row['risk']} | {row['alpha']:g} | {row['bound']} | {row['certified']} "
            f"| {row['violations']} ({allowed}){caught} | {row['mean_risk']:.3f} "
            f"| {row['mean_cost']:.2f} | {row['held_out_above']} |"
        )
    one, drift = record["calibration"], record["drift"]
    agreement = ", ".join(f"{share:.0%} at {depth}" for depth, share in record["agreement"].items())
    labels = record.get("wrong") or {}
    missed = "".join(f", {name} {share:.1%}" for name, share in labels.items())
    wrong = f"; wrong labels{missed[1:]}" if labels else ""
    said = (
        "no drift, for no setting was certified or the text was given"
        if drift is None
        else f"drift of a plan for disagreement at most 0.1, on {drift['n']} held-out prompts: "
        f"{drift['full_text']:.3f} on the full model's text, {drift['own_text']:.3f} on its own"
    )
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['weights']}, {record['sequences']} sequences of "
        f"{record['tokens'] / record['sequences']:.0f} tokens on average, "
        f"agreement {agreement}{wrong}; "
        f"{record['rows'][0]['repeats']} draws and as many plain splits for each row, delta 0.1. "
        f"Calibrating over {one.get('settings', 'all')} settings took {one['seconds']:.1f} s, "
        f"{record['share_of_pass']:.2f} of the {record['pass_seconds']:.0f} s of the pass; {said}. "
        f"Written by `{record['command']}`."
    )


def _spread(cell: list[float], digits: int) -> str:
    low, middle, high = cell
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


TABLES: dict[str, dict[str, Callable[..., str]]] = {
    "README.md": {" ".join(SHOWN): claims, "bench": bench, "costs": costs},
    "docs/calibration.md": {
        "certificates": certificates,
        "certificates_labels": certificates,
        "certificates_stories": certificates,
    },
    "docs/clock.md": {"clock": clock, "clock_avx2": clock},
    "docs/tuning.md": {
        "train_speed": train_speed,
        "tuning_blocks": tuning,
        "tuning_general": general,
        "narrow_sst2": narrow,
        "narrow_ag_news": narrow,
        "narrow_e2e": narrow,
        "narrow_e2e_int4": narrow,
        "race_e2e": race,
    },
    "docs/laws.md": {"lossless": lossless},
    "docs/oracle.md": {"oracle": oracle, "oracle_running": oracle},
    "docs/search.md": {"control": control, "sublayers": sublayers},
    "docs/results.md": {
        "lite": lite,
        "lite_tuned": lite,
        "lite_whole": lite,
        "sorted": sorted_llama,
        "adainfer": adainfer,
        "adainfer_tuned": adainfer,
        "narrow_adainfer": narrow,
        "skip_exit": skip_exit,
        "skip_gates": skip_gates,
        "oracle": beside,
        "oracle_running": beside,
        "policies": policies,
        "policies_e2e": policies,
        "evaluate_exits": evaluated,
        "race": race,
        "race_int4": race,
    },
    "docs/families.md": {"families": families},
}
"""By page and the names of the records that a table is made of, mostly one."""


def written(page: str) -> str:
    """Return the page with its tables as the results say."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in TABLES[page].items():
        files = [ROOT / "results" / f"{record}.json" for record in name.split()]
        shown = table(*(json.loads(file.read_text(encoding="utf-8")) for file in files))
        block = f"<!-- {name}: generated by docs/tables.py -->\n{shown}\n<!-- end -->"
        pattern = rf"<!-- {name}: generated by docs/tables.py -->.*?<!-- end -->"
        parts = re.split(pattern, text, flags=re.DOTALL)
        if len(parts) != 2:
            sys.exit(f"{page} has {len(parts) - 1} places for the table {name!r}, not one")
        text = block.join(parts)
    return text


def main() -> None:
    """Write or check every page."""
    for page in TABLES:
        new, path = written(page), ROOT / page
        if "--check" in sys.argv and new != path.read_text(encoding="utf-8"):
            sys.exit(f"{page} does not show what results/ says; run python docs/tables.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
