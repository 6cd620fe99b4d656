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
from offramp.files import write_text
from offramp.model import Model
from offramp.request import Request
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
    found = _read(path, facts)
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) < length]
    missing = [i for i in fitting if i not in found]
    requests = (
        Request(ids[i], min(max_new_tokens, length - len(ids[i])), eos=model.eos) for i in missing
    )
    said: dict[int, list[int]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not found:
            write_text(path, json.dumps(facts) + "\n")
        with (
            path.open("a", encoding="utf-8") as stream,
            tqdm(
                total=len(fitting),
                initial=len(found),
                desc="answer",
                unit="prompt",
                disable=not show,
            ) as bar,
        ):
            for token in decode(model.backbone, requests, batch_size=batch_size):
                said.setdefault(token.index, []).append(token.id)
                if token.finish is not None:
                    index, answered = missing[token.index], said.pop(token.index)
                    found[index] = answered
                    stream.write(json.dumps({"prompt": index, "ids": answered}) + "\n")
                    stream.flush()
                    bar.update()
    except OSError as error:
        raise OfframpError(f"cannot write {path}: {error.strerror or error}") from error
    if not found:
        raise OfframpError(f"no prompt leaves room for an answer in {length} tokens")
    examples = [Example(ids[i] + found[i], len(ids[i])) for i in sorted(found)]
    digest = hashlib.sha256(json.dumps([found[i] for i in sorted(found)]).encode()).hexdigest()
    skipped = {TOO_LONG: len(ids) - len(fitting)} if len(fitting) < len(ids) else {}
    return Data(examples, {**files, ANSWERS: digest}, skipped)


def _read(path: Path, facts: dict[str, Any]) -> dict[int, list[int]]:
    """Return the answers that are there already, by prompt; a line cut by a kill is dropped.

    Raises:
        OfframpError: they are another model's, or to other prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise OfframpError(f"cannot read {path}: {error}") from error
    found: dict[int, list[int]] = {}
    whole: list[str] = []
    try:
        for number, line in enumerate(lines):
            if not line.endswith("\n"):
                break
            row = json.loads(line)
            if number == 0 and row != facts:
                changed = sorted(k for k in {*row, *facts} if row.get(k) != facts.get(k))
                raise OfframpError(
                    f"{path} holds answers with another {', '.join(changed)}; name another --out, "
                    "or remove it"
                )
            if number:
                found[int(row["prompt"])] = [int(token) for token in row["ids"]]
            whole.append(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OfframpError(f"{path} holds no answers: {error}") from error
    if len(whole) < len(lines):
        write_text(path, "".join(whole))
    return found
