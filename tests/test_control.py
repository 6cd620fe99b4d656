"""Control: whatever it chooses no token changes, a bad draft costs little, a good one is used."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp import control
from offramp.control import PURSE, SHARE, Control, controlled, remembered
from offramp.cost import speculation_ratio
from offramp.decode import decode
from offramp.errors import UsageError
from offramp.plan import Plan, execute
from offramp.request import Request
from offramp.runs import Adapt
from offramp.sample import Sampling
from offramp.speculate import Draft, Round, speculate
from tests.test_timing import LAYERS, SHAPE, Clockwork, Costs, constants_of
from tests.tools import collected, counted, opened, own_answer, texts_of

LAW = settings(max_examples=10, deadline=None)
FEW = tuple(Draft(layers, k) for layers in ((0,), (0, 1, 2)) for k in (1, 2, 4))
READING = Costs(layer=(1e-2, 1e-4), head=(1e-3, 1e-5), step=1e-4)
"""Weights take the time: drafts that are right pay."""
MULTIPLYING = Costs(layer=(1e-5, 1e-2), head=(1e-5, 1e-2), step=1e-4)
"""Rows take the time: no draft can pay."""


class Dice:
    """A chooser that throws dice, and hears what came of it."""

    clock = staticmethod(lambda: 0.0)

    def __init__(self, drafts: tuple[Draft, ...], seed: int) -> None:
        self.drafts, self.random, self.heard = drafts, random.Random(seed), list[Round]()

    def choose(self, texts: int, reading: int) -> Draft | None:
        """Return any draft, or none."""
        return self.random.choice([None, *self.drafts])

    def learn(self, done: Round) -> None:
        """Remember it."""
        self.heard.append(done)


# -- law 3: a draft has no consequence


@pytest.mark.parametrize("family", ["llama", "fast:gemma2", "graph:llama"])
def test_whatever_is_chosen_the_tokens_are_those_of_generate(family: str) -> None:
    """Depths, skipped layers, lengths and no draft in turn, in batches; greedy and sampled."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 9, 3, 7], seed=1)
    expected = [own_answer(backbone, prompt, 20) for prompt in prompts]
    assert max(len(set(answer)) for answer in expected) >= 8
    drafts = (Draft((0, 1), 3), Draft((0, 1, 2, 3, 4), 5), Draft((0, 1, 3, 5), 2))
    for batch_size in (1, 3):
        dice = Dice(drafts, batch_size)
        with counted(backbone):
            tokens = speculate(
                backbone, [Request(p, 20) for p in prompts], dice, batch_size=batch_size
            )
            assert expected == collected(tokens, 4)[0]
        assert {None, *drafts} == {done.draft for done in dice.heard}
    requests = [Request(p, 16, Sampling(1.0, 30, seed=3).chooser()) for p in prompts]
    expected, _ = collected(decode(backbone, requests), 4)
    assert expected == collected(speculate(backbone, requests, Dice(drafts, 9), batch_size=2), 4)[0]


def test_a_controlled_plan_writes_what_plain_decoding_writes() -> None:
    """Through the plan, on a real clock, with a short head."""
    backbone = opened("fast:llama")
    requests = [Request(prompt, 60) for prompt in texts_of(backbone, [5, 9, 3], seed=1)]
    expected, _ = collected(decode(backbone, requests), 3)
    plan = Plan.model_validate(
        {
            "run": {
                "kind": "adapt",
                "drafts": ((0, 1, 2, 3, 4), (0, 2)),
                "head": {"kind": "shortlist", "size": 40},
            }
        }
    )
    assert plan.lossless
    plan.check(backbone)
    assert expected == collected(execute(backbone, requests, plan.run, batch_size=2), 3)[0]


