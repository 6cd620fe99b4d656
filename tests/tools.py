"""What the law tests share: opened tiny models, their own answers, hooks that count real rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offramp.backbone import Backbone
from offramp.fast.backbone import FastBackbone
from offramp.fast.graphs import GraphBackbone, bucket
from offramp.fast.open import open_fast, open_graphs
from offramp.fast.slots import Slot
from offramp.fast.static import StaticSlot
from offramp.hf.backbone import HFBackbone
from offramp.hf.open import open_model
from offramp.meter import Meter
from offramp.policy import Policy
from offramp.probe import Probe
from offramp.request import Request, Token
from tests.families import build

TEN = (
    "llama",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "bloom",
    "gemma2",
    "qwen3",
    "mixtral",
    "gpt_oss",
)
"""The families every law runs on in CI; ``make families`` runs all there are."""

FAST = tuple(
    f"fast:{name}"
    for name in (
        *("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"),
        *("olmo2", "granite", "gemma2", "gemma3_text"),
    )
)
"""The same laws on the fast backbone."""

GRAPH = tuple(f"graph:{name}" for name in ("llama", "gemma2", "qwen3", "phi3", "olmo2", "granite"))
"""And on the one of fixed shapes, for other devices; on a CPU here."""

BOTH = ("llama", "fast:llama")

Multiplied = list[dict[str, tuple[int, int]]]
"""What the kernels say: (rows, calls) by kind, per layer."""

Change = Callable[[dict[str, str], dict[str, Tensor]], object]
"""Changes what a file says of itself, or its tensors."""

DIGEST_CHANGES: dict[str, Change] = {
    "the digest": lambda said, _: said.update(sha256="0" * 64),
    "no digest": lambda said, _: said.pop("sha256"),
}

AnyBackbone = HFBackbone | FastBackbone | GraphBackbone

# The last path component of the modules that make keys, mix the heads, and end the MLP.
_KINDS = {
    "key": ("k_proj", "query_key_value", "attn.c_attn"),
    "output": ("o_proj", "out_proj", "attention.dense", "self_attention.dense", "attn.c_proj"),
    "mlp": ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj"),
}


@cache
def generic(name: str) -> HFBackbone:
    """Return the tiny random model of this family, opened and checked; one per test session."""
    return open_model(build(name))


@cache
def opened(name: str) -> AnyBackbone:
    """Return a family's generic backbone, or that of ``fast:family`` or ``graph:family``."""
    kind, _, family = name.rpartition(":")
    if kind == "graph":
        return open_graphs(generic(family))
    return open_fast(generic(family)) if kind == "fast" else generic(family)


def tamper(path: Path, change: Change) -> None:
    """Change a safetensors file in place; what changes nothing is no test."""
    with safe_open(path, "pt") as file:
        said, parts = file.metadata(), load_file(path)
    before = dict(said), {name: tensor.clone() for name, tensor in parts.items()}
    change(said, parts)
    same = parts.keys() == before[1].keys() and said == before[0]
    assert not same or any(not torch.equal(parts[n], before[1][n]) for n in parts)
    save_file(parts, path, said)


def lengths(slot: Any) -> list[int]:
    """Return how many positions each layer of a slot holds."""
    return slot.lengths if isinstance(slot, Slot | StaticSlot) else [store.length for store in slot]


