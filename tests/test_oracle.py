"""The oracle is brute force, its nulls are what theory says, and bad tables are refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import offramp
from offramp.allocate import oracle
from offramp.allocate.fit import explained, fit_router, price_of
from offramp.allocate.oracle import solve
from offramp.allocate.report import default_budgets, report
from offramp.allocate.score import Score, by_running, features_of, from_trace
from offramp.allocate.table import ScoreTable, load_table
from offramp.batch import Text
from offramp.errors import OfframpError, UsageError
from offramp.plan import ModelId, read_plan
from offramp.router import choices
from offramp.runs import Exit, Full, Path
from offramp.sample import Sampling
from offramp.step import step
from tests.test_cli import Shell, shell
from tests.tools import opened, texts_of

__all__ = ["shell"]

PAPER = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
"""Weights of 4, 8, 12 and 24 layers (Glavas et al. 2024, the official code): budget / 4."""
MODEL = ModelId(name="tiny", num_layers=24, fingerprint="this one")
LAW = settings(max_examples=30, deadline=None)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores ``[N, P]``, ties among them, and ascending costs."""
    texts, ways = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(-3, 3))
    rows = st.lists(values, min_size=ways, max_size=ways)
    costs = draw(st.lists(st.integers(25, 3000), min_size=ways, max_size=ways))
    scores = draw(st.lists(rows, min_size=texts, max_size=texts))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(sorted(costs)).double() / 100


def brute(scores: Tensor, costs: Tensor, budget: float) -> float:
    """The best mean score over every allocation within the budget."""
    texts, ways = scores.shape
    return max(
        scores[range(texts), list(one)].mean().item()
        for one in itertools.product(range(ways), repeat=texts)
        if costs[list(one)].sum().item() <= budget * texts + 1e-7
    )


def toy(texts: int = 60, ways: int = 4, *, seed: int = 0, learnable: float = 0.0) -> ScoreTable:
    """A table of noise; of a pattern that its features tell, where ``learnable`` is positive."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(texts, 1 + 3 + 4, generator=draw)
    scores = torch.rand(texts, ways, generator=draw).double() * 0.1
    scores += learnable * features[:, 1:2].double() * torch.arange(ways)
    depths = [24 * (k + 1) // ways for k in range(ways)]
    return ScoreTable(
        model=MODEL,
        score="loss",
        teacher_forced=True,
        runs=(*(Path(layers=tuple(range(d))) for d in depths[:-1]), Full()),
        costs=torch.tensor(depths, dtype=torch.float64),
        scores=scores,
        halves=torch.stack((scores, scores)),
        null=torch.rand(texts, ways, generator=draw).double(),
        features=features,
        exits=(3,),
    )


# -- the oracle


@LAW
@given(tables(), st.floats(0, 1))
def test_the_oracle_is_brute_force(table: tuple[Tensor, Tensor], share: float) -> None:
    """At any budget, for any scores and costs; its allocation is worth and costs what it says."""
    scores, costs = table
    budget = round(costs[0].item() + share * (costs[-1] - costs[0]).item(), 4)
    solved = solve(scores, costs)
    expected = brute(scores, costs, budget)
    assert solved.value(budget) == pytest.approx(expected, abs=1e-7)
    ways = solved.allocation(budget)
    assert scores.gather(1, ways[:, None]).mean().item() == pytest.approx(expected, abs=1e-7)
    assert costs[ways].mean().item() <= budget + 1e-7


@LAW
@given(tables())
def test_the_sweep_never_falls_and_ends_at_the_weak_oracle(table: tuple[Tensor, Tensor]) -> None:
    """More budget is never worse; the cheapest way alone begins it, each text's best ends it."""
    scores, costs = table
    solved = solve(scores, costs)
    assert (solved.best.diff() >= -1e-7).all()
    assert solved.value(costs[-1].item()) == pytest.approx(scores.amax(1).mean().item(), abs=1e-7)
    assert oracle.weak(scores)[-1].item() == pytest.approx(scores.amax(1).mean().item())
    for p in range(1, len(costs) + 1):
        expected = sum(max(row[:p]) for row in scores.tolist()) / len(scores)
        assert oracle.weak(scores)[p - 1].item() == pytest.approx(expected)
    free = solved.value(costs[0].item())
    assert free >= scores[:, 0].mean().item() - 1e-7


