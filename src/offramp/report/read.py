"""Reads the JSON of a run from a file, and refuses what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from offramp.errors import OfframpError
from offramp.report import FORMAT
from offramp.report.runs import (
    BenchRun,
    CurveRun,
    EvaluateRun,
    Generated,
    Run,
    TraceRun,
    TuneRun,
)

_MOST_BYTES = 2**26
_KINDS: dict[str, type[Run]] = {
    "generate": Generated,
    "trace": TraceRun,
    "bench": BenchRun,
    "tune": TuneRun,
    "evaluate": EvaluateRun,
}


def read_run(path: Path) -> Run:
    """Return the run in a JSON file.

    Raises:
        OfframpError: it cannot be read, is no run, is of another version, or holds nothing to show.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OfframpError(f"{path} is too large for a run: over {_MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
        found = json.loads(content)
    except OSError as error:
        raise OfframpError(f"cannot read the run {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OfframpError(
            f"{path} is no run: it is not JSON; offramp VERB --json prints it"
        ) from error
    if not isinstance(found, dict):
        raise OfframpError(f"{path} is no run: it holds no JSON object")
    version = found.get("format", FORMAT)
    if version != FORMAT:
        raise OfframpError(
            f"{path} is a result of format {str(version)[:20]}, and this offramp reads {FORMAT}: "
            "make it again, or use the version that made it"
        )
    return _checked(path, _kind(path, found), content)


def _kind(path: Path, found: dict[str, Any]) -> type[Run]:
    verb = found.get("verb")
    if isinstance(verb, str) and verb in _KINDS:
        return _KINDS[verb]
    if isinstance(found.get("curve"), dict):  # experiments have lists of that name
        return CurveRun
    if "outputs" in found:
        raise OfframpError(f"{path} was made before reports were: generate it again")
    raise OfframpError(
        f"{path} is no run that a report can show: give the JSON of generate, trace, bench, "
        "tune or evaluate, or one with a 'curve'"
    )


def _checked(path: Path, kind: type[Run], content: bytes) -> Run:
    try:
        run = kind.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise OfframpError(
            f"{path} is no run: {where + ': ' if where else ''}{wrong['msg']}"
        ) from error
    match run:
        case Generated(outputs=()) | TraceRun(texts=()) | BenchRun(rows=()) | EvaluateRun(tasks=()):
            raise OfframpError(f"{path} holds no examples: there is nothing to show")
    return run
