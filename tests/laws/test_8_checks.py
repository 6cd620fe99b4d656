"""Law 8. A check decides, the full head chooses: cheap checks look at less, and change no token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.checks import (
    FULL_HEAD,
    Check,
    FullHead,
    Head,
    LowRank,
    Refined,
    Shortlist,
    Tokens,
    read_tokens,
)
from offramp.cost import flops, weight_bytes
from offramp.decode import decode
from offramp.errors import OfframpError, UnsupportedModelError, UsageError
from offramp.fast.heads import refined_head
from offramp.fast.memory import Arena
from offramp.fast.open import open_fast
from offramp.fast.pack import Format, pack_roughly
from offramp.gate import Gate, fit_gate
from offramp.heads import low_rank
from offramp.hf.open import open_model
from offramp.meter import Meter
from offramp.plan import Plan, execute
from offramp.policy import FULL, Policy, Threshold, fixed
from offramp.probe import Probe, Readout
from offramp.request import Request, Token
from offramp.runs import Exit, Path, Run, Speculate
from offramp.sample import Sampling
from offramp.signals import find, score
from offramp.step import KV, step
from offramp.trace import record, replay
from tests.families import build
from tests.tools import (
    BOTH,
    FAST,
    GRAPH,
    TEN,
    AnyBackbone,
    Asked,
    Recorder,
    Told,
    assert_close,
    collected,
    counted,
    generic,
    opened,
    texts_of,
)

EXITS = (1, 2, 4, 5)
SIGNALS = ("max_prob", "margin", "entropy", "patience")


def states(backbone: Backbone, rows: int = 7) -> Tensor:
    """Return random states, of another size in every row."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, backbone.shape.hidden_size, generator=generator)
    return drawn * torch.arange(1, rows + 1)[:, None]


def whole(backbone: Backbone) -> list[Check]:
    """Return cheap checks that leave nothing out."""
    shape = backbone.shape
    every = tuple(range(shape.vocab_size))
    return [Shortlist(size=shape.vocab_size), Tokens(tokens=every), LowRank(rank=shape.hidden_size)]


def cheap(backbone: Backbone) -> list[Check]:
    """Return checks that do, of sizes that fill no block of a kernel; made, so hooks see them."""
    scattered = Tokens(tokens=tuple(range(3, backbone.shape.vocab_size, 7)))
    checks: list[Check] = [Shortlist(size=37), scattered, LowRank(rank=5)]
    for check in checks:
        check.look(backbone)
    return checks


def cuts(backbone: Backbone, check: Check, name: str, seed: int = 0) -> Threshold:
    """Return thresholds between the scores of real states, so that rounding flips no decision."""
    texts = [(ids, 1) for ids in texts_of(backbone, [30, 20], seed)]
    scores = record(backbone, texts, EXITS, check=check).scores[name]
    pairs = []
    for depth, column in zip(EXITS, scores.T, strict=True):
        values = column.unique()
        middle = len(values) // 2
        cut = (values[middle] + values[max(middle - 1, 0)]).item() / 2
        pairs.append((depth, min(max(cut, find(name).low), find(name).high)))
    return Threshold(name, tuple(pairs))


def never(value: float) -> Threshold:
    """Return a policy that a random model's tokens do not meet."""
    return Threshold("max_prob", tuple((depth, value) for depth in EXITS))


def written(
    backbone: AnyBackbone, policy: Threshold, check: Check
) -> tuple[list[list[int]], list[list[int]]]:
    """Return tokens and depths of three texts, counted: law 6."""
    requests = [Recorder().request(ids, 12) for ids in texts_of(backbone, [5, 8, 3], seed=1)]
    look = check.look(backbone)
    with counted(backbone):
        return collected(decode(backbone, requests, policy, look=look, max_waiting=4), 3)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_a_shortlist_has_the_full_heads_logits(family: str) -> None:
    """At its entries, in their order, soft caps, scales and biases included."""
    backbone = opened(family)
    hidden = states(backbone)
    tokens = torch.tensor([backbone.shape.vocab_size - 1, *range(17), 40])
    full = backbone.readout(hidden, 2)
    assert_close(full[:, tokens], backbone.shortlist(tokens)(hidden, 2))
    assert torch.equal(full, backbone.readout(hidden, 2))  # the model's own head is back


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_a_head_of_full_rank_is_the_full_head(family: str) -> None:
    """And every rank less is farther away, for states as the last norm makes them."""
    backbone = opened(family)
    hidden = torch.cat([states(backbone, 64), -states(backbone, 64)])
    full = backbone.readout(hidden, 2)
    width = backbone.shape.hidden_size
    off = [(backbone.low_rank(r)(hidden, 2) - full).square().sum() for r in (5, 20, width)]
    assert off[0] > off[1] > off[2]
    assert_close(full, backbone.low_rank(width)(hidden, 2))


