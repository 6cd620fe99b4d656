"""From prompts to a trace, and times, each under a progress bar; for ``inspect`` and ``trace``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.errors import OfframpError, UsageError

if TYPE_CHECKING:
    from offramp.checks import Check, Head
    from offramp.model import Model
    from offramp.plan import Plan
    from offramp.report.runs import Generated
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


def read_generated(path: Path) -> Generated:
    """Return the run in a file, one of ``generate``.

    Raises:
        UsageError: it is a run of something else.
        OfframpError: it cannot be read.
    """
    from offramp.report.read import read_run
    from offramp.report.runs import Generated

    found = read_run(path)
    if not isinstance(found, Generated):
        raise UsageError(f"--run {path}: give the JSON of 'offramp generate'")
    return found


def plan_of(run: Generated) -> Plan:
    """Return the plan to replay on a run's texts: its own, where a trace can replay it."""
    from offramp.plan import Plan
    from offramp.runs import Exit

    try:
        found = Plan.model_validate_json(json.dumps(run.plan))
    except ValueError as error:
        raise OfframpError("the run's plan cannot be read; generate it again") from error
    return found if isinstance(found.run, Exit) else Plan()


def run_texts(model: Model, run: Generated, limit: int | None) -> tuple[list[Prompt], Texts]:
    """Return the prompts of a run, and each with its answer as a text to trace.

    Raises:
        UsageError: another model wrote them.
    """
    from offramp.text import encode

    vocabulary = model.backbone.shape.vocab_size
    answers = run.outputs[:limit]
    ids = [token for answer in answers for token in answer.token_ids]
    if run.model != model.name or not all(0 <= token < vocabulary for token in ids):
        raise UsageError(f"--run: {run.model} wrote these answers, and this is {model.name}")
    prompts: list[Prompt] = [
        answer.prompt if isinstance(answer.prompt, str) else list(answer.prompt)
        for answer in answers
    ]
    starts = [encode(model.tokenizer, prompt, raw=run.raw) for prompt in prompts]
    texts = [
        (start + list(answer.token_ids), len(start))
        for start, answer in zip(starts, answers, strict=True)
    ]
    return prompts, texts


def traced(
    model: Model,
    texts: Texts,
    exits: Sequence[int] | None = None,
    *,
    keep_hidden: bool = False,
    check: Check | None = None,
    head: Head | None = None,
) -> Trace:
    """Record the trace of some texts, seen and chosen by the full head unless by these."""
    from tqdm import tqdm

    from offramp.checks import FULL_HEAD
    from offramp.trace import record

    with tqdm(texts, desc="trace", unit="text", leave=False) as bar:
        return record(
            model.backbone,
            bar,
            exits,
            keep_hidden=keep_hidden,
            check=check or FULL_HEAD,
            head=head or FULL_HEAD,
            ends=model.eos,
        )


def timed(model: Model) -> Constants:
    """Return what this machine was measured to take, now or earlier."""
    from tqdm import tqdm

    from offramp.timing import constants

    with tqdm(total=100, desc="timing", unit="%", leave=False) as bar:
        return constants(model.backbone, lambda share: bar.update(round(100 * share) - bar.n))
