"""What this machine is. Times hold on the machine they were measured on."""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import version
from pathlib import Path


def processor() -> str:
    """Return the processor's name, "unknown" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def multiplies_bf16() -> bool:
    """Return whether the processor says it has instructions for products of bf16.

    Without them they are emulated, many times slower than fp32; a system that does not tell is
    taken to have none.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


def keep_memory() -> bool:
    """Let this process keep memory it has freed, for what it asks for next; True if that was done.

    The C library of Linux maps every large array anew and unmaps it when it is freed, so each is
    cleared, page by page, before it is written. A step of training makes hundreds: a sixth of its
    time. It holds for as long as the process lives, so it is for a program to decide, not for a
    library. Elsewhere nothing is done.
    """
    most_mapped, trim_above = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(tell(most_mapped, 0)) and bool(tell(trim_above, 2**31 - 1))


def versions() -> dict[str, str]:
    """Return the versions that every result carries, by name."""
    names = ("offramp", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
