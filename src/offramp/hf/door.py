"""The Hugging Face door: ``model.generate(custom_generate=offramp.custom_generate(model, plan))``.

``generate`` prepares inputs, logits processors and stopping criteria as ever; only the loop is
ours. It hands a callable neither streamer nor generator, so those are given to the factory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from offramp.errors import UsageError
from offramp.hf.open import open_model
from offramp.plan import Plan, execute
from offramp.request import Request
from offramp.sample import Warp, greedy, gumbel

Generate = Callable[..., Any]


def custom_generate(
    model: PreTrainedModel, plan: Plan | None = None, *, streamer: Any = None, seed: int = 0
) -> Generate:
    """Return a decoding loop for ``model.generate(custom_generate=...)``.

    Args:
        model: the causal LM; it is opened and checked here, once.
        plan: how to run it; every layer for every token by default.
        streamer: a transformers streamer for a single prompt's tokens.
        seed: where sampling starts; row i of a batch uses ``seed + i``.

    Raises:
        UnsupportedModelError: the model cannot be run layer by layer with the same result.
        UsageError: the plan is not for this model; or later, from ``generate``: beams, guidance,
            right padding, another model, or a streamer with a batch.
    """
    backbone = open_model(model)
    plan = plan or Plan()
    plan.check(backbone)

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Any:
        if model is not backbone.model:
            raise UsageError("custom_generate was made for another model")
        if generation_config.num_beams != 1:
            raise UsageError("beam search is not depth-adaptive decoding; use num_beams=1")
        if generation_config.guidance_scale not in (None, 1):
            raise UsageError(
                "guidance_scale keeps a cache that knows nothing of drafts; leave it out"
            )
        if streamer is not None and len(input_ids) > 1:
            raise UsageError("a streamer takes one prompt at a time")
        # Were the mask a parameter of its own, ``generate`` would take it for an option of ours.
        prompts = _unpadded(input_ids, prepared.get("attention_mask"))
        requests = []
        for i, prompt in enumerate(prompts):
            row = _Row(input_ids, i, len(prompt))
            warp = row.warp(logits_processor)
            requests.append(
                Request(
                    prompt,
                    generation_config.max_length - input_ids.shape[1],
                    gumbel(warp, seed + i) if generation_config.do_sample else greedy(warp),
                    stops=row.stops(stopping_criteria),
                )
            )
        new: list[list[int]] = [[] for _ in prompts]
        for token in execute(backbone, requests, plan.run, batch_size=len(requests)):
            new[token.index].append(token.id)
            if streamer is not None:
                streamer.put(torch.tensor([token.id]))
        if streamer is not None:
            streamer.end()
        sequences = torch.cat((input_ids, _padded(new, generation_config, input_ids.device)), 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return generate


def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return ids.tolist()
    if not mask[:, -1].all():
        raise UsageError("prompts must be padded on the left")
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def _padded(new: list[list[int]], config: Any, device: torch.device) -> Tensor:
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    longest = max(map(len, new))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in new], device=device)


@dataclass(frozen=True)
class _Row:
    """One row of the batch, as processors and criteria see it.

    They may keep something per row (where its padding ends, say), so each is shown a whole batch,
    in which every row is this one, and only this row's answer is taken.
    """

    batch: Tensor  # [B, T], left-padded
    index: int
    length: int
    """Tokens of this row that are no padding."""

    def _shown(self, ids: Sequence[int]) -> Tensor:
        padding = self.batch[self.index, : self.batch.shape[1] - self.length]
        row = torch.cat((padding, torch.tensor(ids, device=self.batch.device)))
        return row.expand(len(self.batch), -1)

    def warp(self, processors: Any) -> Warp:
        def warp(logits: Tensor, ids: Sequence[int], first: int) -> Tensor:
            return torch.stack(
                [
                    processors(
                        self._shown(ids[: first + i]), row.float().repeat(len(self.batch), 1)
                    )[self.index]
                    for i, row in enumerate(logits)
                ]
            )

        return warp

    def stops(self, criteria: Any) -> Callable[[list[int]], bool]:
        prompt = self.batch[self.index, self.batch.shape[1] - self.length :].tolist()

        def stops(new: list[int]) -> bool:
            return bool(criteria(self._shown(prompt + new), None)[self.index])

        return stops
