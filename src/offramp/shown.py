"""How text and depths are shown: control characters made visible, one colour scale for depth."""

from __future__ import annotations

import unicodedata

Colour = tuple[int, int, int]

# Cividis, dark to bright: readable with every kind of colour vision. Bright = deep.
SCALE: tuple[Colour, ...] = (
    (0, 82, 147),
    (87, 93, 109),
    (124, 123, 120),
    (165, 156, 116),
    (212, 193, 98),
    (254, 232, 56),
)


def shade(share: float) -> Colour:
    """Return the colour of a share of the depth, 0 to 1."""
    place = share * (len(SCALE) - 1)
    low, between = int(place), place - int(place)
    high = min(low + 1, len(SCALE) - 1)
    red, green, blue = (
        round(a + (b - a) * between) for a, b in zip(SCALE[low], SCALE[high], strict=True)
    )
    return red, green, blue


def visible(text: str) -> str:
    """Return text whose control characters are shown, not sent: a model may write anything."""
    return "".join(f"\\x{ord(c):02x}" if _controls(c) else c for c in text)


def _controls(c: str) -> bool:
    """Say whether a character commands the terminal, or turns the order of others around."""
    turns = "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"
    return turns or (unicodedata.category(c) == "Cc" and c not in "\n\t")
