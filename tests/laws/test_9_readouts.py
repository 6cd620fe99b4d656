"""Law 9. An exit speaks through its own readout, and nothing else changes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offramp.batch import Span, Text
from offramp.checks import FULL_HEAD, Check, LowRank, Shortlist
from offramp.decode import decode
from offramp.errors import OfframpError, UnsupportedModelError, UsageError
from offramp.fast.backbone import FastBackbone
from offramp.fast.open import open_fast, open_graphs
from offramp.fast.pack import Format
from offramp.gate import Gate, fit_gate
from offramp.hf.backbone import HFBackbone
from offramp.hf.open import open_model
from offramp.meter import Meter
from offramp.plan import execute
from offramp.policy import FULL, Policy, Threshold, fixed
from offramp.readouts import ExitReadout, Kind, read_readouts, write_readouts
from offramp.request import Request
from offramp.runs import Path as SubModel
from offramp.speculate import Draft, speculate
from offramp.step import KV, step
from offramp.trace import record, replay
from tests.families import build
from tests.tools import (
    AnyBackbone,
    Asked,
    Recorder,
    Told,
    assert_close,
    collected,
    counted,
    lengths,
    opened,
    own_answer,
    own_logits,
    stored,
    texts_of,
)

FAMILIES = ("llama", "gemma2", "qwen3")
EACH = (*FAMILIES, *(f"fast:{name}" for name in FAMILIES))
BLOCKS = (*EACH, "gpt2", "bloom", "gpt_oss")
EXITS = (1, 2, 3, 4, 5)
"""An affine map, a block, no readout of its own, a block, and a head."""


def layer_of(family: str, layer: int) -> dict[str, Tensor]:
    """Return the parameters of one layer of a tiny model."""
    state: dict[str, Tensor] = opened(family.split(":")[-1]).adapter.layers[layer].state_dict()  # type: ignore[union-attr]
    return {name: tensor.clone() for name, tensor in state.items()}


def one_of_each(family: str) -> dict[int, ExitReadout]:
    """Return readouts of every kind, random but for the blocks: copies of layers, disturbed."""
    shape = opened(family.split(":")[-1]).shape
    size, draw = shape.hidden_size, torch.Generator().manual_seed(5)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw)

    def block(layer: int) -> ExitReadout:
        return ExitReadout(
            "block", {n: t + 0.02 * noise(*t.shape) for n, t in layer_of(family, layer).items()}
        )

    return {
        1: ExitReadout("affine", {"weight": 0.1 * noise(size, size), "bias": 0.1 * noise(size)}),
        2: block(3),
        4: block(5),
        5: ExitReadout("head", {"weight": 0.3 * noise(shape.vocab_size, size)}),
    }


def with_readouts(name: str, readouts: Mapping[int, ExitReadout]) -> AnyBackbone:
    """Return a tiny model whose exits own these."""
    kind, _, family = name.rpartition(":")
    backbone = open_model(build(family), readouts)
    return open_fast(backbone) if kind == "fast" else backbone


@cache
def owning(name: str) -> AnyBackbone:
    """Return a tiny model whose exits own one readout of each kind; one per test session."""
    return with_readouts(name, one_of_each(name))


def at_exit(backbone: AnyBackbone, depth: int, ids: list[int]) -> Tensor:
    """Return an exit's logits at every position, ``[T, V]``: all rows ask at once."""
    text = Text(list(ids), backbone.open())
    return step(backbone, [text], layers=range(depth), tails=[len(ids)]).logits


def check_blocks(backbone: AnyBackbone, texts: list[Text]) -> None:
    """A block holds the positions that passed its exit: those of the layer in front of it."""
    for text in texts:
        held = lengths(text.slot)
        for depth in text.blocks:
            assert held[backbone.blocks[depth]] == held[depth - 1]


# -- what an exit says


