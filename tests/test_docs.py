"""The docs run: the README's example, the eight-line signal, the commands, the generated tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.cli import app
from offramp.errors import OfframpError
from offramp.hf.load import default_gguf
from offramp.probe import Probe
from offramp.signals import Signal
from tests.tools import opened

ROOT = Path(__file__).parent.parent


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, on the default model; its own assertion is the lossless law."""
    try:
        default_gguf()
    except OfframpError as error:
        pytest.skip(str(error))
    code = _blocks("README.md", "python")[0]
    assert len(code.splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 50


def test_the_signal_of_the_tutorial_is_a_signal() -> None:
    """Copied out of the page into a file, it scores rows in its range."""
    import torch

    names: dict[str, object] = {}
    exec(compile(_blocks("docs/extending.md", "python")[0], "extending.md", "exec"), names)
    signal = names["top_two"]
    assert isinstance(signal, Signal)
    backbone = opened("llama")
    values = signal(Probe(2, 6, torch.randn(5, backbone.shape.hidden_size), backbone.readout))
    assert values.shape == (5,)
    assert ((values >= signal.low) & (values <= signal.high)).all()


def test_the_readmes_commands_parse() -> None:
    """Every option it shows exists."""
    from typer.main import get_command

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    shown = [
        line.removeprefix("$ offramp ").split("#")[0].split()
        for block in _blocks("README.md", "console")
        for line in block.splitlines()
        if line.startswith("$ offramp ")
    ]
    assert shown
    for verb, *arguments in shown:
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known


def test_the_tables_are_what_the_results_say() -> None:
    """Nobody edits a figure by hand."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "tables.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