@pytest.mark.parametrize("family", FAST + GRAPH)
def test_both_backbones_approximate_alike(family: str) -> None:
    """The generic one finds the gains of a norm it does not know."""
    fast, slow = opened(family), generic(family.split(":")[1])
    hidden = states(fast)
    assert_close(slow.low_rank(5)(hidden, 2), fast.low_rank(5)(hidden, 2))


def test_a_low_rank_is_the_nearest_one() -> None:
    """As far from the head, for widths of these gains, as the singular values left out."""
    generator = torch.Generator().manual_seed(0)
    weight, gains = torch.randn(50, 12, generator=generator), torch.randn(12, generator=generator)
    values = torch.linalg.svdvals(weight * gains)
    for rank in (1, 5, 11):
        up, down = low_rank(weight, gains, rank)
        assert (up.shape, down.shape) == ((50, rank), (rank, 12))
        off = ((up @ down - weight) * gains).norm().item()
        assert off == pytest.approx(values[rank:].norm().item(), rel=1e-3)


def test_a_heads_bias_is_in_every_check() -> None:
    """On both backbones; no family of the ten has one."""
    model = build("llama")
    size, width = model.get_output_embeddings().weight.shape
    model.lm_head = torch.nn.Linear(width, size)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        model.lm_head.bias.copy_(torch.linspace(-3, 3, size))
    slow = open_model(model)
    for backbone in (slow, open_fast(slow)):
        hidden, tokens = states(backbone), torch.arange(3, size, 5)
        full = backbone.readout(hidden, 2)
        assert_close(full[:, tokens], backbone.shortlist(tokens)(hidden, 2))
        assert_close(full, backbone.low_rank(width)(hidden, 2))


def test_some_rows_of_a_probe_see_what_they_saw() -> None:
    """Whether it was looked at before they were taken, or is after."""
    backbone = opened("llama")
    look = backbone.shortlist(torch.arange(9))
    probe = Probe(2, 6, states(backbone), backbone.readout, look=look)
    before = probe.take([4, 1]).seen
    assert_close(probe.seen[[4, 1]], before)
    assert_close(before, probe.take([4, 1]).seen)


def test_figures_price_a_check_by_its_own_weights(tiny: offramp.Model) -> None:
    """Rows at the weights of the shortlist, not of the head, and not for nothing."""
    run = offramp.Exit(signal="margin", thresholds={2: 0.1}, check=Shortlist(size=50))
    figures = tiny.generate("hi", plan=offramp.Plan(run=run), max_new_tokens=9).figures
    shape, told = tiny.backbone.shape, figures.as_dict()
    assert figures.work.check_rows > 0
    weights = 50 * shape.hidden_size
    for name, price in (("flops_ratio", flops), ("bytes_ratio", weight_bytes)):
        whole = price(figures.baseline, shape)
        assert told[name] == pytest.approx(price(figures.work, shape, weights) / whole)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_cheap_check_that_leaves_nothing_out_decides_as_the_full_head(
    family: str, name: str
) -> None:
    """The whole vocabulary, or full rank: the same scores, depths and tokens."""
    backbone = opened(family)
    policy = cuts(backbone, FULL_HEAD, name)
    expected = written(backbone, policy, FULL_HEAD)
    assert len({depth for text in expected[1] for depth in text}) >= 2
    hidden = states(backbone)
    for check in whole(backbone):
        probes = [
            Probe(2, 6, hidden, backbone.readout, look=look)
            for look in (None, check.look(backbone))
        ]
        torch.testing.assert_close(*(score(p, name) for p in probes), rtol=0, atol=1e-4)
        assert expected == written(backbone, policy, check)


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
def test_the_token_that_leaves_is_the_full_heads(family: str) -> None:
    """Whatever the check saw; the head runs once per token, and not for rows that stay."""
    backbone = opened(family)
    for check in cheap(backbone):
        policy = cuts(backbone, check, "max_prob")
        before = backbone.meter.copy()
        ids, depths = written(backbone, policy, check)
        work = backbone.meter - before
        assert len({depth for text in depths for depth in text}) >= 2
        assert work.head_rows == sum(map(len, ids))
        # Every text's first token stays, unasked; so does each fourth that waits.
        assert 0 < work.check_rows <= len(EXITS) * work.head_rows
        for prompt, text, deep in zip(
            texts_of(backbone, [5, 8, 3], seed=1), ids, depths, strict=True
        ):
            trace = record(backbone, [(prompt + text, len(prompt))], EXITS)
            columns = torch.tensor([(*EXITS, 6).index(depth) for depth in deep])
            assert text == trace.chosen.gather(1, columns[:, None])[:, 0].tolist()