@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_that_is_the_next_layer_gives_the_next_depths_logits(family: str) -> None:
    """At once, token by token, and by leaving there: exit e speaks as depth e + 1 does."""
    for depth in (1, 3):  # the layers there are of the last one's kind
        block = ExitReadout("block", layer_of(family, depth))
        backbone, plain = with_readouts(family, {depth: block}), opened(family)
        [ids] = texts_of(backbone, [14], seed=depth)
        expected = at_exit(plain, depth + 1, ids)
        with counted(backbone):
            assert_close(expected, at_exit(backbone, depth, ids))
            text, rows = Text(ids[:6], backbone.open()), []
            for token in [*ids[6:], 0]:
                rows.append(step(backbone, [text], fixed(depth)).logits)
                text.ids.append(token)
        assert_close(expected[5:], torch.cat(rows))
        assert text.num_waiting == 14


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", ["affine", "head"])
def test_a_readout_that_is_the_shared_one_changes_nothing(name: str, kind: Kind) -> None:
    """A map of zeros, and the model's own head."""
    plain = opened(name)
    size, head = plain.shape.hidden_size, plain.model.get_output_embeddings().weight
    tensors = {"weight": torch.zeros(size, size), "bias": torch.zeros(size)}
    if kind == "head":
        tensors = {"weight": head.detach().clone()}
    backbone = with_readouts(name, {2: ExitReadout(kind, tensors)})
    [ids] = texts_of(backbone, [11])
    assert torch.equal(at_exit(plain, 2, ids), at_exit(backbone, 2, ids))


@pytest.mark.parametrize("name", EACH)
def test_own_maps_and_heads_are_what_they_say(name: str) -> None:
    """A map is residual, in front of the norm; a head stands behind it, and soft caps last."""
    backbone, plain, owned = owning(name), opened(name), one_of_each(name)
    [ids] = texts_of(backbone, [9], seed=1)
    states = record(plain, [([*ids, 0], 1)], (1, 5), keep_hidden=True).hidden
    assert states is not None
    weight, bias = owned[1].tensors["weight"], owned[1].tensors["bias"]
    mapped = states[:, 0] + states[:, 0] @ weight.T + bias
    assert_close(plain.readout(mapped, 6), at_exit(backbone, 1, ids))
    model, own = build(name.split(":")[-1]), owned[5].tensors["weight"]
    with torch.no_grad():
        model.set_output_embeddings(torch.nn.Linear(own.shape[1], own.shape[0], bias=False))
        model.get_output_embeddings().weight.copy_(own)
    assert_close(open_model(model).readout(states[:, 1], 6), at_exit(backbone, 5, ids))


@pytest.mark.parametrize("name", EACH)
def test_cheap_checks_look_through_what_the_exit_owns(name: str) -> None:
    """A shortlist has an exit's own logits at its entries, and full rank has all of them."""
    backbone = owning(name)
    states = torch.randn(4, backbone.shape.hidden_size, generator=torch.Generator().manual_seed(2))
    for check in (Shortlist(size=40), LowRank(rank=backbone.shape.hidden_size)):
        look = check.look(backbone)
        assert look is not None
        with counted(backbone):
            for depth in (1, 5, 6):
                seen = look(states, depth)
                assert_close(backbone.readout(states, depth)[:, : seen.shape[1]], seen)
    assert not torch.equal(backbone.readout(states, 5), backbone.readout(states, 6))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_fast_is_generic_at_every_exit(family: str, form: Format) -> None:
    """Every kind of readout, to 1e-4 in fp32 and to the rounding of the others."""
    generic = owning(family)
    assert isinstance(generic, HFBackbone)
    backbone = open_fast(generic, form)
    [ids] = texts_of(backbone, [15], seed=2)
    rounding = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1, "int4": 0.7}[form]
    for depth in EXITS:
        expected, actual = (at_exit(each, depth, ids) for each in (generic, backbone))
        off = (actual - expected).square().mean() / expected.square().mean()
        assert off.sqrt().item() <= rounding


# -- what an exit's readout does not touch


@pytest.mark.parametrize("name", EACH)
def test_full_depth_is_untouched_bit_for_bit(name: str) -> None:
    """Plain, and as a text that stays while the blocks on its way are filled."""
    plain, backbone = opened(name), owning(name)
    [ids] = texts_of(backbone, [12])
    policy = Threshold("margin", tuple((depth, 0.3) for depth in EXITS))
    for given, stay in ((FULL, None), (policy, [True])):
        made = []
        for each in (plain, backbone):
            text = Text(ids[:7], each.open())
            rows = [step(each, [text], given, stay=stay, tails=[7]).logits]
            for token in ids[7:]:
                text.ids.append(token)
                rows.append(step(each, [text], given, stay=stay).logits)
            made.append(torch.cat(rows))
        assert torch.equal(*made)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_waiting_changes_nothing(name: str, seed: int) -> None:
    """Tokens leave anywhere; blocks hold what passed; a drain gives the full model's logits."""
    backbone, draw = owning(name), random.Random(seed)
    [ids] = texts_of(backbone, [18], seed)
    text = Text(ids[:6], backbone.open())
    answers = {}
    with counted(backbone):
        for position, token in enumerate(ids[6:], 5):
            leave = draw.choice([*EXITS, 6]) if position > 5 else 6
            policy = Leaving(leave)
            [logits] = step(backbone, [text], policy, stay=[leave == 6]).logits
            answers[position] = leave, logits
            text.ids.append(token)
            check_blocks(backbone, [text])
        waiting = text.num_waiting
        assert waiting >= 2
        drained = step(backbone, [text], tails=[waiting + 1]).logits
    assert_close(own_logits(backbone, ids)[-waiting - 1 :], drained)
    for position, (depth, logits) in answers.items():
        expected = own_logits(backbone, ids) if depth == 6 else at_exit(backbone, depth, ids)
        assert_close(expected[position], logits)


