"""Our own contestants: a backbone and a plan; the prompts all read; what the machine could do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

from offramp.backbone import Backbone, Shape
from offramp.bench.race import Case, Ceiling, Contestant, Sample, absent
from offramp.checks import FULL_HEAD, Check
from offramp.cost import flops, seconds, weight_bytes
from offramp.errors import OfframpError, UnsupportedModelError, UsageError
from offramp.fast.build import UnavailableError
from offramp.fast.open import open_fast
from offramp.fast.pack import Format
from offramp.hf.backbone import HFBackbone
from offramp.hf.load import GENERIC_FORMATS
from offramp.machine import multiplies_bf16
from offramp.meter import Meter
from offramp.model import BackboneName, Model, load
from offramp.paths import is_whole, named
from offramp.plan import Plan, cheap_weights, execute
from offramp.request import Request
from offramp.runs import Adapt, Exit, Full, Route, Run, Skip, Speculate
from offramp.runs import Path as SubModel
from offramp.text import Prompt, encode
from offramp.timing import Constants, constants

_MATRIX = 1024


def read_bytes(work: Meter, shape: Shape, check_weights: int = 0) -> float:
    """Return the bytes of weights, keys and values that counted work read."""
    per_key = shape.kv_weights / shape.hidden_size * shape.kv_bytes
    return weight_bytes(work, shape, check_weights) + per_key * work.tally.keys


def take_turn(backbone: Backbone, plan: Plan, known: Constants, case: Case) -> Sample:
    """Read the prompts and write greedily, timed and counted in two parts."""
    requests = [Request(ids, case.tokens) for ids in case.prompts]
    outputs: list[list[int]] = [[] for _ in requests]
    before = backbone.meter.copy()
    tokens = execute(backbone, requests, plan.run, batch_size=case.batch)
    start = time.perf_counter()
    for _ in requests:  # the prompts' step gives each text one token
        token = next(tokens)
        outputs[token.index].append(token.id)
    first, read = time.perf_counter(), backbone.meter.copy()
    for token in tokens:
        outputs[token.index].append(token.id)
    done = time.perf_counter()
    work, shape = backbone.meter - read, backbone.shape
    checks = cheap_weights(plan, shape)
    return Sample(
        prefill=first - start,
        decode=done - first,
        decoded=sum(map(len, outputs)) - case.batch,
        outputs=outputs,
        decode_bytes=read_bytes(work, shape, checks),
        prefill_flops=flops(read - before, shape),
        decode_flops=flops(work, shape, checks),
        predicted=seconds(work, known, shape, checks),
    )


def check(base: Model, plans: Sequence[Plan], length: int) -> None:
    """Refuse what cannot be timed on this model before anything is.

    Raises:
        UsageError: a plan that is not for this model, or texts longer than it reads.
    """
    for plan in plans:  # a certificate is for one format, and this base holds another
        plan.model_copy(update={"certificate": None}).check(base.backbone)
    most = base.backbone.shape.context
    if length > most:
        raise UsageError(
            f"context and new tokens make texts of {length} tokens, and the model reads at most "
            f"{most}"
        )


def own_contestants(
    base: Model, source: str | None, kind: BackboneName, weights: Format, plans: Sequence[Plan]
) -> list[Contestant]:
    """Return a contestant per plan; if there is no such backbone, one that gives the reason.

    Args:
        base: the model on the generic backbone in fp32, shared where that can be.
        source: what it was loaded from.
        kind: the backbone wanted.
        weights: how it holds the weights.
        plans: how to run it.
    """
    try:
        backbone = _backbone(base, source, kind, weights)
    except OfframpError as error:
        return [absent(f"{kind} {weights}", str(error), weights)]
    shown = backbone.name
    known = constants(backbone)

    def contestant(plan: Plan) -> Contestant:
        name = f"{shown} {weights} {describe(plan.run)}"
        try:
            plan.check(backbone)
        except UsageError as error:
            return absent(name, str(error), weights)
        return Contestant(
            name,
            partial(take_turn, backbone, plan, known),
            f"own {shown}",
            weights,
            full=isinstance(plan.run, Full),
            lossless=plan.lossless,
        )

    return [contestant(plan) for plan in plans]


def _backbone(base: Model, source: str | None, kind: BackboneName, weights: Format) -> Backbone:
    """Return it; "auto" never takes other weights than those asked for."""
    generic = base.backbone
    assert isinstance(generic, HFBackbone)
    if kind != "hf":
        try:
            return open_fast(generic, weights)
        except (UnavailableError, UnsupportedModelError):
            if kind == "fast" or weights not in GENERIC_FORMATS:
                raise
    if weights not in GENERIC_FORMATS:
        raise UnsupportedModelError(f"{weights} weights need the fast backbone")
    return generic if weights == "fp32" else load(source, backbone="hf", weights=weights).backbone


def describe(run: Run) -> str:
    """Return a few words for a way of running."""
    match run:
        case Full():
            return "full"
        case SubModel():
            return _layers("first", run.layers) + _unless_full(run.head)
        case Speculate():
            return f"{_layers('draft', run.draft)}, {run.tokens} tokens{_unless_full(run.head)}"
        case Adapt():
            drafts = " or ".join(_layers("draft", one) for one in run.drafts)
            return f"{drafts}, up to {run.tokens} tokens{_unless_full(run.head)}"
        case Skip():
            return f"skip gates of {len(run.weights.weights)} layers"
        case Exit():
            cuts = ",".join(f"{depth}:{value:g}" for depth, value in run.policy.thresholds)
            return f"{run.signal}={cuts} {run.kv}{_unless_full(run.sees)}"
        case Route():
            return f"route({' | '.join(describe(one) for one in run.runs)})"


def _unless_full(check: Check) -> str:
    return "" if check == FULL_HEAD else f", {check}"


def _layers(word: str, layers: Sequence[int]) -> str:
    """Return e.g. "first 12", or for layers that are no prefix "first 12 of 0..29"."""
    skips = tuple(layers) != tuple(range(len(layers)))
    ends = f" of {named(layers[0])}..{named(layers[-1])}" if skips else ""
    halves = sum(not is_whole(part) for part in layers)
    return f"{word} {len(layers)}{ends}" + (f", {halves} of them halves" if halves else "")


def make_case(tokenizer: object, batch: int, context: int, tokens: int) -> Case:
    """Return ``batch`` prompts of ``context`` tokens each, out of Python's own manual.

    It is English that every Python has, and long enough that texts differ.
    """
    needed = batch * context
    text = "\n".join(topics[name] for name in sorted(topics))[: 16 * needed]
    ids = encode(tokenizer, text, raw=True)
    ids = ids * -(-needed // len(ids))
    return Case([ids[i * context : (i + 1) * context] for i in range(batch)], tokens)


def given_case(tokenizer: object, prompts: Sequence[Prompt], tokens: int, *, raw: bool) -> Case:
    """Return the prompts as texts that are answered one after the other."""
    ids = [encode(tokenizer, prompt, raw=raw) for prompt in prompts]
    return Case(ids, tokens, alone=True)


def ceiling_meter() -> Callable[[], Ceiling]:
    """Return what measures the machine: reading far more than the caches hold, and products.

    All by torch with its threads, the best of three.
    """
    big = torch.ones(max(2**28, 4 * _cache_size()) // 4)
    matrix = torch.ones(_MATRIX, _MATRIX)
    brief, bytes_ = matrix.bfloat16(), matrix.char()
    products = {
        "fp32": partial(torch.mm, matrix, matrix),
        "int8": partial(torch._int_mm, bytes_, bytes_),  # torch has no public one on a CPU
    }
    if multiplies_bf16():  # emulated, one product takes seconds
        products["bf16"] = partial(torch.mm, brief, brief)
    return lambda: Ceiling(
        big.nbytes / _best(big.sum),
        {kind: 2 * _MATRIX**3 / _best(product) for kind, product in products.items()},
    )


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cache_size() -> int:
    """Return the bytes of the last-level cache, or 0 where the system does not say."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(size.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0
