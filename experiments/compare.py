"""Say again how a record stands beside its paper, from its own figures; nothing is run.

    python experiments/compare.py results/lite.json results/oracle.json

For records of experiments whose *paper | here* table changed after they were made. What a record
says of its own deviations stays; one that says nothing gets what its program says today.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from offramp.cli.output import finish


def renewed(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the table that the program which wrote it makes of it today."""
    program = importlib.import_module(Path(shlex.split(record["command"])[1]).stem)
    return {"deviations": program.DEVIATIONS, **record, "comparison": program.comparison(record)}


def main() -> None:
    """Renew the records of these files."""
    for path in map(Path, sys.argv[1:]):
        record = json.loads(path.read_text(encoding="utf-8"))
        finish(renewed(record), as_json=False, out=path)


if __name__ == "__main__":
    main()
