"""Search: any path is judged as it runs, greedy choices are the best ones, bad input is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from offramp.batch import Text
from offramp.checks import Shortlist
from offramp.cost import worth
from offramp.errors import OfframpError, UsageError
from offramp.paths import ATTENTION, MLP, is_whole, unified_skip
from offramp.plan import read_plan
from offramp.runs import Path as SubModel
from offramp.runs import Speculate
from offramp.search.passes import opened as held
from offramp.search.scores import cosines
from offramp.search.subsets import By, search
from offramp.step import step
from offramp.trace import record
from tests.test_cli import Shell, shell
from tests.tools import AnyBackbone, counted, lengths, opened, texts_of

__all__ = ["shell"]  # a fixture

FAMILIES = ("llama", "gpt2", "fast:gemma2", "graph:llama")
PATHS = ((0, 1, 2, 3, 4, 5), (0, 2, 5), (0,), (1, 4), (0, 1, 2))
BYS: tuple[By, ...] = ("uls", "cosine", "loss")


def some(backbone: AnyBackbone, seed: int = 5) -> list[tuple[list[int], int]]:
    """Texts of different lengths, some of which begin with a prompt."""
    texts = texts_of(backbone, [9, 5, 7, 9, 4, 6, 8, 5, 9], seed=seed)
    return [(ids, i % 3) for i, ids in enumerate(texts)]


def alone(backbone: AnyBackbone, path: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Logits ``[T, V]`` of one text along a path, by the loop that generates."""
    text = Text(list(ids), backbone.open())
    try:
        return step(backbone, [text], layers=path, tails=[len(ids)]).logits
    finally:
        backbone.close(text.slot)


def by_hand(
    backbone: AnyBackbone, path: Sequence[int], texts: list[tuple[list[int], int]]
) -> tuple[float, float]:
    """Loss and agreement of a path, text by text."""
    losses, agrees = [], []
    for ids, given in texts:
        first = max(given, 1)
        logits = alone(backbone, path, ids)[first - 1 : -1]
        full = alone(backbone, range(6), ids)[first - 1 : -1]
        targets = torch.tensor(ids[first:])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        agrees.append((logits.argmax(-1) == full.argmax(-1)).float())
    return torch.cat(losses).mean().item(), torch.cat(agrees).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_is_judged_as_it_would_run(family: str) -> None:
    """Many texts at once, one path after the other, give what each text gives alone."""
    backbone = opened(family)
    texts = some(backbone)
    with held(backbone, texts) as passes, counted(backbone):
        assert passes.tokens == sum(len(ids) - max(given, 1) for ids, given in texts)
        found = [passes.judge(path, passes.run(path, passes.inputs)) for path in PATHS]
    for path, judged in zip(PATHS, found, strict=True):
        loss, agreement = by_hand(backbone, path, texts)
        assert judged.loss == pytest.approx(loss, rel=1e-4)
        assert judged.agreement == pytest.approx(agreement)
    assert found[0].agreement == 1
    assert min(judged.agreement for judged in found) < 1


def test_the_loss_is_the_traces() -> None:
    """At full depth and at a prefix: one truth about a text."""
    backbone = opened("llama")
    texts = some(backbone)
    trace = record(backbone, texts, (3,))
    with held(backbone, texts) as passes:
        for column, path in enumerate((range(3), range(6))):
            judged = passes.judge(path, passes.run(path, passes.inputs))
            assert judged.loss == pytest.approx(trace.loss[:, column].mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "fast:llama"])
def test_cosines_are_those_of_states(family: str) -> None:
    """Of the rows that are counted, before and after each layer of the path."""
    backbone = opened(family)
    texts = [(ids, 1) for ids, _ in some(backbone)]
    trace = record(backbone, texts, keep_hidden=True)
    with held(backbone, texts) as passes:
        found, inputs, end = cosines(passes, range(6), passes.inputs)
        states = [passes.counted(rows) for rows in (*inputs, end)]
    assert trace.hidden is not None
    for depth in range(1, 6):
        assert torch.allclose(states[depth], trace.hidden[:, depth - 1], atol=1e-4)
    for layer, (before, after) in enumerate(pairwise(states)):
        assert found[layer] == pytest.approx(
            cosine_similarity(before, after, dim=-1).mean().item(), abs=1e-5
        )
    assert max(found) - min(found) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "fast:llama"])
