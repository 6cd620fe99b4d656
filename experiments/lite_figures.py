"""Figures of the LITE experiment: what a trace says of each exit; the paper's beside ours."""

from __future__ import annotations

from typing import Any

from kept import first_rows
from papers import LITE_7B, LITE_SAVED, compared, layers_saved, percent
from torch import Tensor

from offramp.policy import Threshold
from offramp.reliability import Bins
from offramp.trace import Trace, replay

SETS = ("vicuna", "koala", "self_instruct", "wizardlm")
CURVE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds of the curve that is replayed on the trace."""


def by_exit(trace: Trace) -> list[dict[str, Any]]:
    """Return agreement with the last layer and confidence of each exit, on the traced tokens."""
    rows = []
    for k, depth in enumerate(trace.exits):
        sure, right = trace.scores["max_prob"][:, k].double(), trace.agrees[:, k].double()
        bins = Bins()
        bins.add(sure, right)
        gap = (bins.confidence - bins.right).abs().sum().item() / len(sure)
        rows.append(
            {
                "depth": depth,
                "agreement": right.mean().item(),
                "confidence": sure.mean().item(),
                "calibration_error": gap,
                "reliability": bins.curve(),
            }
        )
    return rows


def curve(trace: Trace) -> list[dict[str, Any]]:
    """Return layers saved and agreement by threshold, replayed on the full model's own text."""
    later = ~first_rows(trace.rows)
    paper = LITE_7B.at(trace.exits, trace.num_layers)
    settings = [("paper's thresholds", paper)]
    settings += [(f"{value:g}", dict.fromkeys(trace.exits, value)) for value in CURVE]
    found = []
    for name, thresholds in settings:
        done = replay(trace, Threshold("max_prob", tuple(thresholds.items())))
        found.append(
            {
                "name": name,
                "layers_saved": layers_saved(done.depths[later].tolist(), trace.num_layers),
                "agreement": _mean(done.chosen[later] == trace.chosen[later, -1]),
            }
        )
    return found


def _mean(rows: Tensor) -> float | None:
    return rows.double().mean().item() if len(rows) else None


def comparison(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the paper's figures beside those of the record."""
    point = record["points"][0]
    every, last = point["sets"]["all"], record["last_layer"]
    size = f"{sum(record['prompts'].values())} prompts, {record['num_layers']} layers"
    said = "reported; figures not known to us"
    rows = [
        compared(
            f"compute saved, {name}",
            f"{share:.2%}",
            percent(every["layers_saved"]),
            f"unsure: here layers alone; what the paper counts is not known to us ({size})",
        )
        for name, share in LITE_SAVED.items()
    ]
    rows += [
        compared(
            "the same, checks, fill and head counted",
            "not told apart",
            percent(every["operations_saved"]),
            "operations by the meter, of tokens after the first",
        ),
        compared(
            "the same depths at the prices of LLaMA-2-7B",
            f"{LITE_SAVED['7B']:.2%}",
            percent(every["saved_at_7b_prices"]),
            "computed: a check costs 0.65 layers there",
        ),
    ]
    meaning = every["similarity"]
    own = "to the own answer at full depth"
    rows += [
        compared(
            "similarity of meaning",
            said,
            "-" if meaning is None else f"{meaning:.2f}",
            f"unsure: cosine by MiniLM {own}; the paper's embedder is not known to us",
        ),
        compared("similarity of words", "none given", f"{every['rouge_l']:.2f}", f"ROUGE-L {own}"),
        compared(
            "tokens generated, of full depth's",
            said,
            f"{every['length_ratio']:.2f}",
            f"yes, up to {record['max_new_tokens']} tokens",
        ),
    ]
    harm = "-" if last is None else f"loss {last['before']:.2f} to {last['after']:.2f}"
    rows += [
        compared("last layer unharmed", "yes, says a judge (Claude)", harm, "no: held-out loss"),
        compared(
            "time to own full depth, per token",
            "none given",
            f"{point['clock']['tokens']['median']:.2f}",
            "wall-clock, batch 1",
        ),
    ]
    return rows
