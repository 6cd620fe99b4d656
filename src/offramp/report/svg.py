"""The little SVG that the charts need: escaped tags, scales and their ticks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import floor, log10

from markupsafe import Markup, escape

from offramp.shown import SCALE

Scale = Callable[[float], float]

INK, SOFT, LINE, ALERT, PAPER = "#1c1f23", "#5b6470", "#c9ced6", "#a33a00", "#ffffff"
"""What a picture alone is drawn in; on the page, classes of the same names follow its theme."""
STEPS = tuple(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in SCALE)
"""Colours of depth, shallow to deep."""


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """Return an element; ``class_`` is class, ``font_size`` is font-size, None is left out."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(escape(part) for part in inside)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, body)


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def document(width: float, height: float, parts: Iterable[object], label: str) -> Markup:
    """Return a whole picture, readable by itself."""
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        aria_label=label,
        font_family="system-ui, 'DejaVu Sans', sans-serif",
        font_size=12,
    )


def words(x: float, y: float, said: object, *, kind: str = "ink", **more: object) -> Markup:
    """Return a text; ``kind`` is its colour's class."""
    fill = {"ink": INK, "soft": SOFT, "alert": ALERT}[kind]
    return tag("text", escape(said), x=x, y=y, class_=kind, fill=fill, **more)


def rule(
    x1: float, y1: float, x2: float, y2: float, *, kind: str = "line", **more: object
) -> Markup:
    """Return a straight line."""
    stroke = {"ink": INK, "soft": SOFT, "line": LINE}[kind]
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=f"s-{kind}", stroke=stroke, **more)


def scale(low: float, high: float, start: float, stop: float) -> Scale:
    """Return the straight map of ``low..high`` onto ``start..stop``."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from ``low`` to ``high``, at most about ``most``."""
    rough = max(high - low, 1e-9) / most
    size = 10.0 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = -floor(-low / step + 1e-9)
    return [round(k * step, 10) for k in range(first, floor(high / step + 1e-9) + 1)]


def step_of(depth: int, num_layers: int) -> int | None:
    """Return the colour of a depth, 0 for the shallowest; None for all layers."""
    return None if depth >= num_layers else depth * len(STEPS) // num_layers