def test_greedy_by_loss_takes_what_is_missed_least(family: str) -> None:
    """Each step is the best of all that lack one more layer, tried from scratch."""
    backbone = opened(family)
    texts = some(backbone)
    searched = [text for i, text in enumerate(texts) if i % 3 != 2]
    steps = search(backbone, texts, 2, "loss")
    assert [len(one.layers) for one in steps] == [6, 5, 4, 3, 2]
    for before, after in pairwise(steps):
        assert after.removed in before.layers[1:]
        assert after.layers == tuple(layer for layer in before.layers if layer != after.removed)
        losses = [
            by_hand(backbone, [one for one in before.layers if one != layer], searched)[0]
            for layer in before.layers[1:]
        ]
        assert after.searched.loss == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "fast:llama"])
def test_greedy_by_halves_takes_what_costs_least_for_its_weights(family: str) -> None:
    """Each step is the best of all that lack one more layer or half, tried from scratch."""
    backbone = opened(family)
    texts, shape = some(backbone), backbone.shape
    searched = [text for i, text in enumerate(texts) if i % 3 != 2]
    steps = search(backbone, texts, 3, "loss", halves=True)
    assert worth(steps[-1].layers, shape) <= 3 < worth(steps[-2].layers, shape)
    assert any(one.removed is not None and not is_whole(one.removed) for one in steps)
    for before, after in pairwise(steps):
        now = by_hand(backbone, list(before.layers), searched)[0]
        prices = {}
        for place, part in enumerate(before.layers[1:], 1):
            rest = [part | MLP, part | ATTENTION] if is_whole(part) else []
            for left in ([], *([half] for half in rest)):
                path = (*before.layers[:place], *left, *before.layers[place + 1 :])
                gone = worth([part], shape) - worth(left, shape)
                prices[path] = (by_hand(backbone, list(path), searched)[0] - now) / gone
        assert prices[after.layers] == pytest.approx(min(prices.values()), rel=1e-3, abs=1e-4)


def test_halves_are_looked_for_where_there_are_some() -> None:
    with pytest.raises(UsageError, match="half of a layer"):
        search(opened("gpt_neox"), some(opened("gpt_neox")), 3, "loss", halves=True)
    with pytest.raises(UsageError, match="by loss, not by cosine"):
        search(opened("llama"), some(opened("llama")), 3, "cosine", halves=True)


def test_greedy_by_cosine_takes_what_changes_least() -> None:
    """Measured again along the path that is left."""
    backbone = opened("llama")
    texts = some(backbone)
    searched = [text for i, text in enumerate(texts) if i % 3 != 2]
    steps = search(backbone, texts, 2, "cosine")
    with held(backbone, searched) as passes:
        for before, after in pairwise(steps):
            found, _, _ = cosines(passes, before.layers, passes.inputs)
            alike = dict(zip(before.layers[1:], found[1:], strict=True))
            assert after.removed == max(alike, key=alike.__getitem__)


@pytest.mark.parametrize("by", BYS)
def test_what_is_found_is_judged_on_texts_that_had_no_say(by: By) -> None:
    """Both judgements are those of the path; every third text is held out; nothing stays behind."""
    backbone = opened("fast:llama")
    texts = some(backbone)
    told: list[float] = []
    steps = search(backbone, texts, 3, by, told.append)
    assert steps[0].layers == tuple(range(6))
    assert len(steps[-1].layers) == 3
    if by == "uls":
        assert steps[-1].layers == unified_skip(3, 6)
    for one in steps:
        for kept, judged in ((0, one.searched), (1, one.held_out)):
            part = [text for i, text in enumerate(texts) if (i % 3 == 2) == kept]
            loss, agreement = by_hand(backbone, one.layers, part)
            assert (judged.loss, judged.agreement) == pytest.approx((loss, agreement), rel=1e-4)
    assert told == sorted(told)
    assert told[-1] == 1


def test_texts_stay_open_without_keys() -> None:
    """A failing layer, too, leaves the texts as they were."""
    backbone = opened("llama")
    with held(backbone, some(backbone)) as passes:
        passes.run([0, 3], passes.inputs)
        with pytest.raises(IndexError):
            passes.run([0, 99], passes.inputs)
        assert {0} == {n for text in passes._texts for n in lengths(text.slot)}


@pytest.mark.parametrize(
    ("keep", "count", "complaint"),
    [
        (0, 9, "1 to 5, not 0"),
        (6, 9, "1 to 5, not 6"),
        (7, 9, "not 7"),
        (-1, 9, "not -1"),
        (3, 5, "6 texts"),
    ],
)
@pytest.mark.parametrize("by", BYS)
def test_what_cannot_be_searched_is_refused(by: By, keep: int, count: int, complaint: str) -> None:
    """Too few texts, and more layers than there are or none."""
    backbone = opened("llama")
    with pytest.raises(UsageError, match=complaint):
        search(backbone, some(backbone)[:count], keep, by)


