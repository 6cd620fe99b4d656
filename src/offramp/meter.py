"""Counts the rows that really went through each kind of matrix product. Knows no prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from offramp.paths import ATTENTION, attends, is_whole


class Stretch(Protocol):
    """Consecutive positions of one text; a :class:`~offramp.batch.Span` is one."""

    @property
    def start(self) -> int:
        """Return the first position."""

    @property
    def stop(self) -> int:
        """Return the position after the last."""


@dataclass(slots=True)
class Tally:
    """The same work, by how many rows went through at once: what its time depends on."""

    layers: Counter[int] = field(default_factory=Counter)
    """Layer passes, by their rows."""
    attentions: Counter[int] = field(default_factory=Counter)
    """Passes of a layer's attention alone, by their rows."""
    mlps: Counter[int] = field(default_factory=Counter)
    """Passes of a layer's MLP alone, by their rows."""
    heads: Counter[int] = field(default_factory=Counter)
    """Readouts, by their rows."""
    checks: Counter[int] = field(default_factory=Counter)
    """Readouts of a cheap check's head, by their rows."""
    maps: Counter[int] = field(default_factory=Counter)
    """Passes of an exit's affine map, by their rows."""
    fills: Counter[int] = field(default_factory=Counter)
    """Passes of a layer only for its keys and values, by their rows."""
    keys: int = 0
    """Keys read, summed over layer passes: each text's once, however many rows look at them."""
    steps: int = 0
    """Steps of the loop over segments."""
    asks: int = 0
    """Exits at which some row was asked, whatever it was asked by."""

    def __sub__(self, earlier: Tally) -> Tally:
        return Tally(
            *(getattr(self, item.name) - getattr(earlier, item.name) for item in fields(self))
        )


@dataclass(slots=True)
class Meter:
    """Work done by a backbone, in rows (arithmetic) and passes (weight reads).

    A *pass* is one call of a module, whatever its rows: on a memory-bound machine it is what costs.
    A *row* is one token going through it: on a compute-bound machine it is what costs.
    """

    layer_passes: int = 0
    """Calls of a whole decoder layer, an exit's own block among them."""
    layer_tokens: int = 0
    """Rows through a whole decoder layer."""
    attention_passes: int = 0
    """Calls of a layer's attention alone, where a path leaves out its MLP."""
    attention_tokens: int = 0
    """Rows through a layer's attention alone."""
    mlp_passes: int = 0
    """Calls of a layer's MLP alone, where a path leaves out its attention."""
    mlp_tokens: int = 0
    """Rows through a layer's MLP alone."""
    head_passes: int = 0
    """Calls of the readout (norm and vocabulary head)."""
    head_rows: int = 0
    """Rows through the readout, full exit checks and chosen tokens alike."""
    check_passes: int = 0
    """Calls of a cheap check's head."""
    check_rows: int = 0
    """Rows through a cheap check's head."""
    map_passes: int = 0
    """Calls of an affine map that an exit owns."""
    map_rows: int = 0
    """Rows through an affine map that an exit owns."""
    fill_passes: int = 0
    """Calls of a layer only for its keys and values (``kv="copy"``)."""
    fill_rows: int = 0
    """Rows through a layer's projections only for their keys and values."""
    attended: int = 0
    """Keys attended to, summed over layers and rows: the context term of attention."""
    drafted: int = 0
    """Tokens proposed by a draft."""
    accepted: int = 0
    """Proposed tokens that the full model confirmed."""
    tally: Tally = field(default_factory=Tally)
    """The passes by their rows; no part of the JSON."""

    def ran(
        self, layers: int, spans: Iterable[Stretch], *, attentions: int = 0, mlps: int = 0
    ) -> None:
        """Count one pass of these rows through each of ``layers`` layers, and of so many halves.

        Whatever attends looks, from position p, at p + 1 keys.
        """
        rows = attended = keys = 0
        for span in spans:
            rows += span.stop - span.start
            attended += (span.stop * (span.stop + 1) - span.start * (span.start + 1)) // 2
            keys += span.stop
        self.layer_passes += layers
        self.layer_tokens += layers * rows
        self.attended += (layers + attentions) * attended
        self.tally.layers[rows] += layers
        self.tally.keys += (layers + attentions) * keys
        if attentions or mlps:
            self.attention_passes += attentions
            self.attention_tokens += attentions * rows
            self.mlp_passes += mlps
            self.mlp_tokens += mlps * rows
            self.tally.attentions[rows] += attentions
            self.tally.mlps[rows] += mlps

    def ran_path(self, parts: Sequence[int], spans: Iterable[Stretch]) -> None:
        """Count one pass of these rows through each part of a path."""
        if max(parts, default=0) < ATTENTION:  # as nearly always
            return self.ran(len(parts), spans)
        whole, attending = sum(map(is_whole, parts)), sum(map(attends, parts))
        return self.ran(whole, spans, attentions=attending - whole, mlps=len(parts) - attending)

    def filled(self, layers: int, rows: int) -> None:
        """Count one pass of ``rows`` rows into the keys and values of ``layers`` layers."""
        self.fill_passes += layers
        self.fill_rows += layers * rows
        self.tally.fills[rows] += layers

    def read(self, rows: int) -> None:
        """Count one readout of ``rows`` rows."""
        self.head_passes += 1
        self.head_rows += rows
        self.tally.heads[rows] += 1

    def checked(self, rows: int) -> None:
        """Count one readout of ``rows`` rows by a cheap check's head."""
        self.check_passes += 1
        self.check_rows += rows
        self.tally.checks[rows] += 1

    def mapped(self, rows: int) -> None:
        """Count one pass of ``rows`` rows through an exit's affine map."""
        self.map_passes += 1
        self.map_rows += rows
        self.tally.maps[rows] += 1

    def copy(self) -> Meter:
        """Return the counts as they stand now."""
        return self - Meter()

    def __sub__(self, earlier: Meter) -> Meter:
        return Meter(
            *(getattr(self, item.name) - getattr(earlier, item.name) for item in fields(self))
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, ready for JSON."""
        names = [item.name for item in fields(self) if item.name != "tally"]
        return {name: getattr(self, name) for name in names}
