"""Compiles the kernels once per machine and loads them. Knows no models."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from offramp.errors import OfframpError
from offramp.fast.layout import (
    CHUNK,
    ExactStruct,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    RowsStruct,
    TextStruct,
    WatchStruct,
)
from offramp.files import cache_dir

SOURCE = Path(__file__).with_name("kernels.cpp")
_PARTS = (SOURCE, SOURCE.with_name("vectors.h"))
_PACKING = tuple(SOURCE.with_name(name) for name in ("pack.py", "weights.py"))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")


class UnavailableError(OfframpError):
    """The kernels cannot be built or loaded here; the message says why."""


@cache
def kernels() -> ctypes.CDLL:
    """Return the kernels' library, compiling it if this machine has not done so yet.

    Raises:
        UnavailableError: there is no compiler, no room for the result, or it does not work.
    """
    compiler = _compiler()
    file = cache_dir() / f"kernels-{version()}.so"
    if not file.is_file():
        _compile(compiler, file)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise UnavailableError(f"the fast kernels cannot be loaded: {error}") from error
    return _declared(library)


def version() -> str:
    """Return what tells these kernels from others: source, flags, compiler, processor, hashed.

    How weights are rounded for them is part of it: results are kept and compared by this.
    """
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in (*_PARTS, *_PACKING)))
    digest.update(repr((_FLAGS, _compiler(), platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _compile(compiler: str | None, file: Path) -> None:
    if compiler is None:
        raise UnavailableError("the fast backbone needs a C++ compiler (g++), and there is none")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=file.parent)
    except OSError as error:
        raise UnavailableError(
            f"no room for the compiled kernels at {file.parent}: {error.strerror}; set "
            "OFFRAMP_CACHE to another folder"
        ) from error
    try:
        beside = Path(folder) / file.name
        done = subprocess.run(
            [compiler, *_FLAGS, str(SOURCE), "-o", str(beside)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0][:200]
            raise UnavailableError(f"{compiler} cannot compile the fast kernels: {reason}")
        beside.replace(file)
    except OSError as error:
        raise UnavailableError(f"{compiler} cannot be run: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _processor() -> str:
    """Return what the processor can do; the same home folder may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions their types, and check that both sides agree on the structures."""
    kinds = (MatrixStruct, LayerStruct, ModelStruct, TextStruct, WatchStruct, ExactStruct)
    expected = [*map(ctypes.sizeof, kinds), CHUNK]
    sizes = (ctypes.c_int32 * len(expected))()
    library.offramp_sizes(sizes)
    if list(sizes) != expected:
        raise UnavailableError("the fast kernels were compiled with another structure layout")
    model, rows = ctypes.POINTER(ModelStruct), ctypes.POINTER(RowsStruct)
    numbers, count = ctypes.c_void_p, ctypes.c_int32
    watch = ctypes.POINTER(WatchStruct)
    run = (model, numbers, numbers, count, numbers, rows, watch, count)
    library.offramp_run.argtypes = run
    library.offramp_fill.argtypes = [model, numbers, count, numbers, rows, count]
    matrix = ctypes.POINTER(MatrixStruct)
    exact = ctypes.POINTER(ExactStruct)
    read = (model, matrix, matrix, exact, numbers, count, numbers, count)
    library.offramp_readout.argtypes = read
    return library
