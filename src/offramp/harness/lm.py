"""The model ``offramp`` of the lm-evaluation-harness: its plan scores, and its plan writes.

Written against lm-eval 0.4.13. Nothing here computes: the harness's requests become items to score
(:mod:`offramp.harness.score`) or requests to continue, and what they cost is kept for its results.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from offramp import __version__
from offramp.errors import UsageError
from offramp.fast.pack import Format
from offramp.harness.options import batch_of, device_of, length_of, plan_of
from offramp.harness.score import Item, Score, method, score
from offramp.harness.texts import Texts
from offramp.harness.wanted import Wanted, wanted
from offramp.model import BackboneName, Model, Output, Stream, load
from offramp.plan import Plan
from offramp.request import Request, check_request
from offramp.text import Detokenizer

_log = logging.getLogger("lm_eval.offramp")  # the harness shows what its own loggers say

Scored = tuple[float, bool]


@register_model("offramp")
class OfframpLM(Texts):
    """A causal LM run as a plan says, for log-likelihoods and for generation alike."""

    def __init__(
        self,
        pretrained: str | Model | None = None,
        plan: str | Plan | None = None,
        weights: Format = "fp32",
        backbone: BackboneName = "auto",
        device: str = "cpu",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a model; the arguments are what ``--model_args`` may name.

        Args:
            pretrained: hub id, local folder or GGUF file, offramp's default model if None; or a
                model, which is held and placed as it is.
            plan: a plan's JSON file, or "full" (or None) for every layer.
            weights: how the weights are held, as in :func:`offramp.load`.
            backbone: "auto", "fast" or "hf", likewise.
            device: where the model runs; the harness says "cuda:0" where nobody else does, so that
                this means the CPU where there is no CUDA.
            max_length: most tokens read before the one predicted: at most the context less one.
            max_gen_toks: most new tokens where a task does not say.
            batch_size: texts at once; "auto" is 8.
            max_batch_size: of no consequence: nothing is probed.
            trust_remote_code: run modelling code that comes with the checkpoint.

        Raises:
            OfframpError: the model or the plan cannot be read.
            UsageError: a plan for another model, or a value out of range.
        """
        super().__init__()
        self.batch_size = batch_of(batch_size)
        self.plan = plan_of(plan)
        self.model = (
            pretrained
            if isinstance(pretrained, Model)
            else load(
                pretrained,
                backbone=backbone,
                weights=weights,
                device=device_of(device),
                trust_remote_code=trust_remote_code,
            )
        )
        self.plan.check(self.model.backbone)
        self._device = device_of(device)
        self.tokenizer = self.model.tokenizer
        self.max_gen_toks = max_gen_toks
        self.max_length = length_of(max_length, self.model.backbone.shape.context)
        self._judged: Counter[int] = Counter()
        self._written: list[dict[str, object]] = []

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[Scored]:
        """Return (log-probability, whether greedy) of every continuation, as the plan has them."""
        items = [self._item(given, said) for _, given, said in requests]
        order = sorted(range(len(items)), key=lambda i: -len(items[i].given) - len(items[i].said))
        found: list[Scored] = [(0.0, True)] * len(items)
        bar = tqdm(total=len(items), disable=disable_tqdm, desc="Running loglikelihood requests")
        scores = score(
            self.model.backbone,
            self.plan.run,
            [items[i] for i in order],
            eos=self.model.eos,
            batch_size=self.batch_size,
        )
        with bar:
            for place, one in scores:
                i = order[place]
                found[i] = self._kept(requests[i][0], one)
                bar.update()
        self._say("scored", self._judged)
        return found

    def _kept(self, asked: tuple[str, str] | None, one: Score) -> Scored:
        """Count the depths of a score, cache it, and return it as the harness wants it."""
        self._judged.update(one.depths)
        answer = (one.logprob, one.greedy)
        if asked is not None:  # a window of a longer text is cached as part of that
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answer

    def _item(self, given: list[int], said: list[int]) -> Item:
        """Return what is scored: the end of it, where it is too long (the harness cuts so)."""
        room = self.max_length + 1 - len(said)
        if room < 1:
            raise UsageError(
                f"a continuation has {len(said)} tokens, and the model reads {self.max_length}"
            )
        return Item(given[-room:], said)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, each token predicted once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for given, said in map(make_disjoint_window, rolling):
                windows.append((None, given, said))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logprob, _) in zip(owners, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the plan's own generation writes after every context.

        Raises:
            UsageError: a generation option that offramp does not have, or no room for an answer.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        contexts = [requests[i].args[0] for i in order]
        options = [wanted(requests[i].args[1], self.max_gen_toks) for i in order]
        watchers = [Detokenizer(self.tokenizer, one.stops) for one in options]
        asked = [
            self._request(context, one, watcher, seed)
            for seed, context, one, watcher in zip(order, contexts, options, watchers, strict=True)
        ]
        stream = Stream(self.model, contexts, asked, watchers, self.plan, self.batch_size)
        bar = tqdm(total=len(asked), disable=disable_tqdm, desc="Running generate_until requests")
        found = [""] * len(requests)
        with bar:
            for piece in stream:
                if piece.token.finish is not None:
                    i = order[piece.index]
                    found[i] = self._answered(requests[i], stream.outputs[piece.index])
                    bar.update()
        figures = stream.result.figures
        depths = Counter(figures.depths)
        self._written.append({**figures.as_dict(), **_depths(depths, self._layers)})
        self._say("written", depths)
        return found

    def _answered(self, request: Instance, output: Output) -> str:
        self.cache_hook.add_partial("generate_until", request.args, output.text)
        return output.text

    def _request(self, context: str, one: Wanted, watcher: Detokenizer, seed: int) -> Request:
        """Return what to continue: the end of it, where it leaves no room for the answer."""
        room = self.max_length + 1 - one.max_new_tokens
        if room < 1:
            raise UsageError(
                f"{one.max_new_tokens} new tokens leave no room for a prompt: the model reads "
                f"{self.max_length}; set max_gen_toks lower"
            )
        request = Request(
            self.tok_encode(context)[-room:],
            one.max_new_tokens,
            one.sampling(seed).chooser(),
            self.model.eos | {self.eot_token_id} | self._special(one.until),
            watcher if one.stops else None,
        )
        check_request(request, self.model.backbone.shape.context)
        return request

    def _special(self, stops: Iterable[str]) -> set[int]:
        """Return the special tokens among stop strings: decoding would never show them."""
        return {
            self.tokenizer.convert_tokens_to_ids(stop)
            for stop in stops
            if stop in self.tokenizer.all_special_tokens
        }

    @property
    def _layers(self) -> int:
        return self.model.backbone.shape.num_layers

    def _say(self, what: str, depths: Counter[int]) -> None:
        if depths:
            _log.info("tokens %s: mean depth %.2f of %d", what, _mean(depths), self._layers)

    def get_model_info(self) -> dict[str, object]:
        """Return what the harness puts beside its results: the plan, and what it saved."""
        return {
            "offramp": {
                "version": __version__,
                "model": self.model.id.model_dump(),
                "plan": self.plan.model_dump(mode="json"),
                "lossless": self.plan.lossless,
                "backbone": self.model.backbone.name,
                "weights": self.model.backbone.weights,
                "scoring": method(self.plan.run),
                "max_length": self.max_length,
                "scored": _depths(self._judged, self._layers),
                "written": self._written,
            }
        }


def _depths(counts: Counter[int], layers: int) -> dict[str, object]:
    """Return the mean depth of tokens and the share of layers that they did not need."""
    return {
        "tokens": counts.total(),
        "mean_depth": _mean(counts) if counts else None,
        "layers_saved": 1 - _mean(counts) / layers if counts else None,
        "depth_histogram": {str(depth): count for depth, count in sorted(counts.items())},
    }


def _mean(counts: Counter[int]) -> float:
    return sum(depth * count for depth, count in counts.items()) / counts.total()
