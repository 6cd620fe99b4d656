"""A user's own rows: prompts with their references, or prompts only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.errors import OfframpError
from offramp.evaluate.items import Item
from offramp.tune.rows import rows_of
from offramp.tune.sources import RecordError, records


def own_items(path: Path) -> list[Item]:
    """Return the items of a file of JSON lines, in its order.

    A row is what ``offramp tune`` reads, whose answer is the reference, or has beside its prompt a
    ``reference`` (a text) or ``references`` (texts).

    Raises:
        OfframpError: it cannot be read, a row is bad (file and line are named), or there is none.
    """
    items: list[Item] = []
    for where, record in records(str(path), {}):
        try:
            items += _items(record, where)
        except RecordError as bad:
            raise OfframpError(f"{where}: {bad}") from bad
    if not items:
        raise OfframpError(f"{path} holds no rows")
    return items


def _items(record: Any, where: str) -> Iterator[Item]:
    rights: tuple[str, ...] = ()
    if isinstance(record, dict):
        rights = _references(record)
    for row in rows_of(record, where, answers=False):
        if not row.prompt:
            raise RecordError("it asks nothing")
        answers = () if row.answer is None or not row.answer.strip() else (row.answer,)
        yield Item(row.prompt, rights or answers)


def _references(record: dict[str, Any]) -> tuple[str, ...]:
    found = record.get("references", record.get("reference"))
    if found is None:
        return ()
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(
        isinstance(one, str) and one.strip() for one in texts
    ):
        raise RecordError('"references" is no list of texts that are not empty')
    return tuple(texts)
