"""Self-distillation's text: a model's own greedy answers to prompts, kept as token ids.

What a model says itself is what its exits will be asked about, so that is the text to teach them.
Answers are written as they come: killed at any moment, the same call goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.decode import decode
from offramp.errors import OfframpError
from offramp.journal import append, open_journal
from offramp.model import Model
from offramp.request import Request
from offramp.sketch import keys
from offramp.text import Prompt, encode
from offramp.tune.data import TOO_LONG, Data, Example

ANSWERS = "answers.jsonl"
_FORMAT = 1


def answer(
    model: Model,
    prompts: Sequence[Prompt],
    folder: Path,
    files: dict[str, str],
    *,
    raw: bool,
    length: int,
    max_new_tokens: int,
    batch_size: int = 16,
    show: bool = True,
) -> Data:
    """Return prompts with the model's own answers as examples.

    Args:
        model: who answers.
        prompts: what is asked.
        folder: where the answers are kept.
        files: where the prompts are from, for the card.
        raw: do not use the chat template.
        length: most tokens of a prompt and its answer; longer answers are cut.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts at once.
        show: a progress bar.

    Raises:
        OfframpError: the folder holds answers of another model or to other prompts, they cannot be
            read or written, or no prompt leaves room for an answer.
    """
    from tqdm import tqdm

    if not prompts:
        raise OfframpError("the data asks nothing: --answers needs rows with prompts")
    path = folder / ANSWERS
    ids = [encode(model.tokenizer, prompt, raw=raw) for prompt in prompts]
    facts = {
        "format": _FORMAT,
        "model": model.id.fingerprint,
        "weights": model.backbone.weights,
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "length": length,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error
    found = _known(path, open_journal(path, facts, "answers"))
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) < length]
    missing = [i for i in fitting if i not in found]
    requests = (
        Request(ids[i], min(max_new_tokens, length - len(ids[i])), eos=model.eos) for i in missing
    )
    said: dict[int, list[int]] = {}
    with tqdm(
        total=len(fitting), initial=len(found), desc="answer", unit="prompt", disable=not show
    ) as bar:
        for token in decode(model.backbone, requests, batch_size=batch_size):
            said.setdefault(token.index, []).append(token.id)
            if token.finish is not None:
                index, answered = missing[token.index], said.pop(token.index)
                found[index] = answered
                append(path, {"prompt": index, "ids": answered})
                bar.update()
    if not found:
        raise OfframpError(f"no prompt leaves room for an answer in {length} tokens")
    examples = [Example(ids[i] + found[i], len(ids[i])) for i in sorted(found)]
    digest = hashlib.sha256(json.dumps([found[i] for i in sorted(found)]).encode()).hexdigest()
    skipped = {TOO_LONG: len(ids) - len(fitting)} if len(fitting) < len(ids) else {}
    return Data(examples, {**files, ANSWERS: digest}, skipped, prompts=keys(prompts))


def _known(path: Path, rows: list[Any]) -> dict[int, list[int]]:
    """Return the answers that are there already, by prompt."""
    try:
        return {int(row["prompt"]): [int(token) for token in row["ids"]] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise OfframpError(f"{path} holds no answers: {error}") from error
