"""Examples to train on: rows as token ids, with the prompt told from the answer.

A prompt's tokens are the very ones that ``text.encode`` makes of it, so what is trained is what is
generated from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from offramp.errors import OfframpError, UsageError
from offramp.sketch import keys
from offramp.tune.rows import Faults, Row, Rows, read_rows

TOO_LONG = "prompt without room for an answer"
"""Why a row was skipped that no flag lets in."""
NO_TOKENS = "answer without tokens"
"""Likewise."""

_CHUNK = 1000
_SHOW_BAR_FROM = 5000
_STAND_IN = "STANDSFORTHEANSWER"  # to see what a template puts behind one


@dataclass(frozen=True)
class Example:
    """A prompt and its answer as token ids."""

    ids: list[int]
    """Both; the answer ends with the end of the turn (or of the text) unless it was cut."""
    first: int
    """Index of the first token to learn, at least 1: the loss is on ``ids[first:]``."""


@dataclass
class Data:
    """Everything to train on, where it is from, and what is not among it."""

    examples: list[Example]
    files: dict[str, str]
    """SHA-256 by file name, see ``Rows.files``; the data's part of a card."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason: bad ones, and prompts that are too long."""
    truncated: int = 0
    """Answers cut at ``max_length``."""
    prompts: Sequence[int] = ()
    """What all prompts are known by, of documents the whole text (:func:`offramp.sketch.keys`)."""

    @property
    def tokens(self) -> int:
        """Tokens in all examples, prompts included."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        """Tokens that the loss is on."""
        return sum(len(example.ids) - example.first for example in self.examples)


def read_examples(
    data: Sequence[str],
    tokenizer: Any,
    *,
    raw: bool = False,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Data:
    """Read files and hub ids (see ``read_rows``) and tokenise them (see ``tokenise``)."""
    rows = read_rows(data, limit=limit, skip_bad=skip_bad)
    return tokenise(rows, tokenizer, raw=raw, max_length=max_length)


def tokenise(rows: Rows, tokenizer: Any, *, raw: bool = False, max_length: int = 1024) -> Data:
    """Return rows as token ids.

    Prompt and answer go through the model's chat template, where it has one; otherwise, or when
    ``raw``, the answer follows its prompt as it is. Of a chat only the last turn is learnt, like a
    completion in TRL. A document is never templated, and cut into pieces of ``max_length`` tokens,
    each beginning with the last token of the one before: every token but the first is learnt once.

    Args:
        rows: with answers; counts of bad ones are added to.
        raw: ignore the chat template.
        max_length: longer answers are cut; prompts that leave no room for any are skipped.

    Raises:
        OfframpError: the template refuses a row, and bad ones are not to be skipped; or nothing is
            left to train on.
        UsageError: ``max_length`` is below 2, or there are chat messages, but no chat template.
    """
    from tqdm import tqdm

    if max_length < 2:
        raise UsageError("--max-length must be at least 2 tokens")
    read = _templated if tokenizer.chat_template and not raw else _joined
    ending = _Ending(tokenizer)
    known_by = keys(row.prompt or row.answer or "" for row in rows.rows)
    made = Data([], rows.files, prompts=known_by)
    size = len(rows.rows)
    hidden = size < _SHOW_BAR_FROM
    with tqdm(total=size, desc="tokenise", unit="row", leave=False, disable=hidden) as bar:
        for start in range(0, size, _CHUNK):
            chunk = rows.rows[start : start + _CHUNK]
            asked = [row for row in chunk if row.prompt]
            plain = [row for row in chunk if not row.prompt]
            examples = iter(read(asked, tokenizer, ending, rows.faults))
            documents = iter(_documents(plain, tokenizer, ending))
            for row in chunk:
                _add(made, next(examples if row.prompt else documents), row, max_length)
            bar.update(len(chunk))
    made.skipped |= rows.faults.counts
    if not made.examples:
        raise OfframpError(f"nothing is left to train on: {made.skipped}")
    return made


def _add(made: Data, example: Example | None, row: Row, max_length: int) -> None:
    if example is None:
        return  # noted as a fault
    ids, first = example.ids, example.first
    if not row.prompt:
        starts = range(0, len(ids) - 1, max_length - 1)
        made.examples += [Example(ids[start : start + max_length], 1) for start in starts]
    elif first >= len(ids):  # a tokenizer without an end, and an answer of no tokens
        made.skipped[NO_TOKENS] = made.skipped.get(NO_TOKENS, 0) + 1
    elif first >= max_length:
        made.skipped[TOO_LONG] = made.skipped.get(TOO_LONG, 0) + 1
    else:
        made.truncated += len(ids) > max_length
        made.examples.append(Example(ids[:max_length], first))


class _Ending:
    """What ends an answer: the special token it ends with already, else the end of the text."""

    def __init__(self, tokenizer: Any) -> None:
        self.eos: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)

    def close(self, ids: list[int]) -> list[int]:
        """Return ``ids`` with an end."""
        if self.eos is None or (ids and ids[-1] in self.special):
            return ids
        return [*ids, self.eos]


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose: tokenizers warn of texts longer than the model; those are cut here.
    made = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return [list(ids) for ids in made]


def _documents(rows: list[Row], tokenizer: Any, ending: _Ending) -> Iterator[Example]:
    for ids in _ids(tokenizer, [row.answer or "" for row in rows], special=True):
        yield Example(ending.close(ids), 1)


def _joined(
    rows: list[Row], tokenizer: Any, ending: _Ending, faults: Faults
) -> Iterator[Example | None]:
    for row in rows:
        if not isinstance(row.prompt, str):
            raise UsageError(
                f"{row.where}: these are chat messages, but the model has no chat template (or "
                "--raw is set)"
            )
    prompts = _ids(tokenizer, [str(row.prompt) for row in rows], special=True)
    answers = _ids(tokenizer, [row.answer or "" for row in rows], special=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        yield Example(prompt + ending.close(answer), len(prompt))


def _templated(
    rows: list[Row], tokenizer: Any, ending: _Ending, faults: Faults
) -> Iterator[Example | None]:
    """Yield the examples of rows with prompts; None where the template refused one."""
    rendered = [_render(row, tokenizer, faults) for row in rows]
    kept = [texts for texts in rendered if texts]
    prompts = iter(_ids(tokenizer, [prompt for prompt, _ in kept], special=False))
    wholes = iter(_ids(tokenizer, [prompt + answer for prompt, answer in kept], special=False))
    for texts in rendered:
        if texts is None:
            yield None
            continue
        prompt, whole = next(prompts), next(wholes)
        if whole[: len(prompt)] != prompt:
            # A token spans the border. Generation begins behind the prompt's own tokens.
            whole = prompt + _ids(tokenizer, [texts[1]], special=False)[0]
        yield Example(ending.close(whole), len(prompt))


def _render(row: Row, tokenizer: Any, faults: Faults) -> tuple[str, str] | None:
    """Return the texts of the prompt and of the answer, up to what ends the turn.

    Templates often put a line break behind that; nobody generates so far.
    """
    asked, answer = row.prompt, row.answer or ""
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    try:
        prompt: str = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=False
        )
        whole = _said(asked, answer, tokenizer)
        rest = whole.removeprefix(prompt)
        if whole.startswith(prompt) and answer.strip() in rest:
            return prompt, rest
        # Some templates open a thought for the model, which they drop from what was said.
        _, found, end = _said(asked, _STAND_IN, tokenizer).rpartition(_STAND_IN)
    except TemplateError as error:
        faults(row.where, "the model's chat template refuses it", f" ({error})")
        return None
    if not found:
        faults(row.where, "the model's chat template drops its answer")
        return None
    return prompt, answer + end


def _said(asked: list[dict[str, str]], answer: str, tokenizer: Any) -> str:
    messages = [*asked, {"role": "assistant", "content": answer}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.rstrip()
