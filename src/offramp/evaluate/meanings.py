"""Meanings of E2E: read from the data's own form, and shown as prompts."""

from __future__ import annotations

import re

Meaning = tuple[tuple[str, str], ...]
"""Attributes and their values, in the data's order."""

TEXT = "\nText:"
SHORT = {
    "eatType": "type",
    "priceRange": "price",
    "customer rating": "rating",
    "familyFriendly": "family friendly",
}
"""Attributes that are called something shorter in prompts."""


def parse_meaning(text: str) -> Meaning:
    """Return the attributes of ``name[The Eagle], food[English]``, by their names in prompts.

    Raises:
        ValueError: it is written otherwise, or a prompt could not show it.
    """
    found = [(key.strip(), value) for key, value in re.findall(r"([^,\[]+)\[([^\]|\n]*)\]", text)]
    if ", ".join(f"{key}[{value}]" for key, value in found) != text:
        raise ValueError(f"no meaning: {text!r}")
    return tuple((SHORT.get(key, key), value) for key, value in found)


def as_prompt(meaning: Meaning) -> str:
    """Return the prompt that asks for a text with this meaning."""
    return " | ".join(f"{key}: {value}" for key, value in meaning) + TEXT


def parse_prompt(prompt: str) -> Meaning:
    """Return the meaning that a prompt asks for."""
    pairs = [part.split(": ", 1) for part in prompt.removesuffix(TEXT).split(" | ")]
    return tuple((key, value) for key, value in pairs)