class Leaving:
    """Asks at every exit, and leaves at one."""

    exits = EXITS
    bars = None

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def leave(self, probe: object) -> Tensor:
        """Return whether this is the exit."""
        return torch.full((len(probe.rows),), probe.depth == self.depth)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_mixed_depth_batch_is_each_text_alone(name: str) -> None:
    """Same tokens, depths and logits, with prompts that stay or leave."""
    backbone = owning(name)
    prompts = texts_of(backbone, [4, 9, 6, 6, 13, 3], seed=4)
    policy = Threshold("margin", tuple((depth, 0.3) for depth in EXITS))
    for exit_prompt in (False, True):
        results = []
        for batch_size in (1, 6):
            recorders = [Recorder() for _ in prompts]
            requests = [r.request(p, 12) for r, p in zip(recorders, prompts, strict=True)]
            with counted(backbone):
                tokens = decode(
                    backbone,
                    requests,
                    policy,
                    max_waiting=5,
                    exit_prompt=exit_prompt,
                    batch_size=batch_size,
                )
                results.append((collected(tokens, 6), [torch.stack(r.logits) for r in recorders]))
        (alone, alone_logits), (together, together_logits) = results
        assert alone == together
        assert len({depth for text in together[1] for depth in text}) >= 3
        for expected, actual in zip(alone_logits, together_logits, strict=True):
            assert_close(expected, actual)


def barred(backbone: AnyBackbone) -> list[tuple[Policy, Check]]:
    """Return policies that the kernels know, cut at the scores of real states: more leave later."""
    pairs = [(ids, 1) for ids in texts_of(backbone, [30, 20])]
    kept = record(backbone, pairs, EXITS, keep_hidden=True)
    assert kept.hidden is not None

    def cut(scores: Tensor) -> tuple[tuple[int, float], ...]:
        places = torch.tensor([[44, 42, 38, 34, 28]])
        cuts = scores.sort(0).values.gather(0, places)[0].tolist()
        return tuple(zip(EXITS, cuts, strict=True))

    made: list[tuple[Policy, Check]] = []
    for check in (FULL_HEAD, Shortlist(size=37)):
        scores = record(backbone, pairs, EXITS, check=check).scores
        made += [(Threshold(name, cut(scores[name])), check) for name in ("max_prob", "margin")]
    gates = fit_gate(kept)
    opening = [gates.score(kept.hidden[:, i], depth) for i, depth in enumerate(EXITS)]
    return [*made, (Gate(gates, cut(torch.stack(opening, 1))), FULL_HEAD)]


def stepped(
    backbone: AnyBackbone, policy: Policy, check: Check, kv: KV
) -> tuple[list[list[int]], list[int], list[Tensor], Meter]:
    """Return ids, depths, logits and work of three texts, some of which stay, at times all."""
    draw, depths, logits, before = random.Random(0), [], [], backbone.meter.copy()
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [5, 8, 3], seed=1)]
    look = check.look(backbone)
    with counted(backbone):
        for turn in range(12):
            stay = [turn % 4 == 0 or draw.random() < 0.3 for _ in texts]
            out = step(backbone, texts, policy, look=look, stay=stay, kv=kv)
            check_blocks(backbone, texts)
            depths += out.depths
            logits.append(out.logits)
            for text, token in zip(texts, out.logits.argmax(-1).tolist(), strict=True):
                text.ids.append(token)
    return [text.ids for text in texts], depths, logits, backbone.meter - before


