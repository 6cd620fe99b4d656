"""The load-time self-check: does running the layers ourselves give the model's own logits?

Four short passes over twelve tokens. What cannot be reproduced is refused with a reason in the
user's words, before it can be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import UnsupportedModelError
from offramp.hf.backbone import HFBackbone
from offramp.policy import FULL, Policy, fixed
from offramp.step import step

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference allowed, as a share of the largest logit; half precisions get 5e-2."""

_REASONS = {
    ("conv state", "conv_state", "recurrent", "linear attention"): (
        "some of its layers keep a recurrent state (state-space, linear attention or convolution), "
        "which cannot be rewound or caught up token by token"
    ),
    ("indexer", "compression", "cache of its own"): (
        "its layers keep a cache of their own beside keys and values"
    ),
}


def check(backbone: HFBackbone) -> None:
    """Compare full depth, exits that drain, trimming and a ragged batch with the untouched model.

    Sets ``backbone.batched`` to False where only the ragged batch differs.

    Raises:
        UnsupportedModelError: anything else differs, or the layers cannot be run one by one.
    """
    name = type(backbone.model).__name__
    ids = probe_ids(backbone.shape.vocab_size)
    expected = _untouched(backbone, ids)
    alone_ids = _untouched(backbone, ids[:8])
    bound = _TOLERANCE.get(expected.dtype, 5e-2) * max(expected.abs().max().item(), 1.0)
    if not _difference(alone_ids, expected[:8]) <= bound:
        raise UnsupportedModelError(
            f"{name} attends to later tokens: it is no causal language model"
        )
    try:
        stores = partial(_check_stores, name=name)
        worst = alone(backbone, ids, expected, range(backbone.shape.num_layers), stores)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be run layer by layer: {_reason(error)}"
        ) from error
    if not worst <= bound:  # also catches NaN
        raise UnsupportedModelError(
            f"{name} gives other logits when its layers are run one by one (off by {worst:.2g} "
            f"where {bound:.2g} is allowed): its layers share state that does not pass through them"
        )
    backbone.batched = _batch_agrees(backbone, ids, expected, bound)


def alone(
    backbone: Backbone,
    ids: list[int],
    expected: Tensor,
    layers: Sequence[int],
    after_prefill: Callable[[Text], None] = lambda _: None,
) -> float:
    """Return the largest difference of three passes over one text from ``expected [T, V]``.

    All run on the path ``layers``: a prompt of eight; two tokens that leave and are drained by a
    third; a trim, and two again.
    """
    text = Text(ids[:8], backbone.open())
    worst = _difference(step(backbone, [text], layers=layers).logits, expected[7:8])
    after_prefill(text)
    depth = len(layers)
    early: list[Policy] = [fixed(max(depth // 3, 1)), fixed(max(2 * depth // 3, 1))]
    for token, policy in zip(ids[8:10], early if depth > 1 else [FULL, FULL], strict=True):
        text.ids.append(token)
        step(backbone, [text], policy, layers=layers)
    text.ids.append(ids[10])
    rows = text.num_waiting + 1
    drained = step(backbone, [text], layers=layers, tails=[rows]).logits
    text.trim(9)
    backbone.trim(text.slot, 9)
    text.ids += ids[9:11]
    again = step(backbone, [text], layers=layers, tails=[2]).logits
    return max(
        worst,
        _difference(drained, expected[11 - rows : 11]),
        _difference(again, expected[9:11]),
    )


def check_own(backbone: HFBackbone) -> None:
    """Run each exit that owns a readout: a text in two steps is the text in one.

    Raises:
        UnsupportedModelError: it is not, or its readout cannot be run.
    """
    name, ids = type(backbone.model).__name__, probe_ids(backbone.shape.vocab_size)
    for depth in sorted({*backbone.blocks, *backbone.apart}):
        try:
            whole = read_at(backbone, depth, ids, first=1)
            worst = _difference(read_at(backbone, depth, ids, first=7), whole[6:])
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} cannot run what exit {depth} owns: {_reason(error)}"
            ) from error
        bound = _TOLERANCE.get(whole.dtype, 5e-2) * max(whole.abs().max().item(), 1.0)
        if not worst <= bound:  # also catches NaN
            raise UnsupportedModelError(
                f"{name} gives other logits at exit {depth} step by step than at once (off by "
                f"{worst:.2g} where {bound:.2g} is allowed)"
            )


def read_at(backbone: Backbone, depth: int, ids: list[int], *, first: int) -> Tensor:
    """Return one exit's logits ``[T - first + 1, V]``, of ``first`` tokens and of the others."""
    text = Text(ids[:first], backbone.open())
    last = step(backbone, [text], layers=range(depth)).logits
    text.ids += ids[first:]
    others = step(backbone, [text], layers=range(depth), tails=[len(ids) - first]).logits
    return torch.cat((last, others))


def _batch_agrees(backbone: HFBackbone, ids: list[int], expected: Tensor, bound: float) -> bool:
    """Return whether texts of different length can share a call."""
    backbone.batched = True
    try:
        return together(backbone, ids, expected, range(backbone.shape.num_layers)) <= bound
    except Exception:  # any failure of a padded batch means: run them one by one
        return False


def together(backbone: Backbone, ids: list[int], expected: Tensor, layers: Sequence[int]) -> float:
    """Return the difference from ``expected [T, V]`` of two texts of unequal length in a batch."""
    texts = [Text(ids[:9], backbone.open()), Text(ids[:4], backbone.open())]
    for text in texts:
        step(backbone, [text], layers=layers)
    texts[0].ids.append(ids[9])
    texts[1].ids.append(ids[4])
    logits = step(backbone, texts, layers=layers).logits
    return _difference(logits, torch.stack([expected[9], expected[4]]))


def _untouched(backbone: HFBackbone, ids: list[int]) -> Tensor:
    """Return the model's own logits ``[T, V]``, and learn what its layers return."""
    seen: list[int] = []

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(order[id(module)])
        backbone.adapter.learn_outputs(output)

    layers = backbone.adapter.layers
    order = {id(layer): i for i, layer in enumerate(layers)}
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        batch = torch.tensor([ids], device=backbone.model.device)
        with torch.no_grad():
            logits: Tensor = backbone.model(input_ids=batch, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    if seen != list(range(len(layers))):
        raise UnsupportedModelError(
            f"{type(backbone.model).__name__} does not run its layers once each, in order"
        )
    return logits


def _check_stores(text: Text, name: str) -> None:
    for layer, store in enumerate(text.slot):
        if store.length != text.done:
            raise UnsupportedModelError(
                f"{name}: layer {layer} keeps no keys and values of its own (it is recurrent, or "
                "shares another layer's), so a token that left could not catch up there"
            )


def probe_ids(vocab_size: int) -> list[int]:
    """Return the twelve tokens of the check."""
    generator = torch.Generator().manual_seed(0)
    low = min(10, vocab_size // 2)  # special tokens, padding among them, usually come first
    return torch.randint(low, vocab_size, (12,), generator=generator).tolist()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _reason(error: Exception) -> str:
    """Say in the user's words why the layers did not run."""
    message = str(error)
    for words, reason in _REASONS.items():
        if any(word in message for word in words):
            return reason
    return (
        "its layers need more than a hidden state, a mask, positions, and keys and values "
        f"({type(error).__name__})"
    )