def test_texts_that_say_nothing_are_refused() -> None:
    """One token, all of it given, or longer than the model reads."""
    backbone = opened("llama")
    good = some(backbone)
    for bad in (([7], 0), ([7, 8, 9], 3), ([7] * (backbone.shape.context + 1), 1)):
        with pytest.raises(UsageError, match="text"):
            search(backbone, [*good, bad], 3, "loss")


@pytest.mark.parametrize("by", BYS)
def test_scores_that_are_no_numbers_are_refused(by: By) -> None:
    """A layer whose weights are NaN is named, or the path that it spoils."""
    backbone = opened("llama")
    weight = backbone.model.model.layers[2].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        with pytest.raises(OfframpError, match=r"layer 2 .*--weights fp32"):
            search(backbone, some(backbone), 3, by)
    finally:
        weight.data.copy_(kept)


# -- the command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts enough for a search."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt number {n} of {n * n}" for n in range(9)))
    return path


@pytest.mark.parametrize("by", BYS)
def test_a_plan_comes_out_that_generates(
    shell: Shell, checkpoint: Path, prompts: Path, tmp_path: Path, by: By
) -> None:
    """As a sub-model it runs the layers found; as a draft it changes no token."""
    base = ["search", checkpoint, "--prompts", prompts, "--max-new-tokens", 6, "--by", by]
    run = ["generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 9]
    plan = tmp_path / "plan.json"
    found = shell.json(*base, "--keep", 3, "--out", plan)
    layers = found["plan"]["run"]["layers"]
    assert (len(layers), layers[0]) == (3, 0)
    assert found["rows"][-1]["layers"] == layers
    assert found["rows"][-1]["predicted_ratio"] > 0
    assert read_plan(plan).run == SubModel(layers=tuple(layers))
    assert set(shell.json(*run, "--plan", plan)["outputs"][0]["depths"]) == {3}
    options = ["--as", "draft", "--share", 0.5, "--draft-tokens", 2, "--head", "shortlist:99"]
    found = shell.json(*base, *options, "--out", plan)
    drafts = read_plan(plan).run
    assert drafts == Speculate(draft=tuple(layers), tokens=2, head=Shortlist(size=99))
    assert 0 <= found["draft"]["accepted"] <= found["draft"]["drafted"] > 0
    plain, drafted = shell.json(*run), shell.json(*run, "--plan", plan)
    assert plain["outputs"][0]["token_ids"] == drafted["outputs"][0]["token_ids"]
    assert drafted["drafted"] > 0


def test_halves_of_layers_make_a_plan(
    shell: Shell, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """Named as people name them, in the plan, in the table and in JSON; it runs, and drafts."""
    base = ["search", checkpoint, "--prompts", prompts, "--max-new-tokens", 6, "--by", "loss"]
    run = ["generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 9]
    plan = tmp_path / "plan.json"
    found = shell.json(*base, "--halves", "--keep", 4, "--out", plan)
    layers = found["plan"]["run"]["layers"]
    assert found["rows"][-1]["layers"] == layers
    assert any(isinstance(part, str) for part in layers)
    half = shell.json(*run, "--plan", plan)
    assert half["attention_passes"] + half["mlp_passes"] > 0
    status, out, _ = shell(*base, "--halves", "--keep", 4, "--as", "draft", "--out", plan)
    assert status == 0
    assert f"Layers: {', '.join(map(str, layers))}." in out
    plain, drafted = shell.json(*run), shell.json(*run, "--plan", plan)
    assert plain["outputs"][0]["token_ids"] == drafted["outputs"][0]["token_ids"]


def test_the_table_names_what_was_taken_out(shell: Shell, checkpoint: Path, prompts: Path) -> None:
    """A line per step, and what stays."""
    status, out, _ = shell("search", checkpoint, "--prompts", prompts, "--keep", 4, "--given")
    assert status == 0
    assert "taken out" in out
    assert "Layers: 0, " in out


def test_wrong_searches_are_refused(shell: Shell, checkpoint: Path, prompts: Path) -> None:
    """Before a model loads, where that can be known."""
    base = ["search", checkpoint.parent / "nowhere", "--prompts", prompts]
    shell.refused(2, "give --prompts", "search", checkpoint)
    shell.refused(2, "exclude each other", *base, "--keep", 3, "--share", 0.5)
    shell.refused(2, "between 0 and 1", *base, "--share", 1.0)
    shell.refused(2, "between 0 and 1", *base, "--share", "nan")
    shell.refused(2, "needs --as draft", *base, "--head", "shortlist:9")
    shell.refused(2, "needs --by loss", *base, "--halves")
    shell.refused(2, "6 texts or more", *base, "--limit", 5)
    shell.refused(2, "1 to 5, not 6", "search", checkpoint, "--prompts", prompts, "--keep", 6)