@pytest.mark.parametrize("apart", [{}, {4: 1}, {2: 5}, {1: 2, 4: 5}], ids=str)
@pytest.mark.parametrize("kv", ["exact", "copy"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_screened_exit_that_owns_a_block_is_one_that_was_asked(
    apart: dict[int, int], kv: KV, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same, where exit 3 owns a block and others a block, a map or a head."""
    monkeypatch.setattr("offramp.fast.backbone._WORTH_SHARING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    each = one_of_each("llama")
    owned = {3: each[4], **{depth: each[which] for depth, which in apart.items()}}
    backbone, met = with_readouts("fast:llama", owned), set()
    for policy, check in barred(backbone):
        policies = Asked(policy), Told(policy)
        expected, actual = (stepped(backbone, one, check, kv) for one in policies)
        assert torch.equal(torch.cat(expected[2]), torch.cat(actual[2]))
        assert (expected[:2], expected[3]) == (actual[:2], actual[3])
        assert policies[1].asked < policies[0].asked
        met |= set(expected[1])
    assert met == {*EXITS, 6}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("signal", ["max_prob", "saturation"])
def test_replay_is_the_truth(name: str, signal: str) -> None:
    """A trace sees what the exits say, so its replay has the loop's depths and tokens."""
    backbone = owning(name)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    full, _ = collected(decode(backbone, [Request(p, 12) for p in prompts]), 3)
    first = record(backbone, [(p + t, len(p)) for p, t in zip(prompts, full, strict=True)], EXITS)
    cuts = first.scores[signal].sort(0).values
    middle = len(cuts) // 2
    levels = cuts[middle - 1 : middle + 1].mean(0).tolist()  # in gaps: rounding flips nothing
    if signal == "saturation":
        levels[0] = math.inf  # there is no exit before the first
    policy = Threshold(signal, tuple(zip(EXITS, levels, strict=True)))
    ids, depths = collected(
        decode(backbone, [Request(p, 12) for p in prompts], policy, max_waiting=4), 3
    )
    written = [(p + t, len(p)) for p, t in zip(prompts, ids, strict=True)]
    trace = record(backbone, written, EXITS, keep_hidden=True)
    for again in (None, backbone):
        replayed = replay(trace, policy, max_waiting=4, backbone=again)
        assert [d for text in depths for d in text] == replayed.depths.tolist()
        assert [token for text in ids for token in text] == replayed.chosen.tolist()
    assert len(set(replayed.depths.tolist())) >= 3


@pytest.mark.parametrize("name", EACH)
def test_replay_through_a_cheap_check_is_the_loop_through_it(name: str) -> None:
    """A check looks through the exit's map, block or head in both."""
    backbone = owning(name)
    check: Check = Shortlist(size=60)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    policy = Threshold("margin", tuple((depth, 0.31) for depth in EXITS))
    requests = [Request(p, 12) for p in prompts]
    look = check.look(backbone)
    ids, depths = collected(decode(backbone, requests, policy, look=look, max_waiting=4), 3)
    written = [(p + t, len(p)) for p, t in zip(prompts, ids, strict=True)]
    trace = record(backbone, written, EXITS, check=check)
    replayed = replay(trace, policy, max_waiting=4, check=check)
    assert [d for text in depths for d in text] == replayed.depths.tolist()
    assert len(set(replayed.depths.tolist())) >= 3


@pytest.mark.parametrize("name", BLOCKS)
def test_a_draft_has_no_consequence(name: str) -> None:
    """Drafts by every kind of readout, and one that skips layers behind an exit with a block."""
    backbone = owning(name)
    prompts = texts_of(backbone, [5, 9, 3, 7], seed=1)
    expected = [own_answer(backbone, prompt, 20) for prompt in prompts]
    assert max(len(set(answer)) for answer in expected) >= 8
    requests = [Request(prompt, 20) for prompt in prompts]
    skipping = Draft((0, 1, 3, 5), 3)
    for draft in (*(Draft(tuple(range(depth)), 3) for depth in (1, 2, 4, 5)), skipping):
        with counted(backbone):
            tokens = speculate(backbone, requests, draft, batch_size=3)
            assert expected == collected(tokens, 4)[0]


@pytest.mark.parametrize("name", ["llama", "fast:llama"])
def test_a_draft_speaks_through_its_exits_readout(name: str) -> None:
    """A block that is the next layer, at exit 5, is the full model: every proposal is right."""
    backbone = with_readouts(name, {5: ExitReadout("block", layer_of(name, 5))})
    [prompt] = texts_of(backbone, [5], seed=1)
    before = backbone.meter.copy()
    list(speculate(backbone, [Request(prompt, 21)], Draft((0, 1, 2, 3, 4), 4)))
    work = backbone.meter - before
    assert work.drafted == work.accepted == 16


# -- paths, copies, failures


@pytest.mark.parametrize("name", EACH)
def test_a_sub_model_of_the_first_layers_speaks_as_its_exit(name: str) -> None:
    """Depths count the model's layers, and a path that skips layers has no exit's readout."""
    backbone = owning(name)
    [prompt] = texts_of(backbone, [6], seed=3)
    for depth in EXITS:
        with counted(backbone):
            run = SubModel(layers=tuple(range(depth)))
            tokens = list(execute(backbone, [Request(prompt, 8)], run))
        ids = [token.id for token in tokens]
        assert at_exit(backbone, depth, prompt + ids)[5:-1].argmax(-1).tolist() == ids
        assert {depth} == {token.depth for token in tokens}
    for layers in ((0, 2, 4, 5), (1,), (0, 1, 2, 3, 5)):
        made = []
        for each in (opened(name), backbone):
            text = Text(list(prompt), each.open())
            made.append(step(each, [text], fixed(1) if layers[0] == 0 else FULL, layers=layers))
        if layers[0]:
            assert torch.equal(made[0].logits, made[1].logits)
    for each in (opened(name), backbone):
        text = Text(list(prompt), each.open())
        made.append(step(each, [text], fixed(4), layers=(0, 1, 2, 4, 5)))
    assert torch.equal(made[-2].logits, made[-1].logits)


@pytest.mark.parametrize("name", [*EACH, "gpt_oss"])
def test_a_copy_fills_the_deeper_blocks_with_the_exits_state(name: str) -> None:
    """Filled keys and values equal those of running the block on the state that left."""
    backbone = owning(name)
    [ids] = texts_of(backbone, [9], seed=7)
    texts = [Text(ids[:7], backbone.open()) for _ in range(2)]
    ways: tuple[KV, KV] = ("copy", "exact")
    for text, kv in zip(texts, ways, strict=True):
        step(backbone, [text], Leaving(6), stay=[True])
        text.ids.append(ids[7])
        with counted(backbone):
            step(backbone, [text], Leaving(2), kv=kv)
    assert lengths(texts[0].slot) == [8] * 8
    block, state = backbone.blocks[4], texts[1].waiting[2]
    backbone.run([block], state, [Span(texts[1], 7, 8)])
    for ours, theirs in zip(
        stored(texts[0].slot, block), stored(texts[1].slot, block), strict=True
    ):
        assert_close(theirs, ours)
    texts[0].ids.append(ids[8])
    assert step(backbone, texts[:1], Leaving(4), kv="copy").logits.isfinite().all()


def breaking(run: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Return ``run`` that does its work and raises, the calls-th time."""
    counter = itertools.count(1)

    def broken(*args: Any) -> Any:
        out = run(*args)
        if next(counter) == calls:
            raise ArithmeticError
        return out

    return broken


@pytest.mark.parametrize("kv", ["exact", "copy"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["llama", "fast:llama"])
def test_a_step_that_fails_leaves_the_blocks_as_they_were(
    name: str, calls: int, kv: KV, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call breaks, the texts hold what they held, and go on to the same logits."""
    backbone, made = owning(name), []
    within = "_run" if isinstance(backbone, FastBackbone) else "run"  # what every run goes through
    for fails in (False, True):
        texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [7, 5], seed=5)]
        step(backbone, texts, Leaving(6), stay=[True, True])
        for text, depth in zip(texts, (2, 1), strict=True):
            text.ids.append(11)
            step(backbone, [text], Leaving(depth), kv=kv)
            text.ids.append(12)
        if fails:
            before = [(text.done, text.blocks, lengths(text.slot)) for text in texts]
            for policy, count in ((Leaving(4), calls), (FULL, 1)):
                with monkeypatch.context() as patch:
                    patch.setattr(backbone, within, breaking(getattr(backbone, within), count))
                    with pytest.raises(ArithmeticError):
                        step(backbone, texts, policy, kv=kv, stay=[False, True])
            assert before == [(t.done, t.blocks, lengths(t.slot)) for t in texts]
        made.append(step(backbone, texts, Leaving(4), kv=kv).logits)
        check_blocks(backbone, texts)
    assert_close(*made)


@pytest.mark.parametrize("name", ["llama", "fast:llama"])
def test_a_block_without_a_texts_earlier_tokens_is_not_asked(name: str) -> None:
    """Begun, or gone on, without the exit: refused in a sentence, and the text is as it was."""
    backbone = owning(name)
    [ids] = texts_of(backbone, [6])
    text = Text(list(ids), backbone.open())
    step(backbone, [text])
    text.ids.append(5)
    for layers, policy in ((None, fixed(2)), (range(4), FULL)):
        with pytest.raises(UsageError, match=r"exit [24] has a block .* first token"):
            step(backbone, [text], policy, layers=layers)
    assert (text.done, lengths(text.slot)[:6]) == (6, [6] * 6)
    assert step(backbone, [text], fixed(1)).logits.isfinite().all()  # a map needs no past


# -- files, and what does not fit


def test_readouts_survive_the_disk(tmp_path: Path) -> None:
    """What is written is what is read, in any precision, and fingerprints tell readouts apart."""
    written = one_of_each("llama")
    written[4].tensors["mlp.up_proj.weight"] = written[4].tensors["mlp.up_proj.weight"].bfloat16()
    write_readouts(tmp_path / "r.safetensors", written)
    found = read_readouts(tmp_path / "r.safetensors")
    assert {d: r.kind for d, r in written.items()} == {d: r.kind for d, r in found.items()}
    for depth, readout in written.items():
        for name, tensor in readout.tensors.items():
            assert torch.equal(tensor, found[depth].tensors[name])
    same, plain = open_model(build("llama"), found), opened("llama")
    other = open_model(build("llama"), {5: found[5]})
    assert len({same.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert open_model(build("llama"), {}).fingerprint == plain.fingerprint


_W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"2.linear.weight": _W}, "'2.linear.weight', where readouts are named depth.kind.name"),
        ({"0.head.weight": _W}, "'0.head.weight'"),
        ({"99999.head.weight": _W}, "'99999.head.weight'"),
        ({"2.head": _W}, "'2.head'"),
        ({"2.head.weight": _W, "2.affine.bias": _W[0].clone()}, "two readouts of exit 2"),
        ({"2.head.weight": _W[0]}, r"exit 2 is no head: it holds \['weight'\]"),
        ({"2.affine.weight": _W}, r"exit 2 is no affine: it holds \['weight'\]"),
        ({"2.head.weight": _W.long()}, "not all finite numbers"),
        ({"2.head.weight": _W / 0}, "not all finite numbers"),
    ],
)
def test_a_file_that_holds_no_readouts_is_refused(
    tensors: dict[str, Tensor], complaint: str, tmp_path: Path
) -> None:
    """The first thing wrong is named."""
    save_file(tensors, tmp_path / "r.safetensors")
    with pytest.raises(OfframpError, match=complaint):
        read_readouts(tmp_path / "r.safetensors")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Absent, or something else."""
    (tmp_path / "text").write_text("readouts")
    for name, complaint in (("none", "cannot read"), ("text", "no safetensors file")):
        with pytest.raises(OfframpError, match=complaint):
            read_readouts(tmp_path / name)


@pytest.mark.parametrize(
    ("depth", "readout", "complaint"),
    [
        (6, ExitReadout("head", {"weight": _W}), "exit 6, and the model's exits are 1 to 5"),
        (2, ExitReadout("head", {"weight": _W}), r"its weight is \[4, 4\], .* \[160, 32\]"),
        (2, ExitReadout("affine", {"weight": _W, "bias": _W[0]}), r"its bias is \[4\], .* \[32\]"),
        (2, ExitReadout("block", {"bias": _W}), r"its bias is \[4, 4\], .* none"),
        (2, ExitReadout("block", {}), "its input_layernorm.weight is missing"),
    ],
)
def test_a_readout_that_does_not_fit_is_refused(
    depth: int, readout: ExitReadout, complaint: str
) -> None:
    """The exit, the tensor, its size and the model's are named."""
    with pytest.raises(OfframpError, match=complaint):
        open_model(build("llama"), {depth: readout})


def test_the_backbone_of_fixed_shapes_refuses_them() -> None:
    """It says so, and the generic one is there."""
    generic = owning("llama")
    assert isinstance(generic, HFBackbone)
    with pytest.raises(UnsupportedModelError, match="its exits own readouts"):
        open_graphs(generic)
