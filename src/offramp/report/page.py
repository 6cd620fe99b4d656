"""Fills the template: one file that asks the network for nothing and trusts no text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offramp import __version__
from offramp.files import write_text
from offramp.report.grid import CELL, LEFT, ROW, TOP
from offramp.report.parts import Section


def render(sections: Sequence[Section]) -> str:
    """Return the page.

    Style and script are allowed by their hashes, and nothing else is: text that got past the
    escaping would still not run.
    """
    style, script = _own("page.css"), _own("page.js")
    sources = {"style": _digest(style), "script": _digest(script)}
    shown = {
        "grid": {"cell": CELL, "row": ROW, "left": LEFT, "top": TOP},
        "sections": [section.data for section in sections],
    }
    environment = Environment(
        loader=PackageLoader("offramp.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        sources=sources,
        data=embedded(shown),
        version=__version__,
    )


def write_page(path: Path, sections: Sequence[Section]) -> None:
    """Write the page whole or not at all.

    Raises:
        OfframpError: it cannot be written.
    """
    write_text(path, render(sections))


def embedded(data: object) -> Markup:
    """Return data as JSON that no HTML parser can leave: ``<``, ``>`` and ``&`` are escaped."""
    line = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        line = line.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(line)


def _own(name: str) -> str:
    return files("offramp.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    made = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{made}"
