"""Ways to accelerate a sorted model, what each did, and Sorted LLaMA's figures beside ours."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kept import Kept
from narrow_arms import Arm
from papers import SOFT_13B, compared, layers_saved, operations_saved, percent
from quality import Similarity, quality

import offramp
from offramp.bench.own import describe
from offramp.errors import OfframpError
from offramp.paths import prefix
from offramp.plan import check_of

DRAFTED = 4
"""Tokens of a draft, with which the paper's adaptive window begins."""
LAYERS = 40
SPECULATED = {12: (1.16, 0.37), 16: (1.11, 0.31), 20: (1.11, 0.26)}
"""Speed-up and share of drafts rejected on PandaLM's prompts, by the layers of the draft."""
DYNAMIC = "1.34x (TriviaQA: 1.12x)"
SCORES: dict[str, dict[int, float]] = {
    "sft": {
        12: -0.165,
        16: 0.194,
        20: 0.712,
        24: 0.829,
        28: 0.774,
        32: 0.806,
        36: 0.409,
        40: -0.059,
    },
    "ict": {
        12: -0.118,
        16: 0.329,
        20: 0.703,
        24: 0.797,
        28: 0.735,
        32: 0.756,
        36: 0.271,
        40: -0.059,
    },
    "extracted": {12: -0.05, 20: -0.168, 28: -0.085, 36: -0.056},
}
"""(wins - losses) / comparisons by a judge, of SoFT's sub-model against another of equal depth."""
NAMES = {"sft": "fine-tuned (SFT)", "ict": "heads (SFT+ICT)", "extracted": "extracted"}


def ways(exits: tuple[int, ...], num_layers: int) -> dict[str, offramp.Plan]:
    """Return the ways to accelerate, by name."""
    drafts = [prefix(stop, num_layers) for stop in exits]
    thresholds = SOFT_13B.at(exits, num_layers)
    runs = {
        f"draft {len(draft)}": offramp.Plan(run=offramp.Speculate(draft=draft, tokens=DRAFTED))
        for draft in drafts
    }
    adapt = offramp.Adapt(drafts=tuple(drafts), tokens=2 * DRAFTED)
    copied = offramp.Exit(signal="max_prob", thresholds=thresholds, kv="copy")
    exact = offramp.Exit(signal="max_prob", thresholds=thresholds)
    return runs | {
        "draft as pays": offramp.Plan(run=adapt),
        "copied": offramp.Plan(run=copied),
        "exact": offramp.Plan(run=exact),
    }


def point(arm: Arm, kept: Kept, full: Kept, similarity: Similarity | None) -> dict[str, Any]:
    """Return what a way to accelerate saved and kept.

    Raises:
        OfframpError: a lossless one wrote other tokens in full precision.
    """
    run, shape = arm.plan.run, arm.model.backbone.shape
    wrong = sum(a != b for a, b in zip(kept.written, full.written, strict=True))
    if arm.plan.lossless and wrong and arm.model.backbone.weights == "fp32":
        raise OfframpError(f"{arm.name}: {wrong} answers are not those of plain decoding")
    drafted, accepted = kept.work.drafted, kept.work.accepted
    saved = operations_saved(kept.work, kept.sizes, shape, check_of(arm.plan).weights(shape))
    return {
        "name": arm.name,
        "kind": run.kind,
        "plan": describe(run),
        "draft": len(run.draft) if isinstance(run, offramp.Speculate) else None,
        "rejected": 1 - accepted / drafted if drafted else None,
        "mismatched_texts": wrong if arm.plan.lossless else None,
        "layers_saved": layers_saved(kept.later, shape.num_layers),
        "operations_saved": saved.generated,
        "quality": quality(kept, full, arm.model.tokenizer, similarity),
    }


def nearest(known: Collection[int], depth: int, num_layers: int) -> int:
    """Return the paper's depth that is nearest by share; of two, the shallower."""
    return min(sorted(known), key=lambda own: abs(own * num_layers - depth * LAYERS))


def comparison(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the paper's figures beside those of the record."""
    return [*_sub_models(record), *_drafts(record), *_dynamic(record)]


def _sub_models(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare sub-models of equal depth: the paper by a judge, here by held-out loss."""
    loss = {(row["model"], row["depth"]): row["loss"] for row in record["depths"]}
    found = []
    for (model, depth), other in loss.items():
        if model == "sorted" or ("sorted", depth) not in loss:
            continue
        scores = SCORES[model]
        like = nearest(scores, depth, record["num_layers"])
        found.append(
            compared(
                f"sorted against {NAMES[model]}, depth {depth}",
                f"{scores[like]:+.3f} ({like} of {LAYERS})",
                f"loss {loss['sorted', depth]:.2f} against {other:.2f}",
                "no: (W-L)/T by a judge; held-out loss here",
            )
        )
    return found


def _drafts(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for point in record["points"]:
        if point["draft"] is None:
            continue
        like = nearest(SPECULATED, point["draft"], record["num_layers"])
        speed, rejected = SPECULATED[like]
        found += [
            compared(
                f"speculation, draft {point['draft']} of {record['num_layers']} layers: speed",
                f"{speed:.2f}x ({like} of {LAYERS})",
                f"{speed_up(point):.2f}x",
                "per token, wall-clock, batch 1; another machine, fixed draft length",
            ),
            compared("its drafts rejected", percent(rejected), percent(point["rejected"]), "yes"),
        ]
    found.append(
        compared(
            "speculation: answers that differ from plain ones",
            "some: scores -0.144 to -0.211",
            f"{sum(point['mismatched_texts'] or 0 for point in record['points'])} texts",
            "token by token here; the paper by a judge",
        )
    )
    return found


def _dynamic(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for point in record["points"]:
        if point["kind"] == "exit":
            kept = point["quality"]
            found += [
                compared(
                    f"instance-aware, {point['name']}: speed",
                    DYNAMIC,
                    f"{speed_up(point):.2f}x",
                    "per token, wall-clock, batch 1; its cache is not described",
                ),
                compared(
                    "its answers",
                    "score -0.050",
                    f"{kept['same_text']:.0%} the same, ROUGE-L {kept['rouge_l']:.2f}",
                    "no: nearness to the own answer at full depth, no judge",
                ),
            ]
    return found


def speed_up(point: dict[str, Any]) -> float:
    """Return how many times as fast as plain decoding it writes a token."""
    return 1 / float(point["clock"]["tokens"]["median"])