def stored(slot: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return one layer's keys and values, ``[H, length, d]`` each."""
    found: tuple[Tensor, Tensor]
    found = slot.view(layer) if isinstance(slot, Slot | StaticSlot) else slot[layer].view()
    return found


def texts_of(backbone: Backbone, lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Return random token ids, one text per length."""
    generator = torch.Generator().manual_seed(seed)
    vocab = backbone.shape.vocab_size
    return [torch.randint(4, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def own_logits(backbone: AnyBackbone, ids: Sequence[int]) -> Tensor:
    """Return the untouched model's logits at every position, ``[T, V]``."""
    logits: Tensor = backbone.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0]


@torch.no_grad()
def own_answer(backbone: AnyBackbone, ids: Sequence[int], count: int) -> list[int]:
    """Return what Hugging Face's own greedy ``generate`` writes."""
    batch = torch.tensor([list(ids)])
    out = backbone.model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def collected(tokens: Iterable[Token], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return (token ids, depths) of each of ``count`` texts."""
    ids: list[list[int]] = [[] for _ in range(count)]
    depths: list[list[int]] = [[] for _ in range(count)]
    for token in tokens:
        ids[token.index].append(token.id)
        depths[token.index].append(token.depth)
    return ids, depths


class Recorder:
    """A greedy chooser that remembers the logits it saw."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, ids: Sequence[int], first: int) -> list[int]:
        self.logits += list(logits)
        return logits.argmax(-1).tolist()

    def request(self, ids: list[int], count: int) -> Request:
        return Request(ids, count, self)


class Asked:
    """A policy that no backbone knows: it is asked at every exit, and remembers how often."""

    bars = None

    def __init__(self, policy: Policy) -> None:
        self.exits, self.policy, self.asked = policy.exits, policy, 0

    def leave(self, probe: Probe) -> Tensor:
        """Leave as the policy does."""
        self.asked += 1
        return self.policy.leave(probe)


class Told(Asked):
    """The same, and it says what it is: a backbone may pass its exits."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.bars = policy.bars  # type: ignore[assignment]


def assert_close(expected: Tensor, actual: Tensor) -> None:
    """Equal in fp32 up to the order of summation: 1e-4 of the largest logit."""
    assert expected.shape == actual.shape
    scale = max(expected.abs().max().item(), 1.0)
    assert (expected - actual).abs().max().item() <= 1e-4 * scale


class Rows:
    """Rows that really went through matrix products, by kind and layer, as hooks saw them."""

    def __init__(self) -> None:
        self.by_layer: dict[str, Counter[int]] = defaultdict(Counter)
        self.head = 0
        self.check = 0
        self.calls: dict[str, Counter[int]] = defaultdict(Counter)
        """How many calls had so many rows, by kind; of the layers together."""

    def add(self, kind: str, layer: int, rows: int) -> None:
        self.calls[kind][rows] += 1
        if kind == "head":
            self.head += rows
        elif kind == "check":
            self.check += rows
        else:
            self.by_layer[kind][layer] += rows

    def total(self, kind: str) -> int:
        return sum(self.by_layer[kind].values())


@contextmanager
def counted(backbone: AnyBackbone) -> Iterator[Rows]:
    """Count real rows, by hooks or by the kernels, and hold law 6: the meter is the work."""
    rows, before = Rows(), backbone.meter.copy()
    if isinstance(backbone, FastBackbone):
        with _watched(backbone, rows), _maps(backbone, rows):
            yield rows
    elif isinstance(backbone, GraphBackbone):
        with _padded(backbone, rows):
            yield rows
    else:
        hooks = list(_hooks(backbone, rows))
        try:
            with _maps(backbone, rows):
                yield rows
        finally:
            for hook in hooks:
                hook.remove()
    work: Meter = backbone.meter - before
    assert rows.total("key") == work.layer_tokens + work.fill_rows
    assert rows.total("output") == work.layer_tokens
    if "mlp" in rows.by_layer:  # experts are no modules that a hook could see
        assert rows.total("mlp") == work.layer_tokens
    assert rows.head == work.head_rows
    assert rows.check == work.check_rows
    assert rows.calls["key"] == work.tally.layers + work.tally.fills
    assert rows.calls["output"] == work.tally.layers
    assert rows.calls["head"] == work.tally.heads
    assert rows.calls["check"] == work.tally.checks
    assert rows.calls["map"] == work.tally.maps
    assert_sums(work)


def assert_sums(work: Meter) -> None:
    """The tallies by rows add up to the totals."""
    tally = work.tally
    for passes, rows, by_rows in (
        (work.layer_passes, work.layer_tokens, tally.layers),
        (work.head_passes, work.head_rows, tally.heads),
        (work.fill_passes, work.fill_rows, tally.fills),
        (work.check_passes, work.check_rows, tally.checks),
        (work.map_passes, work.map_rows, tally.maps),
    ):
        assert passes == by_rows.total()
        assert rows == sum(count * size for size, count in by_rows.items())


@contextmanager
def _watched(backbone: FastBackbone, rows: Rows) -> Iterator[None]:
    """Ask the kernels after every call what it multiplied."""

    def watch(name: str) -> None:
        inner = getattr(backbone, name)

        def call(*args: Any) -> Any:
            earlier = backbone.multiplied()
            result = inner(*args)
            _subtract(backbone.multiplied(), earlier, rows, exits=name == "_run")
            return result

        setattr(backbone, name, call)

    names = ("_run", "fill", "_read")
    try:
        for name in names:
            watch(name)
        yield
    finally:
        for name in names:
            backbone.__dict__.pop(name, None)


def _subtract(later: Multiplied, earlier: Multiplied, rows: Rows, *, exits: bool) -> None:
    """Add what a call multiplied: a layer once, and a head once, or once at each exit of a run.

    An exit's block within a run is filled by some rows, and then run by others.
    """
    for index, (now, then) in enumerate(zip(later, earlier, strict=True)):
        whole = now["output"][0] - then["output"][0] if "output" in now else 0
        for kind, (count, calls) in now.items():
            more, looks = count - then[kind][0], calls - then[kind][1]
            if exits and kind == "key" and more > whole:
                rows.add(kind, index, whole)
                rows.add(kind, index, more - whole)
                continue
            passes = looks if exits and kind in ("head", "check") else min(looks, 1)
            for _ in range(passes):  # the same rows ask at each
                rows.add(kind, index, more // passes)


@contextmanager
def _padded(backbone: GraphBackbone, rows: Rows) -> Iterator[None]:
    """Count the rows of every call, which each matrix must see once, padded to their bucket."""
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    multiply, stretch = backbone.layers.multiply, backbone.layers.multiply_stretch
    kinds = {"qkv": "key", "output": "output", "down": "mlp"}

    def one(layer: int, kind: str, states: Tensor) -> Tensor:
        seen[kinds.get(kind, kind)][layer] += len(states)
        return multiply(layer, kind, states)

    def several(layers: range, states: Tensor, plain: Tensor | None) -> Tensor:
        for layer in layers:
            seen["key"][layer] += len(states)
        return stretch(layers, states, plain)

    def call(inner: Any) -> Any:
        def watched(layers: Sequence[int], hidden: Tensor, spans: Any) -> Any:
            seen.clear()
            result = inner(layers, hidden, spans)
            assert {"key"} <= set(seen)
            for kind, by_layer in seen.items():
                assert by_layer == dict.fromkeys(layers, bucket(len(hidden)))
                if kind != "gate_up":
                    for layer in by_layer:
                        rows.add(kind, layer, len(hidden))
            return result

        return watched

    def head(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.add("head", 0, len(args[0]))

    def check(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.add("check", 0, len(args[0]))

    hooks = [backbone.model.get_output_embeddings().register_forward_pre_hook(head)]
    hooks += [cheap.register_forward_pre_hook(check) for cheap in backbone.cheap.values()]
    changed = {"multiply": one, "multiply_stretch": several}
    backbone.layers.__dict__.update(changed)
    backbone.__dict__.update({name: call(getattr(backbone, name)) for name in ("run", "fill")})
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in changed:
            del backbone.layers.__dict__[name]
        del backbone.__dict__["run"], backbone.__dict__["fill"]


@contextmanager
def _maps(backbone: HFBackbone | FastBackbone, rows: Rows) -> Iterator[None]:
    """Count the rows of the affine maps that exits own: modules on either backbone."""

    def mapped(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.add("map", 0, len(args[0]))

    hooks = [owned.register_forward_pre_hook(mapped) for owned in backbone.own.maps.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(backbone: HFBackbone, rows: Rows) -> Iterator[Any]:
    for index, layer in enumerate([*backbone.adapter.layers, *backbone.own.layers]):
        for kind, names in _KINDS.items():
            for module in _ending(layer, names):

                def count(
                    _m: nn.Module, args: tuple[Tensor, ...], kind: str = kind, index: int = index
                ) -> None:
                    rows.add(kind, index, args[0][..., 0].numel())

                yield module.register_forward_pre_hook(count)

    def head(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.add("head", 0, args[0][..., 0].numel())

    def check(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.add("check", 0, args[0][..., 0].numel())

    for one in (backbone.model.get_output_embeddings(), *backbone.own.heads.values()):
        yield one.register_forward_pre_hook(head)
    for cheap in backbone.cheap.values():  # those made inside a count would be missed: make first
        yield cheap.register_forward_pre_hook(check)


def _ending(layer: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [module for name, module in layer.named_modules() if name.endswith(tuple(names))]
