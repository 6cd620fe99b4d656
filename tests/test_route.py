"""Routes: a way per text, chosen by its prompt; but for the choice, each text is that way alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import offramp
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.errors import OfframpError, UsageError
from offramp.meter import Meter
from offramp.plan import ModelId, Plan, execute, read_plan, write_plan
from offramp.request import Request
from offramp.router import RouterWeights, choices, load_router, look, num_features
from offramp.runs import Exit, Full, Path, Route
from tests.laws.test_9_readouts import owning
from tests.tools import collected, counted, opened, texts_of

Whole = Full | Exit | Path

NAMES = ("llama", "gemma2", "fast:llama", "graph:llama")
RUNS: tuple[Whole, ...] = (
    Path(layers=(0, 1)),
    Path(layers=(0, 1, 3, 5)),
    Exit(signal="max_prob", thresholds={1: 0.02, 4: 0.02}),
    Exit(signal="fixed", thresholds={3: 1.0}, kv="copy"),
    Full(),
)
LENGTHS = (5, 1, 9, 3, 7, 12)


def features_of(backbone: Backbone, prompts: list[list[int]], exits: tuple[int, ...]) -> Tensor:
    """What a router sees of some prompts, each looked at alone."""
    rows = []
    for ids in prompts:
        text = Text(list(ids), backbone.open())
        rows.append(look(backbone, [text], exits))
        backbone.close(text.slot)
    return torch.cat(rows)


def router_of(
    backbone: Backbone,
    prompts: list[list[int]],
    runs: tuple[Whole, ...] = RUNS,
    exits: tuple[int, ...] = (1, 2),
    seed: int = 0,
) -> RouterWeights:
    """A router with random weights that sends these prompts several ways."""
    features = features_of(backbone, prompts, exits)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(runs), features.shape[1], generator=generator)
    return RouterWeights(
        exits=exits,
        num_layers=backbone.shape.num_layers,
        fingerprint=backbone.fingerprint,
        runs=tuple(run.model_dump_json() for run in runs),
        costs=torch.arange(1.0, len(runs) + 1, dtype=torch.float64),
        weights=weights,
        biases=-(features @ weights.T).mean(0),
        fitted_on={"texts": len(prompts)},
    )


def plan_of(router: RouterWeights, path: FilePath, price: float = 0.0) -> Route:
    """The run of a plan that uses this router, written to a file."""
    digest = router.save(path)
    runs = tuple(Plan.model_validate_json(f'{{"run": {run}}}').run for run in router.runs)
    return Route(router=str(path), digest=digest, price=price, runs=runs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exits", [(1,), (1, 2)])
def test_a_route_is_each_chosen_way_alone(
    name: str, exits: tuple[int, ...], tmp_path: FilePath
) -> None:
    """Token by token and depth by depth, in any batch; and its rows are counted (law 6)."""
    backbone = opened(name)
    prompts = texts_of(backbone, LENGTHS, seed=3)
    router = router_of(backbone, prompts, exits=exits)
    run = plan_of(router, tmp_path / "r.safetensors")
    run.must_fit(backbone)
    taken = router.choose(features_of(backbone, prompts, exits), 0.0)
    assert len(set(taken)) >= 3
    # Of different lengths: texts come while others are on their way.
    requests = [Request(ids, 3 + 2 * (i % 3)) for i, ids in enumerate(prompts)]
    alone = [
        collected(execute(backbone, [request], RUNS[k]), 1)
        for request, k in zip(requests, taken, strict=True)
    ]
    assert len({tuple(ids[0]) for ids, _ in alone}) >= 4
    for batch_size in (1, 3):
        with counted(backbone):
            routed = execute(backbone, requests, run, batch_size=batch_size)
            ids, depths = collected(routed, len(prompts))
        assert [text[0] for text, _ in alone] == ids
        assert [depth[0] for _, depth in alone] == depths


@pytest.mark.parametrize("name", ["llama", "fast:llama"])
def test_the_meter_knows_what_looking_costs(name: str, tmp_path: FilePath) -> None:
    """The way alone, a head row per exit looked at, and one more row through those layers."""
    backbone = opened(name)
    [prompt] = texts_of(backbone, [9])
    for run in RUNS:
        router = router_of(backbone, [prompt], (run, Full()))
        router.biases[0] += 1e6
        work = []
        for way in (run, plan_of(router, tmp_path / "r.safetensors")):
            before = backbone.meter.copy()
            list(execute(backbone, [Request(prompt, 4)], way))
            work.append(backbone.meter - before)
        alone, routed = work
        assert alone.layer_tokens + 2 == routed.layer_tokens  # the last token, two layers
        assert alone.layer_passes + 2 == routed.layer_passes
        assert alone.head_rows + 2 == routed.head_rows  # exits 1 and 2
        assert alone.fill_rows == routed.fill_rows


def test_what_a_router_sees_is_the_texts_own() -> None:
    """Whatever the company; and it is what the trace of the prompt says of those exits."""
    backbone = opened("llama")
    prompts = texts_of(backbone, LENGTHS, seed=5)
    texts = [Text(list(ids), backbone.open()) for ids in prompts]
    together = look(backbone, texts, (1, 3))
    torch.testing.assert_close(features_of(backbone, prompts, (1, 3)), together)
    assert together.shape[1] == num_features((1, 3), backbone.shape.hidden_size)
    trace = offramp.record(backbone, [([*ids, 7], len(ids)) for ids in prompts], (1, 3))
    for i, name in enumerate(("max_prob", "margin", "entropy")):
        torch.testing.assert_close(trace.scores[name], together[:, [1 + i, 4 + i]])
    for text in texts:
        assert text.num_waiting == text.done
        backbone.close(text.slot)


def test_a_price_buys_depth() -> None:
    """At no price the best score wins, at a high one the cheapest way; costs fall on the way."""
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    costs = torch.tensor([6.0, 12.0, 18.0, 30.0], dtype=torch.float64)
    assert torch.equal(scores.argmax(-1), choices(scores, costs, 0))
    assert choices(scores, costs, 1e3).eq(0).all()
    spent = [costs[choices(scores, costs, p)].mean().item() for p in torch.linspace(0, 1, 40)]
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) > 10


@pytest.mark.parametrize("name", ["llama", "fast:llama"])
def test_blocks_hold_every_token_of_a_routed_text(name: str, tmp_path: FilePath) -> None:
    """Exits that own readouts, before, at and behind the depth where prompts wait."""
    backbone = owning(name)
    runs: tuple[Whole, ...] = tuple(
        Exit(signal="fixed", thresholds={stop: 1.0}) for stop in (2, 3, 4)
    )
    runs = (*runs, Path(layers=(0, 1, 2)), Full())
    prompts = texts_of(backbone, LENGTHS, seed=3)
    for exits in ((2,), (2, 3)):
        router = router_of(backbone, prompts, runs, exits)
        run = plan_of(router, tmp_path / "r.safetensors")
        run.must_fit(backbone)
        taken = router.choose(features_of(backbone, prompts, exits), 0.0)
        with counted(backbone):
            routed = execute(backbone, [Request(ids, 6) for ids in prompts], run)
            ids, _ = collected(routed, len(prompts))
        for i, k in enumerate(taken):
            [expected], _ = collected(execute(backbone, [Request(prompts[i], 6)], runs[k]), 1)
            assert expected == ids[i]
    with pytest.raises(UsageError, match="exit 2 has a block of its own"):
        plan_of(router_of(backbone, prompts, runs, (3,)), tmp_path / "r.safetensors").must_fit(
            backbone
        )


# -- files


def test_a_router_survives_the_disk(tmp_path: FilePath) -> None:
    """What is saved is what is loaded, and a plan that names it is read as it was written."""
    backbone = opened("llama")
    router = router_of(backbone, texts_of(backbone, [4, 5]))
    run = plan_of(router, tmp_path / "r.safetensors", price=0.25)
    loaded = load_router(tmp_path / "r.safetensors", run.digest)
    for name in ("exits", "num_layers", "fingerprint", "runs", "fitted_on"):
        assert getattr(router, name) == getattr(loaded, name)
    for name in ("weights", "biases", "costs"):
        assert torch.equal(getattr(router, name), getattr(loaded, name))
    write_plan(tmp_path / "plan.json", Plan(run=run))
    assert Plan(run=run) == read_plan(tmp_path / "plan.json")
    assert not Plan(run=run).lossless


WRONG: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "a repeated exit": lambda facts, _: facts.update(exits=[1, 1]),
    "no exit": lambda facts, _: facts.update(exits=[]),
    "an exit too deep": lambda facts, _: facts.update(exits=[1, 6]),
    "an exit that is no number": lambda facts, _: facts.update(exits=[1, "2"]),
    "a way too few": lambda facts, _: facts.update(runs=facts["runs"][:4]),
    "a way that is no text": lambda facts, _: facts.update(runs=[1, 2, 3, 4, 5]),
    "no model": lambda facts, _: facts.pop("fingerprint"),
    "no ways": lambda facts, _: facts.pop("runs"),
    "a bias too few": lambda _, parts: parts.update(biases=parts["biases"][:3].clone()),
    "half precision": lambda _, parts: parts.update(weights=parts["weights"].half()),
    "a weight that is no number": lambda _, parts: parts["weights"][2, 3].fill_(torch.nan),
    "an infinite cost": lambda _, parts: parts["costs"][1].fill_(torch.inf),
    "a cost of nothing": lambda _, parts: parts["costs"][0].fill_(0),
    "more layers than there are": lambda _, parts: parts["costs"][4].fill_(7),
    "no weights": lambda _, parts: parts.pop("weights"),
    "flat weights": lambda _, parts: parts.update(weights=torch.zeros(5)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_whose_parts_do_not_go_together_is_refused(tmp_path: FilePath, wrong: str) -> None:
    """Before it judges anything."""
    backbone, path = opened("llama"), tmp_path / "r.safetensors"
    router = router_of(backbone, texts_of(backbone, [4, 5]))
    facts: dict[str, Any] = {
        "format": 1,
        "exits": [1, 2],
        "num_layers": 6,
        "fingerprint": router.fingerprint,
        "runs": list(router.runs),
        "fitted_on": {},
    }
    parts = {name: getattr(router, name).clone() for name in ("weights", "biases", "costs")}
    save_file(parts, path, {"offramp_router": json.dumps(facts)})
    load_router(path)
    WRONG[wrong](facts, parts)
    save_file(parts, path, {"offramp_router": json.dumps(facts)})
    with pytest.raises(OfframpError, match="is no offramp router"):
        load_router(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"],
)
def test_other_files_are_refused(tmp_path: FilePath, content: bytes) -> None:
    """Missing ones, and bytes of any kind."""
    path = tmp_path / "r.safetensors"
    with pytest.raises(OfframpError, match="cannot read the router"):
        load_router(path)
    path.write_bytes(content)
    with pytest.raises(OfframpError, match="is no offramp router"):
        load_router(path)


def test_a_changed_router_is_refused(tmp_path: FilePath) -> None:
    """One bit is enough, though every part of the file still goes together."""
    backbone, path = opened("llama"), tmp_path / "r.safetensors"
    run = plan_of(router_of(backbone, texts_of(backbone, [4, 5])), path)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    load_router(path)
    with pytest.raises(OfframpError, match="its bytes have changed"):
        run.must_fit(backbone)


def test_what_a_route_cannot_be(tmp_path: FilePath) -> None:
    """Another model's router, other ways, ways that do not share its layers; one sentence each."""
    backbone, path = opened("llama"), tmp_path / "r.safetensors"
    router = router_of(backbone, texts_of(backbone, [4, 5]))

    def refused(words: str, run: Route) -> None:
        with pytest.raises(UsageError, match=words):
            run.must_fit(backbone)

    refused("fingerprint other", plan_of(replace(router, fingerprint="other"), path))
    run = plan_of(router, path)
    refused("other ways", run.model_copy(update={"runs": run.runs[::-1]}))
    with pytest.raises(UsageError, match="this plan was made for x"):
        Plan(model=ModelId(name="x", num_layers=6, fingerprint="x"), run=run).check(backbone)
    refused("a price per layer", run.model_copy(update={"price": -1.0}))
    for runs, words in (
        ((Path(layers=(0, 2, 3)), Full()), "does not begin with them"),
        ((Path(layers=(0,)), Full()), "does not begin with them"),
        ((Path(layers=(0, 1, 9)), Full()), "leaves the model's layers"),
        ((Exit(signal="fixed", thresholds={3: 1.0}, exit_prompt=True), Full()), "exit_prompt"),
    ):
        prompts = texts_of(backbone, [4])
        refused(words, plan_of(router_of(backbone, prompts, runs), path))


def test_the_library_runs_a_route(tiny: offramp.Model, tmp_path: FilePath) -> None:
    """Through the Python door: right answers to right prompts, and their cost."""
    prompts = ["one", "a second prompt", "and a third, longer than that", "4", "five of them"]
    ids = [list(b"<user>" + p.encode() + b"<assistant>") for p in prompts]
    router = router_of(tiny.backbone, ids)
    run = plan_of(router, tmp_path / "r.safetensors")
    plan = offramp.Plan(model=tiny.id, run=run)
    result = tiny.generate(prompts, plan=plan, max_new_tokens=5, batch_size=2)
    assert [prompts[i] for i in range(5)] == [output.prompt for output in result.outputs]
    assert all(len(output.token_ids) in range(1, 6) for output in result.outputs)
    work: Meter = result.figures.work
    assert work.head_rows == sum(len(output.token_ids) for output in result.outputs) + 2 * 5
