"""Lets the plan and the full model take turns on groups of items, and counts what each did."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.cost import flops, full_depth
from offramp.errors import OfframpError
from offramp.evaluate.items import Item
from offramp.evaluate.kept import Answer, Ran
from offramp.evaluate.tasks import Task
from offramp.model import Model
from offramp.plan import Plan, cheap_weights, execute
from offramp.request import Request, Token
from offramp.text import Detokenizer, Prompt, encode
from offramp.trace import record


@dataclass(frozen=True)
class Asked:
    """An item in token ids."""

    ids: list[int]
    """The prompt, or the text to be read."""
    references: tuple[str, ...]
    firsts: frozenset[int]
    """First tokens of the right answers."""
    prompt: str = ""
    """What a judge is told was asked."""


class Forced:
    """Chooses a text's own tokens, and notes how improbable each was found."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.losses: list[float] = []

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        """Return the token of the text that comes next."""
        token = self.ids[first]
        seen = token < logits.shape[-1]  # a short head has fewer
        target = torch.tensor([token if seen else 0], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits.float(), target).item()
        self.losses.append(loss if seen else math.inf)
        return [token]


@dataclass
class _Writing:
    """One answer while it is written."""

    request: Request
    watcher: Detokenizer
    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def take(self, token: Token) -> None:
        self.ids.append(token.id)
        self.depths.append(token.depth)

    def answer(self) -> Answer:
        """Return what was written; the loss of an answer is not known yet."""
        choose, loss = self.request.choose, None
        if isinstance(choose, Forced):
            loss = math.fsum(choose.losses) / len(choose.losses)
        else:
            self.watcher(self.ids)
            self.watcher.release(final=True)
        return Answer(
            ids=tuple(self.ids), depths=tuple(self.depths), text=self.watcher.text, loss=loss
        )


def asked_of(
    model: Model, task: Task, items: Sequence[Item], *, raw: bool, count: int
) -> list[Asked | None]:
    """Return the items in token ids; None for one that the model's context has no room for."""
    return [_asked(model, task, item, raw=raw, count=count) for item in items]


def _asked(model: Model, task: Task, item: Item, *, raw: bool, count: int) -> Asked | None:
    tokenizer, context = model.tokenizer, model.backbone.shape.context
    ids = encode(tokenizer, item.prompt, raw=raw or task.raw)
    if task.kind == "reading":
        return Asked(ids[:context], (), frozenset()) if len(ids) > 1 else None
    if len(ids) + count > context:
        return None
    needed = "accuracy" in task.scores
    firsts = {_first(model, str(item.prompt), right) for right in item.references if needed}
    return Asked(ids, item.references, frozenset(firsts), _shown(item.prompt))


def _shown(prompt: Prompt) -> str:
    """Return a prompt as text: of a chat, who said what."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _first(model: Model, prompt: str, answer: str) -> int:
    """Return the first token of an answer, as the tokenizer has it behind the prompt."""
    before = encode(model.tokenizer, prompt, raw=True)
    whole = encode(model.tokenizer, prompt + answer, raw=True)
    if whole[: len(before)] == before and len(whole) > len(before):
        return whole[len(before)]
    alone: list[int] = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return alone[0]  # the tokenizer joins the prompt's end and the answer's beginning


def take_turn(
    model: Model, plan: Plan, task: Task, group: Sequence[Asked], *, count: int, batch_size: int
) -> Ran:
    """Let one arm answer a group of items greedily, each in at most ``count`` tokens.

    A text to read is run by the plan's own loop, whose choices are replaced by the text's next
    tokens: each token's loss is what the plan would have said at the depth where it leaves, and
    work and time are real. It equals the replay of a trace where there is one (a test holds it).

    Raises:
        OfframpError: the plan's head cannot write a token of a text to read.
    """
    backbone, shape = model.backbone, model.backbone.shape
    writing = [_writing(model, task, one, count) for one in group]
    before, start = backbone.meter.copy(), time.perf_counter()
    requests = [one.request for one in writing]
    for token in execute(backbone, requests, plan.run, batch_size=batch_size):
        writing[token.index].take(token)
    seconds, work = time.perf_counter() - start, backbone.meter - before
    sizes = [(len(one.request.ids), len(one.ids)) for one in writing]
    whole = full_depth(sizes, shape, batch_size, batched=backbone.batched, ragged=backbone.ragged)
    return Ran(
        answers=tuple(_finite(task, one) for one in writing),
        seconds=seconds,
        flops=flops(work, shape, cheap_weights(plan, shape)),
        full_flops=flops(whole, shape),
        layer_rows=work.layer_tokens,
        full_layer_rows=whole.layer_tokens,
    )


def _writing(model: Model, task: Task, one: Asked, count: int) -> _Writing:
    watcher = Detokenizer(model.tokenizer, task.stop)
    if task.kind == "reading":
        forced = Forced(one.ids)
        return _Writing(Request(one.ids[:1], len(one.ids) - 1, forced), watcher)
    stops = watcher if task.stop else None
    return _Writing(Request(one.ids, count, eos=model.eos, stops=stops), watcher)


def _finite(task: Task, one: _Writing) -> Answer:
    choose = one.request.choose
    if isinstance(choose, Forced) and math.inf in choose.losses:
        raise OfframpError(
            f"the plan's head cannot write every token of {task.name}, so its perplexity is "
            "infinite: leave this task out"
        )
    return one.answer()


def with_losses(model: Model, group: Sequence[Asked], ran: Ran) -> Ran:
    """Return the answers with their loss under the full model: one exact pass over each."""
    texts = [
        ([*one.ids, *answer.ids], len(one.ids))
        for one, answer in zip(group, ran.answers, strict=True)
    ]
    seen = record(model.backbone, texts, ())
    losses = [part.double().mean().item() for part in seen.loss[:, -1].split(list(seen.rows))]
    answers = [
        answer.model_copy(update={"loss": loss})
        for answer, loss in zip(ran.answers, losses, strict=True)
    ]
    return ran.model_copy(update={"answers": tuple(answers)})