@pytest.mark.parametrize("kind", ["llama", "fast:llama"])
def test_what_was_learnt_lasts_from_call_to_call(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What drafts may lose at first they lose once on a backbone, not in every answer."""

    def drafted() -> int:
        before = backbone.meter.copy()
        requests = [Request(prompt, 12) for prompt in texts_of(backbone, [5], seed=1)]
        list(execute(backbone, requests, plan))
        return (backbone.meter - before).drafted

    plan = Adapt(drafts=((0,), (0, 1, 2, 3, 4)))
    backbone = opened(kind)
    monkeypatch.setattr(control, "speculation_ratio", lambda *_, **__: 0.5)  # worth a try
    learnt = remembered(backbone, plan.drafters)
    assert drafted() > 0
    learnt.purse = -1e9  # lost by calls before
    assert drafted() == 0


def test_rounds_say_what_was_done() -> None:
    """Texts that read, tokens drafted and confirmed of each, and all tokens written."""
    backbone = opened("llama")
    dice = Dice((Draft((0, 1, 2, 3, 4), 4),), 1)
    before = backbone.meter.copy()
    requests = [Request(prompt, 20) for prompt in texts_of(backbone, [5, 3], seed=1)]
    tokens = list(speculate(backbone, requests, dice, batch_size=2))
    work = backbone.meter - before
    assert [done.reading for done in dice.heard] == [2] + [0] * (len(dice.heard) - 1)
    pairs = [pair for done in dice.heard for pair in done.confirmed]
    assert (work.drafted, work.accepted) == tuple(map(sum, zip(*pairs, strict=True)))
    assert len(pairs) + work.accepted == len(tokens) == 40


# -- on a clock of its own


def patterned(work: Costs, right: Callable[[int], bool]) -> Clockwork:
    """A clockwork backbone whose i-th drafted token is right where the function says so."""
    backbone = Clockwork(work)
    count = iter(range(10**9))
    backbone.token = lambda depth: int(depth < LAYERS and not right(next(count)))
    return backbone


def run(backbone: Clockwork, drafts: tuple[Draft, ...], count: int) -> tuple[float, Control, int]:
    """Seconds of so many controlled tokens, what controlled them, and how many were drafted."""
    chooser = controlled(backbone, drafts, clock=backbone.clock)
    written = list(speculate(backbone, [Request([0], count)], chooser))
    assert [0] * count == [token.id for token in written]
    return backbone.now, chooser, backbone.meter.drafted


def plain(work: Costs, count: int) -> float:
    """The same of plain decoding."""
    backbone = Clockwork(work)
    list(decode(backbone, [Request([0], count)]))
    return backbone.now


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was measured: predictions on clockwork are right."""
    known = {Clockwork: lambda backbone: constants_of(backbone.costs)}
    monkeypatch.setattr(control, "known", lambda b: known.get(type(b), lambda _: None)(b))


works = st.builds(
    Costs,
    layer=st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-5, 1e-2)),
    head=st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-5, 1e-2)),
    step=st.floats(0, 1e-3),
)


