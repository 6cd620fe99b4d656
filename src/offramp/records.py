"""What is stored as JSON: frozen records, strictly typed; and how one is read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from offramp.errors import OfframpError

_MOST_BYTES = 2**24


class Record(BaseModel):
    """Base of what is stored as JSON: frozen, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], what: str) -> R:
    """Return the record in a JSON file; ``what`` names its kind in messages.

    Raises:
        OfframpError: it cannot be read or is none; the first thing wrong is named.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OfframpError(f"{path} is too large for a {what}")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OfframpError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise OfframpError(
            f"{path} is no {what}: {where + ': ' if where else ''}{wrong['msg']}"
        ) from error
