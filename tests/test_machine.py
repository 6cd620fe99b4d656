"""What is known and asked of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FREED = """
import sys
import torch
from offramp.machine import keep_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1])
if sys.argv[1] == "keep":
    assert keep_memory()
before = resident()
large = torch.ones(25_000_000)
there = resident() - before
del large
print((resident() - before) / there)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's memory")
def test_memory_that_was_freed_is_kept_where_that_was_asked() -> None:
    """Of a large array nothing remains when it is freed; after `keep_memory` all of it does."""
    left = {
        way: float(
            subprocess.run(
                [sys.executable, "-c", _FREED, way], check=True, capture_output=True, text=True
            ).stdout
        )
        for way in ("keep", "not")
    }
    assert left["keep"] > 0.9
    assert left["not"] < 0.1
