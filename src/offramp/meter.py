"""Counts the rows that really went through each kind of matrix product. Knows no prices."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Meter:
    """Work done by a backbone, in rows (arithmetic) and passes (weight reads).

    A *pass* is one call of a module, whatever its rows: on a memory-bound machine it is what costs.
    A *row* is one token going through it: on a compute-bound machine it is what costs.
    """

    layer_passes: int = 0
    """Calls of a whole decoder layer."""
    layer_tokens: int = 0
    """Rows through a whole decoder layer."""
    head_passes: int = 0
    """Calls of the readout (norm and vocabulary head)."""
    head_rows: int = 0
    """Rows through the readout, full exit checks and chosen tokens alike."""
    check_passes: int = 0
    """Calls of a cheap check's head."""
    check_rows: int = 0
    """Rows through a cheap check's head."""
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

    def copy(self) -> Meter:
        """Return the counts as they stand now."""
        return Meter(*(getattr(self, field.name) for field in fields(self)))

    def __sub__(self, earlier: Meter) -> Meter:
        return Meter(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
