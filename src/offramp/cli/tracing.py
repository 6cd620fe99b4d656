"""From prompts to a trace, and times, each under a progress bar; for ``inspect`` and ``trace``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.checks import Check
    from offramp.model import Model
    from offramp.text import Prompt
    from offramp.timing import Constants
    from offramp.trace import Trace

Texts = list[tuple[list[int], int]]
"""(token ids, how many leading ones are not counted) of each text."""


def given_texts(model: Model, prompts: Sequence[Prompt]) -> Texts:
    """Return the prompts themselves as texts to trace."""
    from offramp.text import encode

    return [(encode(model.tokenizer, prompt, raw=True), 1) for prompt in prompts]


def own_answers(
    model: Model, prompts: Sequence[Prompt], *, raw: bool, max_new_tokens: int, batch_size: int
) -> Texts:
    """Let the model answer the prompts greedily, and return prompt and answer of each."""
    from tqdm import tqdm

    from offramp.text import encode

    stream = model.stream(prompts, max_new_tokens=max_new_tokens, raw=raw, batch_size=batch_size)
    with tqdm(total=len(prompts), desc="answers", unit="prompt", leave=False) as bar:
        for piece in stream:
            bar.update(piece.token.finish is not None)
    ids = [encode(model.tokenizer, prompt, raw=raw) for prompt in prompts]
    answers = [output.token_ids for output in stream.result.outputs]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(ids, answers, strict=True)]


def traced(
    model: Model,
    texts: Texts,
    exits: Sequence[int] | None = None,
    *,
    keep_hidden: bool = False,
    check: Check | None = None,
) -> Trace:
    """Record the trace of some texts; its scores are the full head's unless another check's."""
    from tqdm import tqdm

    from offramp.checks import FULL_HEAD
    from offramp.trace import record

    with tqdm(texts, desc="trace", unit="text", leave=False) as bar:
        return record(model.backbone, bar, exits, keep_hidden=keep_hidden, check=check or FULL_HEAD)


def timed(model: Model) -> Constants:
    """Return what this machine was measured to take, now or earlier."""
    from tqdm import tqdm

    from offramp.timing import constants

    with tqdm(total=100, desc="timing", unit="%", leave=False) as bar:
        return constants(model.backbone, lambda share: bar.update(round(100 * share) - bar.n))
