"""Laws of calibration: valid p-values, exact replays, certificates that hold, broken ones not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.calibrate.bounds import (
    BOUNDS,
    Floats,
    PValue,
    betting,
    binomial,
    fewest,
    hoeffding_bentkus,
    more_needed,
)
from offramp.calibrate.certify import (
    CONFORMAL,
    METHODS,
    CannotCertifyError,
    Goal,
    certify,
    conformal,
    must_be_enough,
    path_of,
    refusal,
    split,
)
from offramp.calibrate.replays import Replays, replay_all
from offramp.calibrate.risks import RISKS
from offramp.calibrate.settings import costs, grid, refined, safe_to_cheap, seen
from offramp.calibrate.verify import noise, verify
from offramp.checks import FULL_HEAD
from offramp.errors import UsageError
from offramp.policy import Threshold
from offramp.trace import Trace, replay
from tests.calibration import altered, made_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mapie.risk_control import control_fwer
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value, get_r_hat_plus

LAW = settings(max_examples=40, deadline=None)
EVERY = pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)

_DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, int], float], Floats]] = {
    "coin": lambda g, size, mean: (g.random(size) < mean).astype(float),
    "spread": lambda g, size, mean: g.beta(2 * mean, 2 * (1 - mean), size),
    "almost constant": lambda g, size, mean: np.clip(mean + g.uniform(-0.05, 0.05, size), 0, 1),
}


def price(exits: Sequence[int], shares: Sequence[float]) -> float:
    """A cheap world: leaving saves, checking costs nothing."""
    return 1 - sum(share * (1 - depth / 6) for depth, share in zip(exits, shares, strict=True))


@cache
def replays(texts: int = 400, seed: int = 0) -> Replays:
    """All settings of a made-up trace."""
    trace = made_up(texts, seed=seed)
    scores = seen(trace, "max_prob", trace.exits, FULL_HEAD)
    return replay_all(trace, scores, trace.exits, grid(scores)[::3])


@pytest.mark.parametrize(
    ("bound", "kind"),
    [(bound, kind) for bound in BOUNDS.values() for kind in _DRAWS if bound is not binomial]
    + [(binomial, "coin")],
)
@pytest.mark.parametrize(("n", "alpha"), [(20, 0.2), (100, 0.1), (100, 0.5)])
def test_p_values_are_valid(bound: PValue, kind: str, n: int, alpha: float) -> None:
    """With a mean of alpha, p <= u at most as often as u and chance allow."""
    p = bound(_DRAWS[kind](np.random.default_rng(1), (4000, n), alpha), alpha)
    assert ((p >= 0) & (p <= 1)).all()
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (p <= level).sum() <= noise(4000, level)


@EVERY
def test_p_values_have_power(bound: PValue) -> None:
    """Far below alpha they are small, more so with more sequences; none has p above 1."""
    for n, most in ((60, 0.1), (400, 1e-5)):
        assert bound(np.zeros(n), 0.1) < most
    assert bound(np.ones(50), 0.1) > 0.9


@EVERY
@LAW
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60), st.data())
def test_p_values_are_monotone(bound: PValue, drawn: list[float], data: st.DataObject) -> None:
    """A loss more never makes the p-value smaller, nor does a smaller alpha."""
    losses, alpha = np.array(drawn), data.draw(st.floats(0.02, 0.9))
    worse = losses.copy()
    worse[data.draw(st.integers(0, len(losses) - 1))] = 1.0
    slack = 1e-9
    if bound is not betting:  # its bets follow the order, so single losses may help a later bet
        assert bound(losses, alpha) <= bound(worse, alpha) + slack
    assert bound(losses, alpha) <= bound(losses, alpha * 0.9) + slack


def test_the_binomial_bound_refuses_shares() -> None:
    """It is exact for coins, and wrong for anything else."""
    with pytest.raises(UsageError, match="losses of 0 and 1"):
        binomial(np.array([0.0, 0.5]), 0.1)


@LAW
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=80),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.5),
)
def test_hoeffding_bentkus_and_fixed_sequences_are_mapies(
    drawn: list[float], alpha: float, delta: float
) -> None:
    """P-values to rounding, and what passes along a sequence."""
    losses = np.array([drawn, [x / 2 for x in drawn], [0.0] * len(drawn)])
    # MAPIE rounds n * mean up as it comes: a sum that is whole but for the last bit differs by one.
    n = losses.shape[1]
    losses = losses[np.ceil(n * losses.mean(1)) == np.ceil(losses.sum(1) - 1e-9)]
    theirs = compute_hoeffding_bentkus_p_value(losses.mean(1), losses.shape[1], alpha)[:, 0]
    ours = hoeffding_bentkus(losses, alpha)
    assert ours == pytest.approx(np.minimum(theirs, 1), rel=1e-6, abs=1e-12)
    passed = control_fwer(ours, delta, "fixed_sequence")
    assert len(passed) == int(np.cumprod(ours <= delta).sum())


def test_conformal_risk_control_is_mapies() -> None:
    """For losses that grow along the path; for others it is the bound of what they grew to."""
    losses = np.random.default_rng(0).random((9, 50))
    grown = np.maximum.accumulate(losses, 0)
    _, theirs = get_r_hat_plus(grown.T, np.arange(9), "crc", None, None, None)
    assert conformal(grown) == pytest.approx(theirs)
    assert (conformal(losses) == conformal(grown)).all()


@EVERY
@pytest.mark.parametrize(("wrong", "alpha"), [(0, 0.05), (1, 0.1), (5, 0.3)])
def test_more_sequences_would_do(bound: PValue, wrong: int, alpha: float) -> None:
    """As many more as it says, at this rate; and fewer by a tenth would not."""
    losses = np.array([1.0] * wrong + [0.0] * (25 - wrong))
    more = more_needed(losses, alpha, 0.05, bound)
    assert more is not None
    assert bound(np.resize(losses, 25 + more), alpha) <= 0.05
    assert bound(np.resize(losses, int((25 + more) * 0.9)), alpha) > 0.05
    assert more_needed(np.ones(25), alpha, 0.05, bound) is None
    assert bound(np.zeros(fewest(alpha, 0.05, bound)), alpha) <= 0.05


@LAW
@given(
    st.integers(0, 2**16),
    st.integers(1, 8),
    st.booleans(),
    st.lists(st.tuples(*[st.floats(0, 1, width=32) | st.just(math.inf)] * 2), min_size=1),
)
def test_the_fast_replay_is_replay(
    seed: int, max_waiting: int, exit_prompt: bool, thresholds: list[tuple[float, float]]
) -> None:
    """Losses and exits of every setting are those of ``replay``, sequence by sequence."""
    trace = made_up(6, seed=seed)
    rules = {"max_waiting": max_waiting, "exit_prompt": exit_prompt}
    scores = seen(trace, "max_prob", trace.exits, FULL_HEAD)
    settings = torch.tensor(thresholds)
    fast = replay_all(trace, scores, trace.exits, settings, **rules)  # type: ignore[arg-type]
    for m, pair in enumerate(settings.tolist()):
        policy = Threshold("max_prob", tuple(zip(trace.exits, pair, strict=True)))
        slow = replay(trace, policy, **rules)  # type: ignore[arg-type]
        row = 0
        for s, count in enumerate(trace.rows):
            part = slice(row, row + count)
            differs = slow.chosen[part] != trace.chosen[part, -1]
            more = (slow.loss[part] - trace.loss[part, -1]).mean().item()
            expected = {
                "disagreement": differs.float().mean().item(),
                "divergence": float(differs.any()),
                "loss": min(max(more, 0.0), 1.0),
                "error": float((slow.chosen[part] != trace.targets[part]).any()),
            }
            assert expected.keys() == RISKS.keys()
            for name, value in expected.items():
                assert fast.losses[name][m, s] == pytest.approx(value, abs=1e-5)
            left = [(slow.depths[part] == depth).sum().item() for depth in trace.exits]
            assert fast.left[m, :, s].tolist() == left
            row += count


@pytest.mark.parametrize("exits", [1, 2, 3, 4, 5, 6])
def test_there_are_a_thousand_settings(exits: int) -> None:
    """For any number of exits, all different, none that never leaves; each quantile is a score."""
    scores = torch.rand(3000, exits, generator=torch.Generator().manual_seed(0))
    settings = grid(scores)
    assert 1000 <= len(settings) <= 5000
    assert len(settings.unique(dim=0)) == len(settings)
    assert not settings.isinf().all(1).any()
    assert not grid(scores, keep_exits=True).isinf().any()
    for k in range(exits):
        assert set(settings[:, k].tolist()) <= {*scores[:, k].tolist(), math.inf}


def test_a_refined_path_goes_through_the_coarse_one() -> None:
    """Its settings are there, all others lie between two neighbours, exit by exit."""
    scores = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    ordered = scores.sort(0).values
    first = torch.tensor([torch.inf, ordered[400, 1].item()])
    last = torch.tensor([ordered[90, 0].item(), ordered[7, 1].item()])
    finer = refined(torch.stack([first, last]), scores)
    assert len(finer) == 5
    for corner in (first, last):
        assert (finer == corner).all(1).any()
    assert ((finer >= torch.minimum(first, last)) & (finer <= torch.maximum(first, last))).all()
    assert (finer.sort(0, descending=True).values == finer.flip(0)).all()


@LAW
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.floats(0, 2)), min_size=1))
def test_a_path_goes_from_safe_to_cheap(points: list[tuple[float, float]]) -> None:
    """Risk never falls, cost always does; nothing left out is both safer and cheaper."""
    risk, cost = np.array(points).T
    path = safe_to_cheap(risk, cost)
    assert (np.diff(risk[path]) >= 0).all()
    assert (np.diff(cost[path]) < 0).all()
    assert risk[path[0]] == risk.min()
    for r, c in points:
        assert ((risk[path] <= r) & (cost[path] <= c)).any()


def test_parts_do_not_see_each_other() -> None:
    """Every sequence is in one part; the path does not change with the tested sequences."""
    parts = split(101, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(101))
    all_of = replays()
    order, test, _ = split(400, 0)
    changed = {name: losses.copy() for name, losses in all_of.losses.items()}
    for losses in changed.values():
        losses[:, test] = 1 - losses[:, test]
    other = Replays(all_of.exits, all_of.thresholds, changed, all_of.left, all_of.rows)
    goal = Goal()
    cost = costs(all_of, order, price)
    paths = [path_of(one, cost, order, goal).tolist() for one in (all_of, other)]
    assert paths[0] == paths[1]


def test_the_cheapest_setting_that_passes_is_taken() -> None:
    """All before it on the path pass, the next does not."""
    all_of, (order, test, _) = replays(), split(400, 0)
    for method in METHODS:
        goal = Goal("divergence", alpha=0.4, method=method)
        cost = costs(all_of, order, price)
        found = certify(all_of, cost, order, test, goal)
        assert found is not None
        path = path_of(all_of, cost, order, goal)
        losses = all_of.losses["divergence"][path][:, test]
        if method == CONFORMAL:
            passes = conformal(losses) <= goal.alpha
        else:
            passes = BOUNDS[method](losses, goal.alpha) <= goal.delta
        assert path[found.tested - 1] == found.setting
        assert passes[: found.tested].all()
        assert not passes[found.tested]
        assert found.risk < goal.alpha
        assert found.cost < 1


def plug_in(losses: Floats, alpha: float) -> Floats:
    """A broken bound: takes the mean at its word."""
    p: Floats = (losses.mean(-1) > alpha).astype(float)
    return p


def test_certificates_hold_and_a_broken_bound_is_caught() -> None:
    """For each risk and bound violations stay within delta and chance; by the same count."""
    alphas = {"disagreement": 0.15, "divergence": 0.4, "loss": 0.3, "error": 0.995}
    goals = [
        Goal(risk, alpha, 0.1, method)
        for risk, alpha in alphas.items()
        for method in METHODS
        if method != "binomial" or RISKS[risk].binary
    ]
    broken = Goal("divergence", 0.4)
    tries = [*((goal, None) for goal in goals), (broken, plug_in)]
    *done, caught = verify(replays(), tries, price, repeats=60)
    for goal, one in zip(goals, done, strict=True):
        assert one.holds, goal
        assert one.mean_risk <= goal.alpha
        assert goal.risk == "error" or (one.certified > 30 and one.mean_cost < 1)
    assert caught.violations > caught.allowed
    assert not caught.holds


def test_the_binomial_bound_is_for_coins() -> None:
    """Asked for another risk, it is refused before anything is run."""
    with pytest.raises(UsageError, match="0 or 1 per sequence"):
        Goal("disagreement", method="binomial")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_levels_lie_between_0_and_1(value: float) -> None:
    """Both of them, both ends excluded."""
    with pytest.raises(UsageError, match="alpha must lie"):
        Goal(alpha=value)
    with pytest.raises(UsageError, match="delta must lie"):
        Goal(delta=value)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_sequences_are_refused_with_their_number(method: str) -> None:
    """With that number, all of them without loss, it is certified."""
    goal = Goal("divergence", 0.05, 0.05, method)
    with pytest.raises(CannotCertifyError, match=r"need (\d+)") as refused:
        must_be_enough(17, goal)
    needed = int(str(refused.value).split(" need ")[1].split()[0])
    must_be_enough(needed, goal)
    losses = np.zeros((1, len(split(needed, 0).test)))
    level = goal.alpha if method == CONFORMAL else goal.delta
    values = conformal(losses) if method == CONFORMAL else BOUNDS[method](losses, goal.alpha)
    assert values <= level


def _agreeing(trace: Trace, agree: bool) -> Trace:
    chosen = trace.chosen[:, -1:].repeat(1, trace.chosen.shape[1])
    if not agree:
        chosen[:, :-1] += 1
    return altered(trace, chosen=chosen)


@pytest.mark.parametrize("agree", [True, False])
def test_all_agree_and_none_agree(agree: bool) -> None:
    """The first certifies leaving as often as possible; the second says that nothing would help."""
    trace = _agreeing(made_up(200, most=3, seed=1), agree)
    scores = seen(trace, "max_prob", trace.exits, FULL_HEAD)
    all_of = replay_all(trace, scores, trace.exits, grid(scores), exit_prompt=True)
    order, test, _ = split(200, 0)
    goal = Goal("disagreement", 0.001 if not agree else 0.1)
    cost = costs(all_of, order, price)
    found = certify(all_of, cost, order, test, goal)
    if agree:
        assert found is not None
        assert found.cost == cost.min()
        assert found.risk == 0
    else:
        assert found is None
        said = str(refusal(all_of, cost, order, test, goal))
        assert said.startswith("cannot certify")
        assert "sequences would" in said


def test_signals_that_say_nothing_are_refused() -> None:
    """Constant or NaN; and exits or checks that the trace lacks."""
    trace = made_up(5)
    with pytest.raises(UsageError, match="the same for every token"):
        seen(trace, "fixed", (2, 4), FULL_HEAD)
    with pytest.raises(UsageError, match="lacks \\[3\\]"):
        seen(trace, "max_prob", (2, 3), FULL_HEAD)
    with pytest.raises(UsageError, match="unknown signal"):
        seen(trace, "nonsense", (2, 4), FULL_HEAD)
    trace.scores["max_prob"][3, 1] = math.nan
    with pytest.raises(UsageError, match="NaN on 1 tokens"):
        seen(trace, "max_prob", (2, 4), FULL_HEAD)
