"""Dynamic layer selection (Glavas et al. 2024): its figures beside those of three records; pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from papers import compared

Row = dict[str, Any]
SKIPPING = "skipping far gentler (curves not known to us)"
FIXED, HIDDEN = (7.79, 0.2991), (7.30, 0.2931)
"""Layers of 24 and ROUGE-L of gates at alpha 10, on a fixed input and on the hidden state."""
EVENLY = 0.3085
"""ROUGE-L of 8 layers of 24, evenly spread, fine-tuned for that budget."""
FULL, FREE, SHARE = 0.3418, 0.3964, 0.233
"""ROUGE-L of all 24 layers and of the oracle with depth for free; its share of layers to equal."""
RANKED, CONSTANT = (0.3232, 16), (0.3208, 12)
"""ROUGE-L and layers: 8 for the easier half of the texts and 24 for the harder; 12 for all."""


# -- skip or exit


def skip_or_exit(record: Row) -> list[Row]:
    """Return how much gentler skipping is than exiting with as many layers."""
    by = {(row["arm"], row["layers"]): row for row in record["rows"]}
    depths = [layers for arm, layers in by if arm == "exit"]

    def pairs(arm: str) -> list[tuple[Row, Row]]:
        return [(by[arm, n], by["exit", n]) for n in depths if (arm, n) in by]

    evenly, chosen = pairs("uls"), pairs("cosine")
    rows = [
        compared("evenly spread layers (ULS) against exiting", SKIPPING, _ahead(evenly), _SAME),
        compared("layers chosen by cosine against exiting", "not tried", _ahead(chosen), _SAME),
    ]
    rows += [
        compared(
            f"cosine of end states, {skip['layers']} layers evenly spread against the first "
            f"{skip['layers']}",
            SKIPPING,
            f"{skip['cosine']:.3f} against {leave['cosine']:.3f} "
            f"(in the paper's way {leave['cosine_no_norm']:.3f})",
            "the last norm on both sides; the paper's exits lack it",
        )
        for skip, leave in evenly
    ]
    rows += [
        compared(
            f"the same, {skip['layers']} layers chosen by cosine",
            "not tried",
            f"{skip['cosine']:.3f} against {leave['cosine']:.3f}",
            "the last norm on both sides",
        )
        for skip, leave in chosen
    ]
    return [
        *rows,
        compared(
            "the full model against itself, compared as the paper's exits are",
            "not told",
            f"cosine {record['full']['cosine_no_norm']:.3f}",
            "the norm on one side only: what the paper's exits lose by that alone",
        ),
    ]


_SAME = "no: here also by loss and equal tokens, teacher-forced"


def _ahead(pairs: list[tuple[Row, Row]]) -> str:
    """Return at how many depths skipping is the better of each pair, by three measures."""

    def count(better: Callable[[Row, Row], bool]) -> int:
        return sum(better(skip, leave) for skip, leave in pairs)

    cosine = count(lambda skip, leave: skip["cosine"] > leave["cosine"])
    loss = count(lambda skip, leave: skip["loss"] < leave["loss"])
    equal = count(lambda skip, leave: skip["agreement"] > leave["agreement"])
    return (
        f"better at {cosine} of {len(pairs)} depths by cosine, {loss} by loss, {equal} by equal "
        "tokens"
    )


# -- gates


def gates(record: Row) -> list[Row]:
    """Return gates on the state beside gates on a fixed input, and beside chosen layers."""
    known = [
        (kind, name, said, _dearest(record, kind))
        for kind, name, said in (
            ("hidden", "the hidden state", HIDDEN),
            ("fixed", "a fixed input", FIXED),
        )
    ]
    tried = [(kind, name, said, row) for kind, name, said, row in known if row is not None]
    rows = [
        compared(
            f"layers of a token, gates on {name}",
            f"{said[0]:.2f} of 24 ({said[0] / 24:.0%}), alpha 10",
            f"{row['layers']:.1f} of {record['num_layers']} "
            f"({row['layers'] / record['num_layers']:.0%}), alpha {row['alpha']:g}",
            "yes, but sampled there and decided here; other prices of a layer",
        )
        for _, name, said, row in tried
    ]
    rows += [
        compared(
            f"quality, gates on {name}",
            f"ROUGE-L {said[1]:.4f}",
            f"loss {row['loss']:.2f}",
            "no: held-out loss; of arms with other numbers of layers",
        )
        for _, name, said, row in tried
    ]
    for kind, _, _, row in tried:
        rows += _beside_paths(record, kind, row)
    return rows + [
        compared(
            f"operations of whole texts, gates on {name}",
            "none: skipping is simulated",
            f"{row['operations']:.2f} of full depth's",
            "counted; prompts run all layers, as there",
        )
        for _, name, _, row in tried
    ]


def _dearest(record: Row, kind: str) -> Row | None:
    """Return the gates of a kind that were tuned with the highest price of a layer."""
    rows: list[Row] = [row for row in record["rows"] if row["arm"] == f"gates, {kind} input"]
    return max(rows, key=lambda row: row["alpha"], default=None)


def _beside_paths(record: Row, kind: str, row: Row) -> list[Row]:
    """Return gates beside as many layers, chosen and evenly spread, the same for every token."""
    by = {other["arm"]: other for other in record["rows"]}
    evenly = f"ROUGE-L {EVENLY:.4f} for 8 of 24 layers tuned for it: above both gates"
    return [
        compared(
            f"gates, {kind} input, against {arm}",
            said,
            f"loss {row['loss']:.2f} against {by[arm]['loss']:.2f}",
            "no: held-out loss; here nothing is tuned for a number of layers",
        )
        for way, said in (("by cosine", "not tried"), ("evenly (ULS)", evenly))
        if (arm := f"{round(row['layers'])} {way}") in by
    ]


# -- the oracle


def of_oracle(record: Row) -> list[Row]:
    """Return what an oracle needs and gains, beside what chance gains."""
    rows = []
    for arm in record["arms"]:
        name, layers = f"{arm['text']}, {arm['score']}", arm["costs"][-1]
        low, high = (end / layers for end in arm["smallest_interval"])
        null = arm["null_gain"]
        why = "by the score's nature" if arm["teacher_forced"] else "for nothing is drawn"
        rows += [
            compared(
                f"{name}: layers at which the oracle equals the full model",
                f"{SHARE:.1%} (5.6 of 24)",
                f"{arm['smallest'] / layers:.1%} ({low:.1%} to {high:.1%}; "
                f"{arm['smallest']:.1f} of {layers:g})",
                f"{_as_scored(arm)}; no depth below {arm['costs'][0]:g} offered",
            ),
            *_halved(name, arm),
            compared(
                f"{name}: gain on the full model, depth for free",
                f"{FREE - FULL:+.4f} ROUGE-L on {FULL:.4f}",
                f"{_zero(arm['gain']):+.3f} on {arm['full']:.3f}",
                _as_scored(arm),
            ),
            compared(
                f"{name}: the same gain by chance alone",
                "not tried",
                f"none, {why}" if null is None else f"{null:+.3f}",
                "runs of the full model that differ by seed alone",
            ),
            *_foreseen(name, arm),
        ]
    return rows


def _as_scored(arm: Row) -> str:
    """Return how far a score is the paper's, which is ROUGE-L of what each depth writes."""
    if arm["teacher_forced"]:
        return f"no: {arm['score']}, teacher-forced"
    return "yes, of other texts and another model"


