"""Boundaries that good intentions do not keep: who imports whom, what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "offramp"

# Lower knows nothing of higher. Modules in one entry may import each other.
ORDER = [
    (
        "collector",
        "errors",
        "files",
        "heads",
        "journal",
        "machine",
        "meter",
        "paths",
        "records",
        "shipped",
        "sketch",
    ),
    ("shown", "reliability"),
    ("batch", "probe", "readouts", "watch"),
    ("backbone",),
    ("checks",),
    ("signals",),
    ("policy", "features"),
    ("classifier",),
    ("exits",),
    ("step",),
    ("timing",),
    ("sample", "cost"),
    ("request",),
    ("decode",),
    ("speculate", "skipping"),
    ("control",),
    ("trace",),
    ("gate",),
    ("adainfer",),
    ("router", "route"),
    ("runs",),
    ("plan", "card", "certificate"),
    ("inspection", "text"),
    ("hf",),
    ("fast",),
    ("model",),
    ("bench", "search", "tune", "allocate", "calibrate", "evaluate", "report", "harness"),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
TRANSFORMERS = ("hf", "tune")
WORKER = SOURCE / "bench" / "worker.py"  # a program for other environments, not a module of ours


def _modules() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def _part(path: Path) -> str:
    """Return the first name below ``offramp``: a module or a package."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_lower_knows_nothing_of_higher(path: Path) -> None:
    """Every module has a place, and imports from its own level or below."""
    level = LEVEL[_part(path)]
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "offramp" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= level, f"{path} imports {name}"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_hf_knows_transformers(path: Path) -> None:
    """The rest would have to be touched with every new version of it."""
    if _part(path) not in TRANSFORMERS and path != WORKER:
        assert not [name for name in _imports(path) if name.split(".")[0] == "transformers"]


def test_the_worker_runs_where_offramp_is_not() -> None:
    """It imports nothing of it, and nobody imports the worker."""
    assert not [name for name in _imports(WORKER) if name.startswith("offramp")]
    for path in _modules():
        assert not [name for name in _imports(path) if "bench.worker" in name]


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_pickle_and_no_print_outside_the_command_line(path: Path) -> None:
    """Artefacts are safetensors and JSON; a library does not talk."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {"eval", "exec", "hasattr"} & names
    assert _part(path) == "cli" or "print" not in names
    assert not {"pickle", "joblib", "marshal"} & {name.split(".")[0] for name in _imports(path)}


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    """In its first line."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_command_line_starts_without_torch() -> None:
    """Importing it, and building every verb's help, loads neither torch nor transformers."""
    code = (
        "import sys; from offramp.cli import app; from typer.main import get_command; "
        "get_command(app); print([m for m in ('torch', 'transformers', 'pydantic') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    """``offramp.__all__`` and what it promises are the same."""
    import offramp

    assert offramp.__all__ == sorted(offramp.__all__)
    for name in offramp.__all__:
        assert getattr(offramp, name) is not None


def test_no_module_hides_a_public_name() -> None:
    """Importing ``offramp.x`` sets that name, and would hide a function called the same."""
    import offramp

    assert not {_part(path) for path in _modules()} & set(offramp.__all__)
