"""The command that wrote a record, without the folders of the machine that it ran on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command() -> str:
    """Return how this program was called; of a path only the last name: the rest is nobody's."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return f"python experiments/{Path(sys.argv[0]).name} {shlex.join(words)}"