def _halved(name: str, arm: Row) -> list[Row]:
    """Return what choices made on half of each text's tokens do; an answer has no halves."""
    if not arm["teacher_forced"]:
        return []
    half, layers = arm["smallest_held_out"], arm["costs"][-1]
    return [
        compared(
            f"{name}: chosen on half of the tokens, judged on the other",
            "not tried",
            "never" if half is None else f"{half / layers:.1%}",
            "what is left without peeking at the score itself",
        )
    ]


def _foreseen(name: str, arm: Row) -> list[Row]:
    """Return what a choice before the answer gets, where the oracle gains the most.

    Of few texts no router was fitted, and there is no such row.
    """
    row = max(arm["rows"], key=lambda row: row["oracle"] - row["fixed"])
    if row["recovered"] is None:
        return []
    low, high = row["recovered_interval"]
    return [
        compared(
            f"{name}: what is gained by a choice that sees the prompt alone",
            f"ROUGE-L {RANKED[0]:.4f} at {RANKED[1]} layers; {CONSTANT[0]:.4f} at "
            f"{CONSTANT[1]} each",
            f"{row['recovered']:.0%} ({low:.0%} to {high:.0%}) of the oracle's, "
            f"at {row['budget']:g} layers",
            "no: there by rank of difficulty, here by a regression",
        )
    ]


def _zero(value: float) -> float:
    """Return the value, what is 0 but for rounding as 0."""
    return round(value, 9) + 0.0
