"""Rows of training data: prompts and answers out of records of many forms, or what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from offramp.errors import OfframpError, UsageError
from offramp.text import Prompt, with_input
from offramp.tune.sources import RecordError, records

# What asks, what may be given with it, what answers.
_FORMS = (
    ("instruction", ("input", "context"), ("output", "response")),  # Alpaca; Dolly
    ("prompt", (), ("completion", "response")),  # TRL
    ("question", (), ("answer",)),  # GSM8K
)
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One thing to learn: an answer to a prompt, or a document."""

    prompt: Prompt
    """Empty for a document, every token of which is learnt."""
    answer: str | None
    """None where the row is a prompt only."""
    where: str
    """File and line, for messages."""


class Faults:
    """Refuses what is wrong with a row, or counts it where such rows are to be skipped."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()

    def __call__(self, where: str, reason: str, detail: str = "") -> None:
        """Take note of a bad row.

        Raises:
            OfframpError: bad rows are not to be skipped.
        """
        if not self.skip:
            raise OfframpError(f"{where}: {reason}{detail}; --skip-bad leaves such rows out")
        self.counts[reason] += 1


@dataclass
class Rows:
    """All rows of some data, and where they are from."""

    faults: Faults
    rows: list[Row] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file's bytes by its name without folders; of a hub id's rows as JSON lines.

    Of two files with one name, the second is ``name (2)``.
    """


def read_rows(
    data: Sequence[str], *, answers: bool = True, limit: int | None = None, skip_bad: bool = False
) -> Rows:
    """Read files and hub ids, one after the other.

    Rows are ``instruction`` with ``output`` and perhaps ``input`` (Alpaca), ``instruction`` with
    ``response`` and perhaps ``context`` (Dolly), ``instruction`` with ``instances``
    (Self-Instruct), ``prompt`` with ``completion`` or ``response`` (texts, or lists of messages),
    ``question`` with ``answer``, ``messages``, ``conversations`` (ShareGPT), or ``text``. Of a
    chat, the last message is the answer, and the rest its prompt.

    Args:
        data: paths, or ids of data sets on the hub, of which the ``train`` split is read.
        answers: refuse rows without an answer; otherwise prompts alone are rows as well.
        limit: read no more rows than this.
        skip_bad: count bad rows instead of refusing them.

    Raises:
        OfframpError: something cannot be read, a row is bad (file and line are named), or there is
            no usable row.
        UsageError: no data is named.
    """
    if not data:
        raise UsageError("name at least one file, or a data set on the hub, with --data")
    found = Rows(Faults(skip=skip_bad))
    for source in data:
        for where, value in records(source, found.files):
            if limit is not None and len(found.rows) >= limit:
                break
            try:
                found.rows += rows_of(value, where, answers=answers)
            except RecordError as bad:
                found.faults(where, str(bad))
    if not found.rows:
        skipped = sum(found.faults.counts.values())
        raise OfframpError(f"{', '.join(data)}: no usable rows ({skipped} bad ones skipped)")
    found.rows = found.rows[:limit]  # a record may hold several
    return found


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return what the rows ask, for a model to answer itself; documents ask nothing."""
    return [row.prompt for row in rows if row.prompt]


def rows_of(record: Any, where: str, *, answers: bool) -> list[Row]:
    """Return the rows that one record of :func:`offramp.tune.sources.records` holds.

    Raises:
        RecordError: it is none; the message says what it lacks.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("not a JSON object")
    if isinstance(record.get("instances"), list) and "instruction" in record:
        pairs = [_pair(record | _object(instance)) for instance in record["instances"]]
    else:
        pairs = [_content(record)]
    if not pairs:
        raise RecordError('empty "instances"')
    for prompt, answer in pairs:
        _check(prompt, answer, needs_answer=answers)
    return [Row(prompt, answer, where) for prompt, answer in pairs]


def _content(record: dict[str, Any]) -> tuple[Prompt, str | None]:
    if "messages" in record:
        return _chat(_messages(record["messages"]))
    if "conversations" in record:
        return _chat(_messages(record["conversations"]))
    if isinstance(record.get("prompt"), list):
        return _chat(_messages(record["prompt"]) + _messages(record.get("completion", [])))
    if any(ask in record for ask, _, _ in _FORMS):
        return _pair(record)
    if "text" in record:
        return "", _string(record, "text")
    raise RecordError('has no "messages", "instruction", "prompt", "question" or "text"')


def _pair(record: dict[str, Any]) -> tuple[Prompt, str | None]:
    forms = [form for form in _FORMS if form[0] in record]
    whole = [form for form in forms if any(name in record for name in form[2])]
    ask, givens, names = (whole or forms)[0]
    given = [_string(record, name) for name in givens if record.get(name) is not None][:1]
    prompt = with_input(_string(record, ask), *given) if given else _string(record, ask)
    if not prompt.strip():
        raise RecordError(f'empty "{ask}"')
    answer = [_string(record, name) for name in names if record.get(name) is not None][:1]
    return prompt, answer[0] if answer else None


def _messages(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list):
        raise RecordError("messages are no list")
    return [_message(_object(message)) for message in given]


def _message(message: dict[str, Any]) -> dict[str, str]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES or not isinstance(content, str):
        raise RecordError(
            'a message without "role" (system, user, assistant) and "content" (a text)'
        )
    return {"role": role, "content": content}


def _chat(messages: list[dict[str, str]]) -> tuple[Prompt, str | None]:
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    if not any(message["content"].strip() for message in prompt):
        raise RecordError("no message before the answer")
    return prompt, messages[-1]["content"] if answered else None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError("a message or an instance is not a JSON object")
    return value


def _string(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise RecordError(f'"{name}" is not a text')
    return value


def _check(prompt: Prompt, answer: str | None, *, needs_answer: bool) -> None:
    if answer is None and needs_answer:
        raise RecordError("no answer")
    if answer is not None and not answer.strip() and (needs_answer or not prompt):
        raise RecordError("empty answer")
    contents = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    try:
        "".join([*contents, answer or ""]).encode()
    except UnicodeEncodeError as error:
        raise RecordError("half of a surrogate pair, which is no text") from error