@pytest.mark.parametrize("family", BOTH)
def test_what_is_asked_is_what_is_counted(family: str) -> None:
    """One text, no exit taken: a check per token and exit, priced apart from the head."""
    backbone = opened(family)
    [prompt] = texts_of(backbone, [5])
    for check in cheap(backbone):
        before, look = backbone.meter.copy(), check.look(backbone)
        with counted(backbone):
            list(decode(backbone, [Recorder().request(prompt, 6)], never(1.0), look=look))
        work = backbone.meter - before
        assert (work.check_passes, work.check_rows) == (5 * len(EXITS), 5 * len(EXITS))
        assert (work.head_passes, work.head_rows) == (6, 6)


def screens(backbone: Backbone) -> list[tuple[Policy, Check]]:
    """Return every signal that the kernels know, through every head, cut *at* a state's score."""
    ids = texts_of(backbone, [30, 20])
    kept = record(backbone, [(text, 1) for text in ids], EXITS, keep_hidden=True)
    gates = fit_gate(kept)
    assert kept.hidden is not None
    pairs = []
    for check in (FULL_HEAD, *cheap(backbone)):
        scores = record(backbone, [(text, 1) for text in ids], EXITS, check=check).scores
        for name in ("max_prob", "margin"):
            cut = scores[name].sort(0).values[30].tolist()
            pairs.append((Threshold(name, tuple(zip(EXITS, cut, strict=True))), check))
    opening = [gates.score(kept.hidden[:, i], depth) for i, depth in enumerate(EXITS)]
    cut = [scores.sort().values[30].item() for scores in opening]
    return [*pairs, (Gate(gates, tuple(zip(EXITS, cut, strict=True))), FULL_HEAD)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["fp32", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_screened_exit_is_one_that_was_asked(
    family: str, form: Format, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same tokens, depths, logits and work, and fewer questions."""
    monkeypatch.setattr("offramp.fast.backbone._WORTH_SHARING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    backbone = open_fast(generic(family), form)
    short = Shortlist(size=37)
    ways: list[tuple[Policy, Check, Readout | None]]
    ways = [(*screen, None) for screen in screens(backbone)]
    ways += [  # what chooses is what is seen, or a gate sees no head
        (policy, FULL_HEAD, short.choose(backbone, ()))
        for policy, check, _ in ways
        if check == short or isinstance(policy, Gate)
    ]
    for policy, check, head in ways:
        found, policies = [], (Asked(policy), Told(policy))
        for one in policies:
            recorder, before = Recorder(), backbone.meter.copy()
            prompts = texts_of(backbone, [5, 8, 3], seed=1)
            requests = [recorder.request(ids, 12) for ids in prompts]
            with counted(backbone):
                look = check.look(backbone)
                tokens = list(
                    decode(backbone, requests, one, look=look, exit_head=head, max_waiting=4)
                )
            found.append((tokens, recorder.logits, backbone.meter - before))
        (expected, logits, work), (actual, same, again) = found
        assert len({token.depth for token in expected}) >= 2
        assert (expected, work) == (actual, again)
        assert all(torch.equal(a, b) for a, b in zip(logits, same, strict=True))
        assert policies[1].asked < policies[0].asked


@pytest.mark.parametrize("rows", [250, 300])
def test_a_prompt_that_leaves_is_asked_as_well_however_long(rows: int) -> None:
    """More rows than go through the kernels together, too."""
    backbone = open_fast(generic("llama"))
    [ids] = texts_of(backbone, [rows], seed=3)
    for policy, check in screens(backbone):
        found = []
        for one in (Asked(policy), Told(policy)):
            text, before = Text(list(ids), backbone.open()), backbone.meter.copy()
            with counted(backbone):
                out = step(backbone, [text], one, look=check.look(backbone))
            found.append((out.depths, out.logits.tolist(), backbone.meter - before))
        assert found[0] == found[1]


def test_what_is_no_number_is_shown_to_the_policy() -> None:
    """It is not certain to stay; and a threshold out of reach is never asked about."""
    backbone = open_fast(generic("llama"))
    [ids] = texts_of(backbone, [5])
    for value, states, asked in ((1.0, 1.0, 0), (math.inf, 1.0, 0), (1.0, math.nan, len(EXITS))):
        text, policy = Text(list(ids), backbone.open()), Told(never(value))
        step(backbone, [text])
        text.ids.append(7)
        with pytest.MonkeyPatch.context() as patch:
            row = torch.full((1, backbone.shape.hidden_size), states)
            patch.setattr(backbone, "embed", lambda _spans, row=row: row)
            step(backbone, [text], policy)
        assert policy.asked == asked


@pytest.mark.parametrize("kv", ["exact", "copy"])
@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("name", SIGNALS)
def test_replay_through_a_check_is_the_loop_through_it(family: str, name: str, kv: str) -> None:
    """The trace's table and its kept states give the loop's depths; a copy runs, approximately."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    for check in cheap(backbone):
        policy = cuts(backbone, check, name, seed=1)
        requests = [Recorder().request(prompt, 12) for prompt in prompts]
        look = check.look(backbone)
        with counted(backbone):
            tokens = decode(backbone, requests, policy, look=look, kv=kv, max_waiting=4)  # type: ignore[arg-type]
            ids, depths = collected(tokens, 3)
        assert len({depth for text in depths for depth in text}) >= 2
        if kv == "copy":
            continue
        pairs = [(p + text, len(p)) for p, text in zip(prompts, ids, strict=True)]
        kept = record(backbone, pairs, EXITS, keep_hidden=True)
        replays = [
            replay(record(backbone, pairs, EXITS, check=check), policy, max_waiting=4, check=check),
            replay(kept, policy, max_waiting=4, check=check, backbone=backbone),
        ]
        for replayed in replays:
            assert [depth for text in depths for depth in text] == replayed.depths.tolist()
            assert [token for text in ids for token in text] == replayed.chosen.tolist()


def test_a_table_of_another_check_is_refused() -> None:
    """Its scores were seen through something else; kept states need the model."""
    backbone = opened("llama")
    pairs = [(texts_of(backbone, [12])[0], 1)]
    shortlist, low_rank = Shortlist(size=37), LowRank(rank=5)
    trace = record(backbone, pairs, EXITS, check=shortlist, keep_hidden=True)
    policy = Threshold("max_prob", ((2, 0.5),))
    for other in (FULL_HEAD, low_rank, Shortlist(size=36)):
        with pytest.raises(UsageError, match=f"seen by the check shortlist:37, not {other};"):
            replay(trace, policy, check=other)
        replay(trace, policy, check=other, backbone=backbone)


def test_a_head_that_logits_do_not_come_out_of_is_refused() -> None:
    """A forward that uses the weights elsewhere would be checked by the wrong numbers."""
    model = build("llama")
    backbone = open_model(model)
    own = model.forward

    def tied(*args: object, **kwargs: object) -> object:
        output = own(*args, **kwargs)
        output.logits = output.logits + 1e-2 * output.logits.sum(-1, keepdim=True)
        return output

    model.forward = tied
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be checked by"):
        backbone.shortlist(torch.arange(9))
    model.forward = own
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no plain matrix"):
        backbone.low_rank(3)
    model.lm_head = head
    assert backbone.low_rank(3)(states(backbone), 2).isfinite().all()


def test_a_failing_readout_leaves_the_models_own_head() -> None:
    """An exception while a small head stands in restores the large one."""
    backbone = opened("llama")
    look = backbone.shortlist(torch.arange(9))
    head = backbone.model.get_output_embeddings()
    with pytest.raises(RuntimeError):
        look(torch.zeros(2, backbone.shape.hidden_size + 1), 2)
    assert backbone.model.get_output_embeddings() is head


LISTS = [Shortlist(size=37), Tokens(tokens=(3, 5, *range(40, 150, 3)))]


def listed(head: Shortlist | Tokens) -> set[int]:
    """Return the entries that a short head has of itself."""
    return set(head.tokens) if isinstance(head, Tokens) else set(range(head.size))


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("head", LISTS, ids=str)
@pytest.mark.parametrize("end", [9, 150])
def test_a_short_head_chooses_the_best_of_its_entries(
    family: str, head: Shortlist | Tokens, end: int
) -> None:
    """A sub-model's tokens are the best of the list and the end tokens, wherever those are."""
    backbone = opened(family)
    layers = (0, 2, 3)
    allowed = torch.tensor(sorted({*listed(head), end}))
    [ids] = texts_of(backbone, [8], seed=2)
    text, expected = Text(list(ids), backbone.open()), []
    for _ in range(10):
        logits = step(backbone, [text], layers=layers).logits[0, allowed]
        expected.append(int(allowed[logits.argmax()]))
        text.ids.append(expected[-1])
    stop = expected.index(end) + 1 if end in expected else 10
    assert len(set(expected)) >= 3
    request = Request(list(ids), 10, eos=frozenset({end}))
    run = Path(layers=layers, head=head)
    head.choose(backbone, {end})  # made, so hooks see it
    with counted(backbone):
        written = [token.id for token in execute(backbone, [request], run)]
    assert written == expected[:stop]


@pytest.mark.parametrize("family", TEN + FAST + GRAPH)
@pytest.mark.parametrize("head", LISTS, ids=str)
def test_a_short_heads_logits_stand_at_their_ids(family: str, head: Shortlist | Tokens) -> None:
    """The full head's at the entries and the end tokens, and no chance for any other."""
    backbone = opened(family)
    hidden, ends = states(backbone), {9, 150}
    readout = head.choose(backbone, ends)
    assert readout is not None
    logits, full = readout(hidden, 2), backbone.readout(hidden, 2)
    allowed = sorted(listed(head) | ends)
    assert_close(full[:, allowed], logits[:, allowed])
    others = sorted(set(range(logits.shape[1])) - set(allowed))
    assert others
    assert (logits[:, others] == -torch.inf).all()


@pytest.mark.parametrize("family", BOTH)
def test_a_head_of_every_entry_is_the_full_head(family: str) -> None:
    """The same tokens as without it."""
    backbone = opened(family)
    requests = [Request(ids, 12) for ids in texts_of(backbone, [5, 8, 3], seed=1)]
    layers, size = (0, 1, 4), backbone.shape.vocab_size
    heads: list[Head] = [FULL_HEAD, Shortlist(size=size), Tokens(tokens=tuple(range(size)))]
    plain, *headed = (
        collected(execute(backbone, requests, Path(layers=layers, head=head)), 3)[0]
        for head in heads
    )
    assert headed == [plain, plain]


def test_a_head_beyond_the_vocabulary_is_refused() -> None:
    """Before anything runs."""
    backbone = generic("llama")
    size = backbone.shape.vocab_size
    cases: list[tuple[Head, str]] = [
        (Shortlist(size=size + 1), "longer than the vocabulary"),
        (Tokens(tokens=(0, 3, size)), f"holds the token {size}, .* ends at {size - 1}"),
    ]
    for head, complaint in cases:
        with pytest.raises(UsageError, match=complaint):
            Path(layers=(0, 1), head=head).must_fit(backbone)
        with pytest.raises(UsageError, match=complaint):
            head.must_fit(backbone.shape)


@pytest.mark.parametrize("family", BOTH)
def test_a_short_head_takes_every_kind_of_draw(family: str) -> None:
    """Penalties for tokens that it does not have change nothing, and filters find what there is."""
    backbone = opened(family)
    head = Tokens(tokens=(3, 5, 8, 21))
    [ids] = texts_of(backbone, [40])
    assert max(ids) > 21
    for sampling in (
        Sampling(repetition_penalty=3.0),
        Sampling(temperature=2.0, top_k=3, top_p=0.9, repetition_penalty=1.3),
    ):
        request = Request(ids, 12, sampling.chooser(), eos=frozenset({21}))
        written = [t.id for t in execute(backbone, [request], Path(layers=(0, 1), head=head))]
        assert set(written) <= set(head.tokens)


LIST = "[5, 2, 9, 2]"


def test_a_list_is_read_in_any_order_and_either_form(tmp_path: FilePath) -> None:
    """As JSON or as words; what comes of it is ascending, each once."""
    for text in (LIST, "5 2\n9\t2\n", " [5,2,\n9]"):
        (tmp_path / "tokens").write_text(text)
        assert read_tokens(tmp_path / "tokens") == Tokens(tokens=(2, 5, 9))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"[7]", b"7 7", b"[1, -2]", b"1 -2", b"[1, 2.0]", b"1 2.0", b"[1, true]"),
        *(b'["1", "2"]', b"[[1], 2]", b"[1, 2", b"{}", b"[" * 100_000, b"\xff\xfe", b"one two"),
        *(b"1 4294967296", b"9" * 5000 + b" 1", b" ".join(b"%d" % i for i in range(2**18 + 1))),
        *(b"1 2" + b" " * 2**23,),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_what_is_no_list_of_tokens_is_refused(tmp_path: FilePath, content: bytes) -> None:
    """In one sentence about the file, that says what to write."""
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(OfframpError, match=f"^{path} is no list of 2 to 262144 token ids: write"):
        read_tokens(path)


def test_lists_of_one_length_are_not_one_check() -> None:
    """A trace tells them apart."""
    backbone = opened("llama")
    one, other = Tokens(tokens=(3, 5, 8)), Tokens(tokens=(3, 5, 9))
    trace = record(backbone, [(texts_of(backbone, [12])[0], 1)], EXITS, check=one)
    policy = Threshold("max_prob", ((2, 0.5),))
    replay(trace, policy, check=one)
    with pytest.raises(UsageError, match=r"seen by the check tokens:3#\w+, not tokens:3#"):
        replay(trace, policy, check=other)


@pytest.mark.parametrize("family", BOTH)
def test_a_head_of_the_paths_end_reads_no_row_that_left(family: str) -> None:
    """Rows share a pass over a head only where it is the same head."""
    backbone = opened(family)
    short = Shortlist(size=backbone.shape.vocab_size).look(backbone)
    texts = [Text(ids, backbone.open()) for ids in texts_of(backbone, [5, 8], seed=1)]
    with counted(backbone):
        before = backbone.meter.copy()
        step(backbone, texts, fixed(2), head=short, stay=[False, True])
        work = backbone.meter - before
    assert (work.head_rows, work.check_rows) == (1, 1)


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("head", LISTS, ids=str)
@pytest.mark.parametrize("kv", ["exact", "copy"])
def test_a_short_head_of_exits_chooses_what_leaves_and_nothing_else(
    family: str, head: Shortlist | Tokens, kv: KV
) -> None:
    """The best of its entries where a token leaves; the full head's choice where it stays."""
    backbone = opened(family)
    allowed = torch.tensor(sorted({*listed(head), 150}))
    prompts = texts_of(backbone, [8, 5], seed=2)
    run = Exit(signal="fixed", thresholds={3: 1.0}, kv=kv, max_waiting=4, head=head)
    head.choose(backbone, {150})  # made, so hooks see it
    requests = [Request(list(ids), 9, eos=frozenset({150})) for ids in prompts]
    with counted(backbone):
        tokens = list(execute(backbone, requests, run))
    for index, ids in enumerate(prompts):
        text = Text(list(ids), backbone.open())
        for token in (token for token in tokens if token.index == index):
            policy = FULL if token.depth == backbone.shape.num_layers else fixed(3)
            [logits] = step(backbone, [text], policy, kv=kv).logits
            if token.depth == 3:
                assert token.id == int(allowed[logits[allowed].argmax()])
            else:
                assert token.id == int(logits.argmax())
            text.ids.append(token.id)
    assert {token.depth for token in tokens} == {3, backbone.shape.num_layers}


@pytest.mark.parametrize("family", [*TEN, *FAST, *GRAPH])
def test_the_largest_logits_of_a_refined_head_are_the_full_head_s(family: str) -> None:
    """Whatever norm, bias, scale and soft cap a family has; its rough ones stay below them."""
    backbone = opened(family)
    shape = backbone.shape
    draw = torch.Generator().manual_seed(5)
    hidden = 3 * torch.randn(400, shape.hidden_size, generator=draw)
    with counted(backbone):
        expected = backbone.readout(hidden, shape.num_layers)
        found = backbone.refined()(hidden, shape.num_layers)
    assert found.shape == expected.shape
    best = expected.argmax(-1, keepdim=True)
    assert torch.equal(found.argmax(-1, keepdim=True), best)
    assert_close(expected.gather(1, best), found.gather(1, best))


@pytest.mark.parametrize("form", ["int4", "int8", "bf16"])
def test_a_rough_look_settles_nothing_by_itself(form: Format) -> None:
    """Of 4 bits alone many a choice would be wrong; settled, none is, whatever the layers hold."""
    model = generic("llama")
    backbone = open_fast(model, form)
    rough = open_fast(model, "int4").low_rank(backbone.shape.hidden_size)
    draw = torch.Generator().manual_seed(6)
    hidden = torch.randn(2000, backbone.shape.hidden_size, generator=draw)
    depth = backbone.shape.num_layers
    exact = model.readout(hidden, depth).argmax(-1)
    assert torch.equal(backbone.refined()(hidden, depth).argmax(-1), exact)
    assert (rough(hidden, depth).argmax(-1) != exact).sum() > 20


@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("loud", [1.0, 300.0])
def test_heads_of_codes_choose_as_the_weights_do(form: Format, loud: float) -> None:
    """Plain and refined, though a few channels are far above the others and rounding is theirs."""
    model = generic("llama")
    backbone = open_fast(model, form)
    draw = torch.Generator().manual_seed(6)
    hidden = torch.randn(2000, backbone.shape.hidden_size, generator=draw)
    hidden[:, [3, 21]] *= loud
    depth = backbone.shape.num_layers
    exact = model.readout(hidden, depth).argmax(-1)
    for read in (backbone.readout, backbone.refined()):
        assert torch.equal(read(hidden, depth).argmax(-1), exact)


def test_how_far_a_rough_head_is_off_goes_by_the_last_norm_s_gains() -> None:
    """Rounding a wide group is off by more, and gains can make that group most of a state."""
    draw = torch.Generator().manual_seed(8)
    weight = torch.randn(3000, 128, generator=draw)
    weight[:, 0] *= 12  # so the steps of the first group are wide
    gains = torch.ones(128)
    gains[0], gains[1:32] = 0.01, 10.0
    states = gains * torch.randn(400, 128, generator=draw)
    _, off = pack_roughly(weight, gains.square() / gains.square().sum())
    groups = weight.view(3000, 4, 32)
    step = ((groups.amax(-1) - groups.amin(-1)) / 15)[..., None]
    low = groups.amin(-1, keepdim=True)
    rounded = (((groups - low) / step).round() * step + low).flatten(1)
    real = (states @ (rounded - weight).T / states.norm(dim=-1, keepdim=True)).square().mean(0)
    assert (real / off).mean().item() == pytest.approx(1, rel=0.1)
    head = nn.Linear(128, 3000, bias=False)
    head.weight = nn.Parameter(weight)
    assert bool((refined_head(head, gains, Arena()).kept[-1] > 5 * off.sqrt()).all())


def test_no_number_hides_no_other() -> None:
    """A row of the head that is no number is none among the logits, and leaves others as exact."""
    model = generic("llama")
    backbone = open_fast(model, "int4")
    refined = backbone.refined()
    hidden = states(backbone, 40)
    depth = backbone.shape.num_layers
    expected = refined(hidden, depth)
    errors = refined.shared.kept[-1]  # type: ignore[attr-defined]
    lost = [i for i in range(0, len(errors), 3) if i not in set(expected.argmax(-1).tolist())]
    errors[lost] = math.nan
    found = refined(hidden, depth)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", [*BOTH, "fast:granite"])
def test_a_refined_head_serves_who_looks_at_the_largest_logit_alone(family: str) -> None:
    """Who samples, or has a penalty, is given the full head's logits, and so is who is scored."""
    backbone = opened(family)
    prompts = texts_of(backbone, [8, 5], seed=2)
    exits = {"signal": "max_prob", "thresholds": {2: 0.02, 4: 0.02}}
    for kind, facts in ((Path, {"layers": (0, 1, 3, 5)}), (Exit, exits)):
        seen = []
        for head in (Refined(), FULL_HEAD):
            run, asked = kind(**facts, head=head), Recorder()
            tokens = execute(backbone, [asked.request(list(ids), 8) for ids in prompts], run)
            seen.append((collected(tokens, 2), torch.stack(asked.logits)))
        assert seen[0][0] == seen[1][0]
        assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("head", [FULL_HEAD, Refined()], ids=str)
def test_who_looked_by_the_head_that_chooses_need_not_look_again(
    family: str, head: FullHead | Refined
) -> None:
    backbone = opened(family)
    prompts = texts_of(backbone, [8, 5], seed=2)
    run = Exit(signal="max_prob", thresholds={2: 0.004, 4: 0.004}, check=Refined(), head=head)
    run.head.choose(backbone, ()), run.sees.look(backbone)  # made: hooks see them
    before = backbone.meter.copy()
    with counted(backbone):
        tokens = list(execute(backbone, _asked(prompts), run))
    work = backbone.meter - before
    assert {token.depth for token in tokens} >= {2, backbone.shape.num_layers}
    left = sum(token.depth < backbone.shape.num_layers for token in tokens)
    looks = sum(1 if token.depth == 2 else 2 for token in tokens) - 2 * len(prompts)
    one = family == "llama" or head == Refined()  # rough and full are one head here, or both rough
    reads = looks if one else looks + left
    assert work.head_rows + work.check_rows == reads + len(tokens) - left


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("kv", ["exact", "copy"])
def test_plans_may_choose_by_a_refined_head(family: str, kv: KV) -> None:
    """A sub-model, an exit, a look: tokens and depths are those by the full head."""
    backbone = opened(family)
    prompts = texts_of(backbone, [8, 5], seed=2)
    runs: list[tuple[Run, Run]] = [
        (
            Exit(signal="max_prob", thresholds={2: 0.02, 4: 0.02}, kv=kv, head=Refined()),
            Exit(signal="max_prob", thresholds={2: 0.02, 4: 0.02}, kv=kv),
        ),
        (Path(layers=(0, 1, 3, 5), head=Refined()), Path(layers=(0, 1, 3, 5))),
        (Speculate(draft=(0, 1), head=Refined()), Speculate(draft=(0, 1))),
    ]
    for refined, plain in runs:
        found, expected = (
            [(t.index, t.id, t.depth) for t in execute(backbone, _asked(prompts), run)]
            for run in (refined, plain)
        )
        assert found == expected
        assert Plan.model_validate_json(Plan(run=refined).model_dump_json()).run == refined


def _asked(prompts: Sequence[list[int]]) -> list[Request]:
    return [Request(list(ids), 8) for ids in prompts]


@pytest.mark.parametrize("family", BOTH)
def test_what_a_short_head_draws_is_a_function_of_the_seed_alone(family: str) -> None:
    """Whoever else is in the batch, and however many entries the head that chose for them has."""
    backbone = opened(family)
    head = Tokens(tokens=(3, 9, 40, 41, 77))
    run = Exit(signal="margin", thresholds={2: 0.2, 4: 0.1}, check=FULL_HEAD, head=head)
    prompts = texts_of(backbone, [8, 5, 3], seed=4)
    draws = [Sampling(temperature=2.0, seed=seed).chooser() for seed in range(3)]

    def written(which: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        requests = [Request(list(prompts[i]), 8, choose=draws[i]) for i in which]
        return collected(execute(backbone, requests, run), len(which))

    together, depths = written(range(3))
    assert {depth for text in depths for depth in text} == {2, 4, 6}
    assert [written([i])[0] for i in range(3)] == [[text] for text in together]


@pytest.mark.parametrize("family", BOTH)
def test_what_an_exit_chooses_by_is_what_a_full_check_sees(family: str) -> None:
    """So leaving by a short head costs one look at it; a third head would be one too many."""
    backbone = opened(family)
    head = Tokens(tokens=(3, 9, 40, 41, 77))
    plans = [
        Exit(signal="margin", thresholds={2: 0.2, 4: 0.1}, check=check, head=head)
        for check in (FULL_HEAD, head)
    ]
    prompts = texts_of(backbone, [8, 5, 3], seed=4)

    def written(run: Exit) -> tuple[list[Token], Meter]:
        before = backbone.meter.copy()
        tokens = list(execute(backbone, [Request(list(ids), 8) for ids in prompts], run))
        return tokens, backbone.meter - before

    (first, work), (second, same) = written(plans[0]), written(plans[1])
    assert first == second
    assert work == same
    stayed = sum(token.depth == backbone.shape.num_layers for token in first)
    assert 0 < stayed < len(first)
    assert work.head_rows == stayed, "the full head reads only what runs to the end"
    looks = sum(1 if token.depth == 2 else 2 for token in first) - 2 * len(prompts)
    assert work.check_rows == looks, "what was seen is not read again to choose by"
    wrong = Plan(run=plans[0].model_copy(update={"check": Shortlist(size=9)}))
    with pytest.raises(UsageError, match="second cheap head"):
        wrong.check(backbone)


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("check", [FULL_HEAD, Tokens(tokens=(3, 9, 40, 41, 77))], ids=str)
def test_a_replay_with_a_short_head_is_the_loop_with_it(family: str, check: Check) -> None:
    """The trace knows what it would choose, ends of texts among it, and is no other head's."""
    backbone, end = opened(family), 150
    head = Tokens(tokens=(3, 9, 40, 41, 77))
    policy = Threshold("margin", ((2, 0.2), (4, 0.1)))
    run = Exit(signal="margin", thresholds=dict(policy.thresholds), check=check, head=head)
    pairs, depths = [], []
    for ids in texts_of(backbone, [8, 5, 3], seed=4):
        request = Request(list(ids), 10, eos=frozenset({end}))
        tokens = list(execute(backbone, [request], run))
        pairs.append((ids + [token.id for token in tokens], len(ids)))
        depths += [token.depth for token in tokens]
    trace = record(backbone, pairs, (2, 4), check=check, head=head, ends={end})
    replayed = replay(trace, policy, check=check, head=head)
    assert {2, backbone.shape.num_layers} <= set(depths)
    assert replayed.depths.tolist() == depths
    assert replayed.chosen.tolist() == [token for ids, given in pairs for token in ids[given:]]
    with pytest.raises(UsageError, match="chose by the head full, not tokens:5#"):
        replay(record(backbone, pairs, (2, 4), check=head), policy, check=head, head=head)
