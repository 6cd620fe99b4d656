"""What commands print: tables and coloured tokens for people, one JSON line for machines."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offramp.files import write_text
from offramp.machine import processor, versions
from offramp.report import FORMAT
from offramp.shown import shade, visible


def environment() -> dict[str, Any]:
    """Return the versions and the machine that every result carries."""
    import torch

    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"versions": versions(), "machine": machine}


def finish(record: Mapping[str, Any], *, as_json: bool, out: Path | None) -> None:
    """Write the record to ``out`` and, if asked for, as the last line of stdout."""
    line = json.dumps(
        _finite({"format": FORMAT, **record}), ensure_ascii=False, separators=(",", ":")
    )
    if as_json:  # first: a place that cannot be written must not cost the run
        print(line, flush=True)
    if out is not None:
        write_text(out, line + "\n")


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinities as null: they are not JSON."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table, numbers right-aligned."""
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def figures_table(figures: Mapping[str, Any], console: Console) -> None:
    """Print what a run did and cost, with its slow-downs as plain as its gains."""
    rows = [
        ("new tokens", f"{figures['tokens']}"),
        ("mean depth", f"{figures['mean_depth']:.1f}"),
        ("layer passes", f"{figures['layer_passes']}"),
        ("layer rows", f"{figures['layer_tokens']}"),
        ("head rows", f"{figures['head_rows']}"),
        ("check rows", f"{figures['check_rows']}"),
        ("fill rows", f"{figures['fill_rows']}"),
        ("operations / full depth", f"{figures['flops_ratio']:.2f}"),
        ("weights read / full depth", f"{figures['bytes_ratio']:.2f}"),
        ("seconds", f"{figures['seconds']:.2f}"),
        *_predicted(figures),
        ("tokens per second", f"{figures['tokens_per_second']:.1f}"),
    ]
    halves = figures["attention_passes"], figures["mlp_passes"]
    if any(halves):
        rows.insert(3, ("passes of attention, MLP alone", "{}, {}".format(*halves)))
    if figures["drafted"]:
        share = figures["accepted"] / figures["drafted"]
        rows.insert(
            2, ("drafts confirmed", f"{figures['accepted']} of {figures['drafted']} ({share:.0%})")
        )
    table("cost", ("", ""), rows, console)
    if figures["predicted_ratio"] is not None:
        if figures["predicted_ratio"] > 1:
            console.print("Slower than plain full-depth decoding, by what this machine measured.")
    elif figures["bytes_ratio"] > 1 and figures["flops_ratio"] > 1:
        console.print("Slower than plain full-depth decoding by both measures of cost.")


def _predicted(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on predicted time; none on a machine that was not measured."""
    if figures["predicted_seconds"] is None:
        return []
    return [
        ("seconds predicted", f"{figures['predicted_seconds']:.2f}"),
        ("predicted time / full depth", f"{figures['predicted_ratio']:.2f}"),
    ]


def depth_text(piece: str, depth: int, num_layers: int) -> Text:
    """Return text coloured by the depth that chose it, its control characters made visible."""
    red, green, blue = shade(depth / num_layers)
    return Text(visible(piece), style=f"rgb({red},{green},{blue})")