@LAW
@given(tables())
def test_the_smallest_budget_is_the_first_that_is_enough(table: tuple[Tensor, Tensor]) -> None:
    """Enough is the full model's mean; a grain less is not."""
    scores, costs = table
    solved, full = solve(scores, costs), scores[:, -1].mean().item()
    smallest = solved.smallest_budget(full)
    assert solved.value(smallest) >= full - 1e-7
    grain = solved.unit / 100 / len(scores)
    if smallest > costs[0].item() + 1e-9:
        assert brute(scores, costs, smallest - grain) < full
    assert math.isnan(solved.smallest_budget(scores.amax().item() + 1))


@LAW
@given(tables())
def test_the_relaxation_bounds_the_oracle(table: tuple[Tensor, Tensor]) -> None:
    """Its steps, in order, are worth the exact optimum or up to one step more, at every budget."""
    scores, costs = table
    solved = solve(scores, costs)
    _, gains, prices = oracle.steps(scores, costs)
    most = gains.max().item() if len(gains) else 0.0
    for budget, best in zip(solved.budgets.tolist()[::97], solved.best.tolist()[::97], strict=True):
        left, value = (budget - costs[0].item()) * len(scores), scores[:, 0].sum().item()
        for gain, price in zip(gains.tolist(), prices.tolist(), strict=True):
            share = min(left / price, 1.0) if price > 0 else 1.0
            value, left = value + share * gain, left - share * price
        assert best - 1e-6 <= value <= best + most + 1e-6


def test_the_interval_is_of_resampled_texts() -> None:
    """Each sample's budget is that of the table with those texts, up to one step of one text."""
    table = toy(40, seed=3)
    found = oracle.bootstrap_budgets(table.scores, table.costs, samples=70, seed=5)
    draw = torch.Generator().manual_seed(5)
    index = torch.cat([torch.randint(40, (n, 40), generator=draw) for n in (64, 6)])
    step_of_one = (table.costs[-1] - table.costs[0]).item() / 40
    for rows, value in zip(index, found.tolist(), strict=True):
        sample = table.scores[rows]
        exact = solve(sample, table.costs).smallest_budget(sample[:, -1].mean().item())
        assert value - 1e-6 <= exact <= value + step_of_one + 1e-6
    constant = torch.zeros(30, 3).double()
    assert (oracle.bootstrap_budgets(constant, PAPER[:3], samples=5) == 1).all()


@LAW
@given(tables(), st.floats(0, 1))
def test_fixed_depth_is_the_best_mix_that_looks_at_no_text(
    table: tuple[Tensor, Tensor], share: float
) -> None:
    """Within budget, no worse than any single way that is, and never above the oracle's bound."""
    scores, costs = table
    budget = costs[0].item() + share * (costs[-1] - costs[0]).item()
    shares, mean = oracle.fixed(scores, costs, budget)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares * costs).sum().item() <= budget + 1e-6
    assert (scores @ shares).mean().item() == pytest.approx(mean, abs=1e-7)
    for way in (costs <= budget).nonzero()[:, 0].tolist():
        assert mean >= scores[:, way].mean().item() - 1e-7
    assert mean <= oracle.weak(scores)[-1].item() + 1e-7


# -- the paper


