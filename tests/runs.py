"""Made-up results of verbs, as their JSON is: for reports, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS, EXITS = 12, tuple(range(1, 12))
WORDS = ("the", "a", "cat", "sat", "on", "then", "it", "rain", "fell", "over", "green", "hill")
SHARED = {"model": "tiny", "versions": {"offramp": "0.1.0"}, "machine": {"processor": "a clock"}}
PLAN = {"run": {"kind": "exit", "signal": "max_prob", "thresholds": {"4": 0.8, "8": 0.7}}}
FULL = {"run": {"kind": "full"}}


def generated(
    prompts: Sequence[Any] = ("Hi",),
    pieces: Sequence[str] | None = None,
    *,
    tokens: int = 20,
    plan: dict[str, Any] = PLAN,
    seconds: float = 2.0,
    **more: Any,
) -> dict[str, Any]:
    """Return what ``generate --json`` prints; the pieces given, or words at random."""
    draw = random.Random(0)
    outputs = []
    for prompt in prompts:
        said = list(pieces or (" " + draw.choice(WORDS) for _ in range(tokens)))
        deep = [LAYERS if plan == FULL else draw.choice((4, 8, 12)) for _ in said]
        outputs.append(
            {
                "prompt": prompt,
                "text": "".join(said),
                "token_ids": [1 + i % 90 for i in range(len(said))],
                "pieces": said,
                "depths": deep,
                "accepted": [False] * len(said),
                "finish_reason": "length",
            }
        )
    cost = {"flops_ratio": 0.8, "bytes_ratio": 0.9, "predicted_ratio": None, "seconds": seconds}
    return {
        "format": 1,
        "verb": "generate",
        **SHARED,
        "plan": plan,
        "num_layers": LAYERS,
        "raw": False,
        "backbone": "fast",
        "weights": "fp32",
        "tokens": sum(len(output["pieces"]) for output in outputs),
        "drafted": 0,
        "accepted": 0,
        **cost,
        "outputs": outputs,
    } | more


def trace_of(run: dict[str, Any], word: str = " word") -> dict[str, Any]:
    """Return what ``trace --run`` prints of a run: the deeper, the surer and the more agreed."""
    draw = random.Random(1)
    texts = [_traced(output, draw) for output in run["outputs"]]
    rows = [
        {
            "depth": depth,
            "agreement": depth / LAYERS,
            "reliability": [
                {"tokens": 10 * b, "confidence": b / 10 + 0.05, "agreement": b / 10 * 0.9}
                for b in range(10)
            ],
        }
        for depth in EXITS
    ]
    points = [
        {"name": f"all at {d}", "cost": d / LAYERS, "quality": q, "low": q - 0.1, "high": q + 0.04}
        for d, q in ((depth, 0.95 * depth / LAYERS) for depth in EXITS)
    ]
    return {
        "format": 1,
        "verb": "trace",
        **SHARED,
        "plan": run["plan"],
        "num_layers": LAYERS,
        "tokens": run["tokens"],
        "exits": EXITS,
        "rows": [*rows, {"depth": LAYERS, "agreement": 1.0}],
        "texts": texts,
        "vocabulary": {str(token): f"{word}{token}" for token in range(100)},
        "curve": {
            "quality": "tokens on which the choice is the full model's",
            "cost": "layers run / all layers",
            "points": points,
            "full": {"name": "full depth", "cost": 1.0, "quality": 1.0},
        },
    }


def evaluated(
    times: dict[str, float], words: Sequence[str] = ("rouge_l_to_full",), **more: Any
) -> dict[str, Any]:
    """Return what ``evaluate --json`` prints of tasks whose tokens took so long, full depth = 1."""
    scores = [
        {
            "score": word,
            "against": "full model",
            "better": "higher",
            "plan": {"mean": 0.612, "low": 0.467, "high": 0.758},
            "full": {"mean": 1.0, "low": 1.0, "high": 1.0},
            "difference": {"mean": -0.388, "low": -0.533, "high": -0.242, "lower_share": 1.0},
            "verdict": "worse",
        }
        for word in words
    ]
    tasks = []
    for name, ratio in times.items():
        point = {"name": "this plan", "cost": 0.9, "quality": 0.612, "low": 0.467, "high": 0.758}
        time = {"median": ratio, "low": ratio - 0.05, "high": ratio + 0.05}
        tasks.append(
            {
                "task": name,
                "items": 12,
                "left_out": 1,
                "mean_depth": 8.25,
                "flops_ratio": 0.9,
                "tokens": {"plan": 640, "full": 637},
                "time_ratio": time,
                "time_per_token_ratio": time,
                "scores": scores,
                "curve": {
                    "quality": f"{name}: {words[0]}",
                    "cost": "operations / full depth",
                    "points": [point],
                    "full": {"name": "full depth", "cost": 1.0, "quality": 1.0},
                },
            }
        )
    made = {"format": 1, "verb": "evaluate", **SHARED, "plan": PLAN, "num_layers": LAYERS}
    return made | {"tasks": tasks} | more


def _traced(output: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    chosen, sure = [], []
    for token, depth in zip(output["token_ids"], output["depths"], strict=True):
        full = token if depth == LAYERS or draw.random() < 0.9 else 99
        chosen.append([token if d >= depth - 2 and d <= depth else 98 for d in EXITS] + [full])
        sure.append([round(min(0.99, draw.random() * d / LAYERS + d / 16), 3) for d in EXITS])
    return {
        "prompt": output["prompt"],
        "token_ids": output["token_ids"],
        "pieces": output["pieces"],
        "depths": output["depths"],
        "chosen": chosen,
        "scores": {"max_prob": sure},
    }


def saved(folder: Path, **results: dict[str, Any]) -> list[Path]:
    """Write results into files of these names; return the files."""
    paths = []
    for name, result in results.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result))
        paths.append(path)
    return paths
