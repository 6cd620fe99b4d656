"""The Python door: load a model, generate text. Joins backbone, tokenizer and plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from offramp.backbone import Backbone
from offramp.card import Card
from offramp.collector import resting
from offramp.cost import Figures, full_depth
from offramp.errors import OfframpError, UnsupportedModelError, UsageError
from offramp.fast.build import UnavailableError
from offramp.fast.open import open_fast, open_graphs
from offramp.fast.pack import Format
from offramp.hf.load import GENERIC_FORMATS
from offramp.hf.open import open_model
from offramp.hf.tuned import load_tuned
from offramp.plan import ModelId, Plan, cheap_weights, execute
from offramp.readouts import ExitReadout
from offramp.request import Finish, Request, Token, check_request
from offramp.sample import Sampling
from offramp.text import Detokenizer, Prompt, encode
from offramp.timing import known

BackboneName = Literal["auto", "fast", "hf"]

_log = logging.getLogger(__name__)


@dataclass
class Output:
    """The answer to one prompt."""

    prompt: Prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Layers that chose each token."""
    accepted: list[bool] = field(default_factory=list)
    """Whether a draft had proposed each token."""
    finish_reason: Finish | None = None


@dataclass(frozen=True)
class Piece:
    """What one new token added."""

    index: int
    """Which prompt."""
    text: str
    """Text that can be shown now; empty while a character or a stop string may be incomplete."""
    token: Token


@dataclass(frozen=True)
class Result:
    """All answers of one call, and what they cost."""

    outputs: list[Output]
    figures: Figures

    @property
    def text(self) -> str:
        """Return the first answer's text."""
        return self.outputs[0].text


class Stream:
    """Iterate to generate; ``result`` holds the answers so far and what they cost."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        watchers: Sequence[Detokenizer],
        plan: Plan,
        batch_size: int,
    ) -> None:
        self.outputs = [Output(prompt) for prompt in prompts]
        self._requests, self._watchers = requests, watchers
        self._backbone, self._batch_size = model.backbone, batch_size
        self._check_weights = cheap_weights(plan, model.backbone.shape)
        self._constants = known(model.backbone)
        self._before = model.backbone.meter.copy()
        # Before the clock starts: a cheap head that is asked for the first time is made here.
        self._tokens = execute(model.backbone, requests, plan.run, batch_size=batch_size)
        self._seconds = 0.0
        self._start = time.perf_counter()

    def __iter__(self) -> Iterator[Piece]:
        for token in self._tokens:
            output, watcher = self.outputs[token.index], self._watchers[token.index]
            output.token_ids.append(token.id)
            output.depths.append(token.depth)
            output.accepted.append(token.accepted)
            output.finish_reason = token.finish
            watcher(output.token_ids)
            piece = watcher.release(final=token.finish is not None)
            output.text += piece
            self._seconds = time.perf_counter() - self._start
            yield Piece(token.index, piece, token)

    @property
    def result(self) -> Result:
        """Return the answers so far and what they cost."""
        texts = [
            (len(request.ids), len(output.token_ids))
            for request, output in zip(self._requests, self.outputs, strict=True)
            if output.token_ids
        ]
        shape = self._backbone.shape
        figures = Figures(
            tokens=sum(new for _, new in texts),
            seconds=self._seconds,
            depths=[depth for output in self.outputs for depth in output.depths],
            work=self._backbone.meter - self._before,
            baseline=full_depth(
                texts,
                shape,
                self._batch_size,
                batched=self._backbone.batched,
                ragged=self._backbone.ragged,
            ),
            shape=shape,
            check_weights=self._check_weights,
            constants=self._constants,
        )
        return Result(self.outputs, figures)


class Model:
    """A causal LM that runs only as deep as its plan says. Make one with :func:`load`."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        name: str,
        eos: frozenset[int],
        card: Card | None = None,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.name = name
        self.eos = eos
        self.card = card
        """How it was tuned; None of a model that was not, or not by offramp."""

    @property
    def id(self) -> ModelId:
        """Return how plans know this model."""
        return ModelId(
            name=self.name,
            num_layers=self.backbone.shape.num_layers,
            fingerprint=self.backbone.fingerprint,
        )

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Result:
        """Return the answers to one prompt or several; the options are those of :meth:`stream`."""
        stream = self.stream(prompts, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        plan: Plan | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        batch_size: int = 8,
    ) -> Stream:
        """Return a stream of pieces as they are generated.

        Args:
            prompts: a text, or chat messages; or a list of either.
            plan: how to run the model; every layer for every token by default.
            max_new_tokens: most new tokens of each answer.
            sampling: how tokens are drawn, greedy by default. The i-th prompt uses ``seed + i``.
            stop: strings that end an answer; they are not part of it.
            raw: do not use the chat template.
            batch_size: prompts at once.

        Raises:
            UsageError: an empty or too long prompt, a plan for another model, or an option out of
                range; nothing has been run then.
        """
        many = _as_list(prompts)
        plan = plan or Plan()
        plan.check(self.backbone)
        if batch_size < 1:
            raise UsageError(f"batch-size must be 1 or more, not {batch_size}")
        sampling = sampling or Sampling()
        stop = [stop] if isinstance(stop, str) else stop
        watchers = [Detokenizer(self.tokenizer, stop) for _ in many]
        requests = [
            Request(
                encode(self.tokenizer, prompt, raw=raw),
                max_new_tokens,
                _seeded(sampling, i).chooser(),
                self.eos,
                watchers[i] if stop else None,
            )
            for i, prompt in enumerate(many)
        ]
        for request in requests:
            check_request(request, self.backbone.shape.context)
        return Stream(self, many, requests, watchers, plan, batch_size)