def test_the_papers_own_figures() -> None:
    """What follows from its printed constants: the sweep, 23.3 %, the gain, who runs 4 layers."""
    constant, best = [0.2493, 0.3085, 0.3208, 0.3418], [0.2493, 0.3341, 0.3688, 0.3964]
    index = torch.arange(80)
    columns = [torch.full((80,), constant[0]).double()]
    for p in (1, 2, 3):  # a table with these means and these means of maxima: half rise, half fall
        top = torch.stack(columns).amax(0)
        up, down = best[p] - best[p - 1], best[p] - constant[p]
        columns.append(top + torch.where(index >> p & 1 == 1, 2 * up, -2 * down))
    scores = torch.stack(columns, 1)
    assert scores.mean(0).tolist() == pytest.approx(constant)
    assert oracle.weak(scores).tolist() == pytest.approx(best)
    solved = solve(scores, PAPER)
    assert solved.value(6) - constant[3] == pytest.approx(0.0546)
    # beta from 1.00 to 5.99 by .01: 4 to 24 layers, 500 points, none of them lost to rounding
    sweep = [solved.value(k / 100) for k in range(100, 600)]
    assert len(sweep) == 500
    assert sweep == sorted(sweep)
    assert round(1.40 / 6, 3) == 0.233
    assert round(1.40 * 4, 1) == 5.6
    for seed in range(20):  # whatever the scores: at 1.40 at least 60 % of texts run 4 layers
        drawn = torch.rand(200, 4, generator=torch.Generator().manual_seed(seed)).double()
        ways = solve(drawn, PAPER).allocation(1.40)
        assert (ways == 0).double().mean().item() >= 0.6


# -- nulls


def test_a_shuffled_table_is_worth_what_independence_says() -> None:
    """Marginals stay; over all shuffles the unconstrained mean is that of independent draws."""
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).double()
    draw = torch.Generator().manual_seed(2)
    values = []
    for _ in range(1500):
        shuffled = oracle.permuted(scores, draw)
        assert torch.equal(shuffled.sort(0).values, scores.sort(0).values)
        values.append(shuffled.amax(1).mean().item())
    columns = [column.tolist() for column in scores.T]
    independent = [max(one) for one in itertools.product(*columns)]
    expected = sum(independent) / len(independent)
    assert sum(values) / len(values) == pytest.approx(expected, abs=0.006)
    constant = scores[:1].repeat(6, 1)  # ways that do not differ between texts: nothing to shuffle
    assert torch.equal(constant, oracle.permuted(constant, draw))


def test_the_null_of_noise_is_all_the_gain_there_is() -> None:
    """Ways that differ by noise alone: oracle and null gain the same, held out nothing is left."""
    draw = torch.Generator().manual_seed(7)
    noise = [torch.randn(300, 4, generator=draw).double() for _ in range(3)]
    table = replace(
        toy(300),
        scores=(noise[0] + noise[1]) / 2,
        halves=torch.stack(noise[:2]),
        null=(noise[1] + noise[2]) / 2,
    )
    done = report(table, [24.0])
    assert done.null_gain is not None
    assert done.held_out_gain is not None
    expected = 1.0294 / math.sqrt(2)  # mean of the largest of four normal draws
    assert done.gain == pytest.approx(expected, abs=0.13)
    assert done.null_gain == pytest.approx(expected, abs=0.13)
    assert done.held_out_gain == pytest.approx(0, abs=0.13)


# -- tables


@pytest.mark.parametrize("score", ["loss", "match", "agreement"])
def test_a_traces_scores_are_those_of_running_each_path(score: Score) -> None:
    """Teacher-forced, text by text: a pass of the first layers alone says the same."""
    backbone = opened("llama")
    texts = [(ids, 3) for ids in texts_of(backbone, (9, 6, 12), seed=4)]
    model = ModelId(name="x", num_layers=6, fingerprint=backbone.fingerprint)
    table = from_trace(offramp.record(backbone, texts, (2, 5)), model, score)
    assert table.costs.tolist() == [2, 5, 6]
    for i, (ids, start) in enumerate(texts):
        full = logits_of(ids, 6)[start - 1 : -1]
        for p, depth in enumerate((2, 5, 6)):
            logits = logits_of(ids, depth)[start - 1 : -1]
            own = torch.tensor(ids[start:])
            values = {
                "loss": -torch.nn.functional.cross_entropy(logits, own, reduction="none"),
                "match": (logits.argmax(-1) == own).double(),
                "agreement": (logits.argmax(-1) == full.argmax(-1)).double(),
            }[score]
            assert table.scores[i, p].item() == pytest.approx(values.mean().item(), abs=1e-4)
            assert table.halves is not None
            for k in (0, 1):
                half = values[k::2].mean().item()
                assert table.halves[k, i, p].item() == pytest.approx(half, abs=1e-4)
    assert (table.null is None) == (score == "agreement")


