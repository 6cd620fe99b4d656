"""Other engines as contestants: each a process that lives for the whole run and obeys orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from offramp.bench.race import Case, Contestant, Sample, absent
from offramp.errors import OfframpError, UsageError
from offramp.hf.load import locate
from offramp.hf.tuned import at_full_depth

OURS = ("hf", "hf-early-exit")
"""Engines that run in this environment."""
THEIRS = ("llama.cpp", "economize", "ctranslate2")
"""Engines of the peers' environment."""
WORKER = Path(__file__).with_name("worker.py")


class MissingError(OfframpError):
    """The engine is not installed."""


class Worker:
    """One engine in a process of its own, in a folder of its own that goes with it."""

    def __init__(self, python: Path, order: dict[str, Any], stack: ExitStack) -> None:
        """Start the process and open the engine; ``stack`` ends it.

        Raises:
            MissingError: the engine is not installed there.
            OfframpError: it cannot be opened.
        """
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offramp-bench-")))
        log = stack.enter_context((folder / "log").open("w+", errors="replace"))
        self._log = log
        # Another environment is not to see this one's paths; nor is a folder of modules a path.
        alone = "-P" if python == Path(sys.executable) else "-I"
        try:
            self._process = subprocess.Popen(
                [python, alone, WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": str(order["threads"])},
                text=True,
                start_new_session=True,  # Ctrl-C is for us; we end it
            )
        except OSError as error:
            raise OfframpError(f"{python} cannot be run: {error.strerror}") from error
        stack.callback(self._end)
        self.facts = self.ask(order)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order and return the answer.

        Raises:
            MissingError: the engine is not installed.
            OfframpError: the engine failed, or its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise OfframpError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise MissingError(_line(answer["missing"]))
        if "error" in answer:
            raise OfframpError(_line(answer["error"]))
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return f"its process ended ({how}){': ' + said[-1][:200] if said else ''}"

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def able(names: Sequence[str] | None, model: str | None) -> tuple[Sequence[str] | None, str | None]:
    """Return the engines to try, None for all, and what they open: the model at full depth.

    Raises:
        UsageError: engines are named, and none but ours opens the model's adapter.
    """
    try:
        return names, at_full_depth(model)
    except UsageError:
        if names:
            raise
        return [], None


def opening_order(
    model: str | None, length: int, draft: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Return what an engine needs to open the model.

    Args:
        model: hub id, folder or GGUF file; None for the default.
        length: most tokens of a text.
        draft: the depth that self-speculation drafts at; two thirds of the layers by default.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    source, gguf = locate(model)
    return {
        "model": str(Path(source).absolute()) if Path(source).exists() else source,
        "gguf": None if gguf is None else str(gguf.absolute()),
        "threads": torch.get_num_threads(),
        "context": length,
        "exit": draft,
        "trust_remote_code": trust_remote_code,
    }


def peer_contestants(
    names: Sequence[str] | None, python: Path | None, order: dict[str, Any], stack: ExitStack
) -> tuple[list[Contestant], dict[str, str]]:
    """Start other engines and return them as contestants, with their versions.

    Args:
        names: the engines wanted; those that are not there give the reason. None for all that are.
        python: the interpreter of the peers' environment, if there is one.
        order: what :func:`opening_order` returns.
        stack: ends their processes.
    """
    found, versions = [], {}
    for name in (*OURS, *THEIRS) if names is None else names:
        where = Path(sys.executable) if name in OURS else python
        try:
            if where is None:
                raise MissingError("no environment for it: run make peers, or name --peers PYTHON")
            worker = Worker(where, {"engine": name, **order}, stack)
        except OfframpError as error:
            if names is not None or not isinstance(error, MissingError):
                found.append(absent(name, str(error)))
            continue
        versions[name] = worker.facts["version"]
        found.append(_contestant(name, worker))
    return found, versions


def _contestant(name: str, worker: Worker) -> Contestant:
    size: int | None = worker.facts["bytes"]

    def take_turn(case: Case) -> Sample:
        answer = worker.ask({"prompts": case.prompts, "tokens": case.tokens})
        # Plain engines read all weights once per step; what they read of keys is not known.
        answer["decode_bytes"] = size and size * (case.tokens - 1)
        return Sample(**answer)

    weights: str | None = worker.facts["weights"]
    shown = f"{name} {weights}" if weights else name
    return Contestant(shown, take_turn, name, weights, note=worker.facts["note"])


def _line(text: str) -> str:
    return (text.strip().splitlines() or ["it failed"])[0][:200]