@resting()
def load(
    name: str | None = None,
    *,
    backbone: BackboneName = "auto",
    weights: Format = "fp32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal LM and check that it can be run layer by layer.

    Args:
        name: hub id, local folder (a tuned model's, too) or GGUF file; SmolLM2-135M-Instruct by
            default.
        backbone: "fast" runs Llama-like models, on a CPU by kernels of this library and elsewhere
            by CUDA graphs; "hf" runs any model by its own modules; "auto" is fast where it can be,
            else hf, and logs why.
        weights: how the weights are held, "fp32", "bf16", "int8" or "int4"; the last two are for
            the fast backbone on a CPU. int4 is for models that were trained or rounded to bear it:
            it undoes most of a short tuning, which is logged.
        device: where the model runs, as PyTorch names it ("cuda", "cuda:1"). Only "cpu" has been
            tested.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        OfframpError: it cannot be loaded.
        UnsupportedModelError: it cannot be run layer by layer with the same result, or not by the
            backbone asked for.
        UsageError: weights that the backbone cannot hold, or no such device.
    """
    where = _checked_device(device)
    packed = backbone != "hf" and where.type == "cpu"  # by the kernels, out of full precision
    if not packed and weights not in GENERIC_FORMATS:
        raise UsageError(f"{weights} weights need the fast backbone on a CPU")
    tuned = load_tuned(
        name,
        weights="bf16" if weights == "bf16" and not packed else "fp32",
        trust_remote_code=trust_remote_code,
    )
    model = tuned.model
    try:
        model.to(where)
    except torch.OutOfMemoryError as error:
        raise OfframpError(f"{tuned.name} does not fit into the memory of {device}") from error
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tuned.tokenizer.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    borne = tuned.card is not None and tuned.card.recipe.settings.get("rounding") == "int4"
    if tuned.changed and weights == "int4" and not borne:
        _log.warning("offramp: int4 rounds away most of what tuning %s changed", tuned.name)
    opened = _opened(model, tuned.readouts, backbone, weights)
    return Model(opened, tuned.tokenizer, tuned.name, frozenset(ids), tuned.card)


def _opened(
    model: Any, readouts: Mapping[int, ExitReadout], backbone: BackboneName, weights: Format
) -> Backbone:
    """Return the backbone asked for; with "auto" the generic one where the fast one cannot be."""
    generic = open_model(model, readouts)
    if backbone == "hf":
        return generic
    try:
        if generic.model.device.type != "cpu":
            return open_graphs(generic)
        return open_fast(generic, weights)
    except (UnavailableError, UnsupportedModelError) as error:
        if backbone == "fast":
            raise
        held = "bf16" if weights == "bf16" else "fp32"
        _log.warning("offramp: %s; running its own modules with %s weights", error, held)
    if held == "bf16" and model.dtype != torch.bfloat16:
        return open_model(model.bfloat16(), readouts)
    return generic


def _checked_device(name: str) -> torch.device:
    """Return the device of this name, if something can be computed there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}; try cpu or cuda") from error
    try:
        torch.zeros(1, device=device).cpu()
    # torch's own ways of saying that a device is absent, not built in, or holds no data ("meta").
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OfframpError(f"nothing can be run on {name} here: {reason}") from error
    return device


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt (a string, or a list of messages) from a list of prompts."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    if not prompts:
        raise UsageError("there is no prompt")
    return list(prompts)  # type: ignore[arg-type]


def _seeded(sampling: Sampling, index: int) -> Sampling:
    return Sampling(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.repetition_penalty,
        sampling.seed + index,
    )