def logits_of(ids: list[int], depth: int) -> Tensor:
    """The logits of the first layers alone, at every position."""
    backbone = opened("llama")
    text = Text(list(ids), backbone.open())
    logits = step(backbone, [text], layers=range(depth), tails=[len(ids)]).logits
    backbone.close(text.slot)
    return logits


def test_a_table_of_running_is_what_the_judge_said(tiny: offramp.Model) -> None:
    """Sorted by cost; exits cost the depth they had; a null where there are seeds."""
    prompts = ["one", "two", "three and more"]
    runs = (Full(), Exit(signal="max_prob", thresholds={2: 0.02}), Path(layers=(0, 2)))
    plain = by_running(
        tiny, prompts, runs, lambda i, output: len(set(output.token_ids)) + i, name="x",
        max_new_tokens=6,
    )  # fmt: skip
    assert not plain.teacher_forced
    assert plain.null is None
    assert plain.costs[0].item() == 2
    assert plain.costs[-1].item() == 6
    for p, run in enumerate(plain.runs):
        answers = tiny.generate(prompts, plan=offramp.Plan(run=run), max_new_tokens=6).outputs
        assert [len(set(a.token_ids)) + i for i, a in enumerate(answers)] == plain.scores[
            :, p
        ].tolist()
    drawn = by_running(
        tiny, prompts, runs, lambda _i, output: float(sum(output.token_ids)), name="x",
        max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=3),
    )  # fmt: skip
    assert drawn.null is not None
    assert len(set(drawn.null[0].tolist())) == 3
    with pytest.raises(UsageError, match="leaves the model's layers"):
        by_running(tiny, prompts, (Full(), Path(layers=(0, 9))), lambda _i, _o: 0.0, name="x")
    with pytest.raises(UsageError, match="no finite number"):
        by_running(tiny, prompts, runs, lambda _i, _o: math.nan, name="x", max_new_tokens=2)


def test_a_table_survives_the_disk(tmp_path: FilePath) -> None:
    """With all of its parts, and without those it need not have."""
    path = tmp_path / "t.safetensors"
    for table in (toy(), replace(toy(), halves=None, null=None, features=None, exits=())):
        table.save(path)
        loaded = load_table(path)
        assert (table.model, table.runs, table.exits) == (loaded.model, loaded.runs, loaded.exits)
        assert table.tensors().keys() == loaded.tensors().keys()
        for name, part in table.tensors().items():
            assert torch.equal(part, loaded.tensors()[name])