@LAW
@given(works, st.integers(0, 99), st.floats(0, 1), st.integers(1, 200))
def test_nothing_that_drafts_do_costs_more_than_the_share(
    work: Costs, seed: int, chance: float, change: int
) -> None:
    """Right or wrong, by chance or in stretches that lure: time stays within purse and share."""
    dice = random.Random(seed)
    rights = [dice.random() < (chance if i // change % 2 else 1 - chance) for i in range(2_000)]
    backbone = patterned(work, rights.__getitem__)
    count = 300
    took, _, _ = run(backbone, FEW, count)
    least = plain(work, count)
    longest = max(draft.tokens for draft in FEW)  # the last round's draft is cut by the text's end
    assert took * (1 - SHARE) <= least * (1 + (PURSE + longest) / count) * (1 + 1e-9)


@pytest.mark.parametrize("drafts", [FEW, (Draft((0, 2, 4), 4), Draft((0, 1, 2, 3), 3))])
def test_a_draft_that_cannot_pay_is_not_tried(drafts: tuple[Draft, ...]) -> None:
    """The price alone forbids it, so not even the purse is spent."""
    took, _, drafted = run(patterned(MULTIPLYING, lambda _: True), drafts, 200)
    assert drafted == 0
    assert took == pytest.approx(plain(MULTIPLYING, 200))


def test_a_draft_that_is_never_right_is_dropped_and_tried_again_seldom() -> None:
    """Once warm: less than the share, and not nothing, for texts change."""
    wrong = patterned(READING, lambda _: False)
    long, _, drafted = run(wrong, FEW, 2500)
    short, _, early = run(patterned(READING, lambda _: False), FEW, 1000)
    warm = (long - short) / (plain(READING, 2500) - plain(READING, 1000))
    assert 1 < warm < 1 + 1.1 * SHARE
    assert drafted > early > 0


def test_a_draft_that_is_always_right_is_used() -> None:
    """The cheapest one: nearly all tokens come by it, at nearly the best price there is."""
    took, _, drafted = run(patterned(READING, lambda _: True), FEW, 1000)
    best = min(
        speculation_ratio(SHAPE, len(d.layers), d.tokens, 1.0, constants_of(READING)) for d in FEW
    )
    assert best < 0.5
    assert took <= plain(READING, 1000) * (best + 0.05)
    assert drafted > 600


def test_a_draft_that_turns_good_is_found() -> None:
    """Wrong for long, then right: it pays in the end."""
    work = READING
    turned = patterned(work, lambda i: i >= 60)
    took, _, _ = run(turned, FEW, 3000)
    assert took < 0.7 * plain(work, 3000)


def test_the_same_clock_gives_the_same_choices() -> None:
    """Control draws no lots."""
    runs = [run(patterned(READING, lambda i: i % 3 > 0), FEW, 300) for _ in range(2)]
    assert runs[0][::2] == runs[1][::2]
    assert runs[0][2] > 0


def test_measured_times_overrule_predicted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that drafts are cheap where they are dear, it finds out, and loses little more."""
    monkeypatch.setattr(control, "known", lambda _: constants_of(READING))
    took, chooser, drafted = run(patterned(MULTIPLYING, lambda _: True), FEW, 1000)
    assert 0 < drafted < 200
    assert took < 1.05 * plain(MULTIPLYING, 1000)
    assert chooser.purse <= PURSE


def test_batches_have_times_of_their_own() -> None:
    """One choice for all texts of a round; a batch of another size begins with a plain round."""
    backbone = patterned(READING, lambda _: True)
    chooser = controlled(backbone, FEW, clock=backbone.clock)
    heard: list[Round] = []
    learn = chooser.learn

    def hear(done: Round) -> None:
        heard.append(done)
        learn(done)

    chooser.learn = hear  # type: ignore[method-assign]
    requests = [Request([0], count) for count in (40, 80, 120)]
    list(speculate(backbone, requests, chooser, batch_size=3))
    firsts: dict[int, Draft | None] = {}
    for done in heard:
        if not done.reading:
            firsts.setdefault(done.texts, done.draft)
    assert firsts == {3: None, 2: None, 1: None}
    assert any(done.draft and done.texts == 3 for done in heard)
    assert all(done.draft is None for done in heard if done.reading)


def test_what_cannot_be_chosen_from_is_refused() -> None:
    """No draft, or one that the model lacks."""
    for drafts, complaint in (((), "no draft"), ((Draft((0, 9), 1),), "not all of the 5")):
        with pytest.raises(UsageError, match=complaint):
            controlled(Clockwork(READING), drafts)
    assert [d.tokens for d in Adapt(drafts=((0,),), tokens=6).drafters] == [1, 2, 4, 6]
    backbone = Clockwork(READING)
    backbone.blocks = {2: LAYERS}
    controlled(backbone, (Draft((0, 1), 1), Draft((0, 1), 2)))
    with pytest.raises(UsageError, match="exit 2 owns a block"):
        controlled(backbone, (Draft((0, 1), 1), Draft((0,), 2)))
