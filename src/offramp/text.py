"""Text in, text out: prompts from files, chat templates, streaming detokenisation, stop strings.

The only place that knows tokenizers; everything below works on ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from offramp.errors import OfframpError, UsageError

Prompt = str | list[dict[str, str]]
"""A text, or chat messages with ``role`` and ``content``."""

MAX_STOPS, MAX_STOP_LENGTH = 16, 256

# What the models that wrote the Alpaca sets put where there was nothing to put.
_NO_INPUT = re.compile(r"\s*(<no ?input>\.?)?\s*", re.IGNORECASE)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a .txt file (one per line) or a .jsonl file.

    A JSON line is an object with ``prompt``, or ``instruction`` and perhaps ``input``, or
    ``messages``. Empty lines are skipped.

    Raises:
        OfframpError: the file cannot be read, or one of its lines is wrong; the line is named.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise OfframpError(f"cannot read {path}: {error.strerror}") from error
    prompts: list[Prompt] = []
    for number, raw in enumerate(lines, 1):
        if limit is not None and len(prompts) == limit:
            break
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise OfframpError(f"{path}, line {number}: not valid UTF-8") from error
        if line:
            where = f"{path}, line {number}"
            prompts.append(_from_json(line, where) if path.suffix.lower() == ".jsonl" else line)
    if not prompts:
        raise OfframpError(f"{path} holds no prompts")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise OfframpError(f"{where}: not valid JSON") from error
    match row:
        case {"messages": [*messages]} if messages and all(map(_is_message, messages)):
            return messages
        case {"prompt": str(prompt)} if prompt.strip():
            return prompt
        case {"instruction": str(instruction), "input": str(given)} if instruction.strip():
            return with_input(instruction, given)
        case {"instruction": str(instruction)} if instruction.strip() and "input" not in row:
            return instruction
    raise OfframpError(
        f'{where}: needs a non-empty "prompt", "instruction" (with or without "input"), or '
        '"messages" with "role" and "content"'
    )


def with_input(instruction: str, given: str) -> str:
    """Return the prompt of an instruction and its input, which may be empty or ``<noinput>``."""
    return instruction if _NO_INPUT.fullmatch(given) else f"{instruction}\n\n{given}"


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def encode(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Return the token ids of a prompt, through the model's chat template where it has one.

    Raises:
        UsageError: an empty prompt, or messages for a model without a chat template.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UsageError("the prompt is empty")
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses this prompt: {error}") from error
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise UsageError(
            "these are chat messages, but the model has no chat template, or was tuned on raw "
            "prompts, or --raw is set"
        )
    return list(ids)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token added to the text; together they are the text.

    A token that ends inside a character adds nothing, the one that ends it adds all of it.
    """
    watcher = Detokenizer(tokenizer)
    found = []
    for count in range(1, len(ids) + 1):
        watcher(list(ids[:count]))
        found.append(watcher.release(final=count == len(ids)))
    return found


def check_stops(stops: Sequence[str]) -> None:
    """Refuse stop strings that cannot be watched for.

    Raises:
        UsageError: empty, too many or too long.
    """
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise UsageError(
            f"at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_LENGTH} characters are watched for"
        )


class Detokenizer:
    """Turns one text's new tokens into text as they come, and watches for stop strings.

    A piece is released once no later token can change it: not in the middle of a character, and not
    while it may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self.tokenizer = tokenizer
        self.stops = stops
        self.text = ""
        """Everything decoded so far; ends before the stop string, if one came."""
        self.stopped = False
        self._ids: list[int] = []
        self._stable = 0  # tokens whose text is settled; decoding goes on from a little before
        self._context = 0
        self._released = 0

    def __call__(self, new: list[int]) -> bool:
        """Take the tokens added since the last call; return whether a stop string is complete."""
        for token in new[len(self._ids) :]:
            self._ids.append(token)
            self._grow(final=False)
        return self.stopped

    def release(self, *, final: bool = False) -> str:
        """Return the text that can be shown now and was not before; all of it when ``final``."""
        if final and not self.stopped:
            self._grow(final=True)
        held = 0 if final or self.stopped else self._held()
        piece = self.text[self._released : len(self.text) - held]
        self._released += len(piece)
        return piece

    def _grow(self, *, final: bool) -> None:
        # Tokenizers join pieces by their neighbours, so a token is decoded behind settled ones.
        before = self._decode(self._ids[self._context : self._stable])
        after = self._decode(self._ids[self._context :])
        if self.stopped or after == before or (after.endswith("\ufffd") and not final):
            return  # nothing new to see, or not yet
        start = max(len(self.text) - max(map(len, self.stops), default=0), 0)
        self.text += after[len(before) :]
        self._context, self._stable = self._stable, len(self._ids)
        found = [at for at in (self.text.find(stop, start) for stop in self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _held(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stops):
                return size
        return 0