Wrong = Callable[[dict[str, Any], dict[str, Tensor]], object]
WRONG: dict[str, Wrong] = {
    "a way too few": lambda facts, _: facts.update(runs=facts["runs"][:3]),
    "a layer the model lacks": lambda facts, _: facts["runs"][0].update(layers=[0, 24]),
    "an unknown way": lambda facts, _: facts["runs"][0].update(kind="half"),
    "an unknown key": lambda facts, _: facts.update(extra=1),
    "no model": lambda facts, _: facts.pop("model"),
    "no scores": lambda _, parts: parts.pop("scores"),
    "an unknown part": lambda _, parts: parts.update(more=torch.zeros(1)),
    "a score that is no number": lambda _, parts: parts["scores"][3, 1].fill_(torch.nan),
    "a cost of nothing": lambda _, parts: parts["costs"][0].fill_(0),
    "costs in no order": lambda _, parts: parts.update(costs=parts["costs"].flip(0)),
    "features of other texts": lambda _, parts: parts.update(features=parts["features"][1:]),
    "a half too few": lambda _, parts: parts.update(halves=parts["halves"][:1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_no_table_is_refused(tmp_path: FilePath, wrong: str) -> None:
    """In one sentence."""
    table, path = toy(), tmp_path / "t.safetensors"
    facts: dict[str, Any] = {
        "format": 1,
        "model": MODEL.model_dump(),
        "score": "loss",
        "teacher_forced": True,
        "runs": [run.model_dump(mode="json") for run in table.runs],
        "exits": [3],
    }
    parts = {name: part.clone() for name, part in table.tensors().items()}
    save_file(parts, path, {"offramp_table": json.dumps(facts)})
    load_table(path)
    WRONG[wrong](facts, parts)
    save_file(
        {name: part.contiguous() for name, part in parts.items()},
        path,
        {"offramp_table": json.dumps(facts)},
    )
    with pytest.raises(OfframpError, match="score table"):
        load_table(path)


def test_what_no_oracle_can_be_asked_of() -> None:
    """Too few texts (how many are needed is said), scores that do not differ, other budgets."""
    with pytest.raises(UsageError, match=r"19 texts are too few.*: 20 or more"):
        report(toy(19), [24.0])
    with pytest.raises(UsageError, match="no text's score differs"):
        report(replace(toy(), scores=torch.ones(60, 4).double()), [24.0])
    for budget in (5.0, 25.0, math.nan):
        with pytest.raises(UsageError, match=r"is outside 6 to 24"):
            report(toy(), [budget])
    with pytest.raises(UsageError, match="no way is as cheap as 1 layers"):
        solve(toy().scores, toy().costs).value(1)
    with pytest.raises(UsageError, match="too many for an exact answer"):
        solve(torch.zeros(9000, 3), torch.tensor([1.0, 2.5, 30.01]).double())
    with pytest.raises(UsageError, match="40 texts are too few for a router: 50"):
        fit_router(toy(40))
    with pytest.raises(UsageError, match="no features"):
        fit_router(replace(toy(), features=None))
    backbone = opened("llama")
    trace = offramp.record(backbone, [([5, 6, 7], 2), ([5, 6, 7, 8], 2)], (2,))
    with pytest.raises(UsageError, match="text 1 has fewer than 2 tokens"):
        from_trace(trace, MODEL, "loss")


# -- routers


def test_a_router_finds_a_pattern_and_only_where_there_is_one() -> None:
    """On texts left out: most of the oracle's gap where features tell, none of it in noise."""
    told, noise = toy(200, learnable=0.5), toy(200)
    for table, low, high in ((told, 0.9, 1.0), (noise, -0.3, 0.3)):
        router, predicted = fit_router(table)
        row = report(table, [18.0], predicted).rows[0]
        assert row.recovered is not None
        assert row.recovered_interval is not None
        assert low <= row.recovered <= high
        assert row.recovered_interval[0] <= row.recovered <= row.recovered_interval[1]
        assert row.route_depth is not None
        assert row.route_depth <= 18
        assert (explained(predicted, table.scores) > 0.9) == (table is told)
        assert router.runs == tuple(run.model_dump_json() for run in table.runs)


def test_no_text_judges_the_router_it_was_fitted_on() -> None:
    """Another score of one text changes what is predicted of others, never of that text."""
    table = toy(100, learnable=0.5)
    _, before = fit_router(table)
    scores = table.scores.clone()
    scores[7] += torch.tensor([50.0, -50.0, 0.0, 0.0])
    _, after = fit_router(replace(table, scores=scores))
    assert torch.equal(before[7], after[7])
    assert (before != after).any(1).sum().item() >= 75


def test_the_price_meets_the_budget() -> None:
    """Never above it, and a little less of a price is."""
    table = toy(100, learnable=0.5)
    _, predicted = fit_router(table)
    for budget in (6.5, 9.0, 14.0, 20.0, 24.0):
        price = price_of(predicted, table.costs, budget)
        spent = [
            table.costs[choices(predicted, table.costs, p)].mean().item()
            for p in (price, price - 1e-4)
        ]
        assert spent[0] <= budget
        assert price == 0 or spent[1] > budget


def test_default_budgets_are_whole_layers_to_the_full_model() -> None:
    """Few enough to read."""
    assert default_budgets(PAPER) == [1, 2, 3, 4, 5, 6]
    found = default_budgets(torch.tensor([4.5, 70.0]).double())
    assert len(found) <= 13
    assert found[0] >= 4.5
    assert found[-1] == 70


# -- the command line


@pytest.fixture
def prompts(tmp_path: FilePath) -> FilePath:
    """A file of sixty prompts with answers."""
    rows = [{"instruction": f"say {i}", "output": f"here is {i * 7919}"} for i in range(60)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_oracle_makes_a_table_a_router_and_a_plan_that_runs(
    shell: Shell, checkpoint: FilePath, prompts: FilePath, tmp_path: FilePath
) -> None:
    """The table can be judged again without the model; the plan generates."""
    table, router, plan = (tmp_path / n for n in ("t.safetensors", "r.safetensors", "p.json"))
    made = shell.json(
        *("oracle", checkpoint, "--prompts", prompts, "--exits", "2,4", "--answers", "file"),
        *("--table-out", table, "--router", router, "--plan", plan, "--budget", "4.5"),
        *("--max-new-tokens", 6, "--out", tmp_path / "out.json"),
    )
    assert json.loads((tmp_path / "out.json").read_text()) == made
    assert (made["texts"], made["costs"], made["teacher_forced"]) == (60, [2, 4, 6], True)
    [row] = made["rows"]
    assert row["fixed"] <= row["oracle"]
    assert sum(row["histogram"]) == 60
    again = shell.json("oracle", "--table", table, "--budget", "4.5")
    for key in ("rows", "smallest", "smallest_interval", "weak", "router"):
        assert made[key] == again[key]
    assert read_plan(plan).model_dump(mode="json") == made["plan"]
    base = ("generate", checkpoint, "--prompts", prompts, "--limit", 8, "--max-new-tokens", 3)
    depths = shell.json(*base, "--plan", plan)["depth_histogram"]
    assert {int(depth) for depth in depths} <= {2, 4, 6}
    status, out, _ = shell("oracle", "--table", table)
    assert status == 0
    assert "The oracle equals the full model at" in out
    assert "weak oracle" in out


def test_wrong_usage_of_oracle_is_one_line(
    shell: Shell, checkpoint: FilePath, prompts: FilePath, tmp_path: FilePath
) -> None:
    """Before a model loads where it can be; foreign and unreadable tables are named."""
    ask = ("oracle", "no-such-model", "--prompts", prompts)
    table = tmp_path / "t.safetensors"
    toy().save(table)
    shell.refused(2, "give --prompts FILE and --exits", "oracle", "no-such-model")
    shell.refused(2, "give --prompts FILE and --exits", *ask)
    shell.refused(2, "write depths", *ask, "--exits", "2,x")
    shell.refused(2, "--score", *ask, "--exits", "2", "--score", "rouge")
    shell.refused(2, "--budget", *ask, "--exits", "2", "--budget", "many")
    shell.refused(2, "--plan needs", *ask, "--exits", "2", "--plan", "p.json")
    shell.refused(2, "leave out", "oracle", "--table", table, "--exits", "2")
    shell.refused(1, "cannot read the table", "oracle", "--table", tmp_path / "none")
    shell.refused(2, "is outside 6 to 24", "oracle", "--table", table, "--budget", "30")
    real = ("oracle", checkpoint, "--prompts", prompts)
    shell.refused(2, "this table was made of tiny", "oracle", checkpoint, "--table", table)
    shell.refused(2, "are outside 1 to 5", *real, "--exits", "2,9")
    shell.refused(2, "is behind the first exit", *real, "--exits", "2", "--look", "3")
    for answers in ("own", "file"):
        few = (*real, "--exits", "2", "--limit", 5, "--answers", answers)
        shell.refused(2, "5 texts are too few to speak of a budget: 20 or more are needed", *few)


def test_features_are_the_same_alone_and_in_company() -> None:
    """What a router is fitted on is what it will see."""
    backbone = opened("fast:llama")
    prompts = texts_of(backbone, (3, 8, 5, 1, 6))
    torch.testing.assert_close(
        features_of(backbone, prompts, (1, 2), batch_size=1),
        features_of(backbone, prompts, (1, 2), batch_size=3),
    )
