"""Skip gates: the loop is the trained network, costs what it counts, and refuses other gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import skip_gates
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import offramp
from offramp.backbone import Backbone
from offramp.batch import Text
from offramp.decode import decode
from offramp.errors import OfframpError, UsageError
from offramp.plan import Plan, execute
from offramp.runs import Skip
from offramp.skipping import SkipFacts, SkipGates, load_skip_gates, skip, skip_step
from offramp.trace import record
from offramp.tune.data import Example
from offramp.tune.run import tune
from tests.test_cli import Shell
from tests.test_cli import shell as shell
from tests.test_tune_loop import model as model
from tests.test_tune_loop import no_pictures as no_pictures
from tests.test_tune_loop import rows as rows
from tests.test_tune_loop import settings
from tests.tools import (
    BOTH,
    DIGEST_CHANGES,
    AnyBackbone,
    Change,
    Recorder,
    assert_close,
    collected,
    counted,
    generic,
    opened,
    tamper,
    texts_of,
)

Input = Literal["hidden", "fixed"]
LAYERS = range(1, 5)


def gates(
    gate_input: Input = "hidden",
    *,
    bias: float = 0.0,
    width: int = 0,
    of: Backbone | None = None,
) -> SkipGates:
    """Random gates on all layers of a tiny model but the first and the last."""
    of = of or opened("llama")
    width = width or of.shape.hidden_size
    draw = torch.Generator().manual_seed(3)
    weights = {layer: torch.randn(2, width, generator=draw) for layer in LAYERS}
    biases = {layer: torch.tensor([0.0, bias]) for layer in LAYERS}
    facts = SkipFacts(num_layers=6, fingerprint=of.fingerprint, gate_input=gate_input)
    return SkipGates(facts, weights, biases)


@torch.no_grad()
def simulated(own: SkipGates, ids: list[int], given: int) -> tuple[Tensor, list[int]]:
    """Logits and layers of each choosing position, by the paper's simulation over a whole text.

    Every layer is computed for all positions, and the state of one that skips is put back.
    """
    network = generic("llama")
    batch = torch.tensor([ids])
    prepared = network.adapter.prepare(batch, torch.arange(len(ids))[None], None, None)
    hidden, depths = prepared.hidden, torch.zeros(len(ids), dtype=torch.long)
    for layer in range(6):
        runs = own.runs(layer, hidden[0])
        runs[: given - 1] = True
        hidden = torch.where(runs[:, None], network.adapter.call(layer, hidden, prepared), hidden)
        depths += runs
    return network.adapter.readout(hidden[0, given - 1 : -1]), depths[given - 1 : -1].tolist()


def run(
    backbone: AnyBackbone, own: SkipGates, prompts: list[list[int]], count: int = 10, size: int = 8
) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
    """Tokens, depths and logits of each prompt."""
    recorders = [Recorder() for _ in prompts]
    requests = [one.request(p, count) for one, p in zip(recorders, prompts, strict=True)]
    ids, depths = collected(skip(backbone, requests, own, batch_size=size), len(prompts))
    return ids, depths, [torch.stack(one.logits) for one in recorders]


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("gate_input", ["hidden", "fixed"])
def test_the_loop_is_the_papers_simulation(family: str, gate_input: Input) -> None:
    """Logits and layers of every token, in a batch where each skips others; rows are counted."""
    backbone, own = opened(family), gates(gate_input)
    prompts = texts_of(backbone, [7, 3, 12], seed=2)
    with counted(backbone) as work:
        ids, depths, logits = run(backbone, own, prompts)
    for prompt, answer, layers, seen in zip(prompts, ids, depths, logits, strict=True):
        wanted, counts = simulated(own, prompt + answer, len(prompt))
        assert layers == counts
        assert_close(wanted, seen)
    ran = sum(sum(layers) for layers in depths) + 6 * sum(len(p) - 1 for p in prompts)
    assert work.total("output") == ran
    assert work.total("key") == 6 * sum(len(p) + 9 for p in prompts)
    assert len({depth for text in depths for depth in text}) >= (3 if gate_input == "hidden" else 1)


def test_a_text_in_company_is_the_text_alone() -> None:
    """Also where a text ends and another takes its place."""
    backbone, own = opened("llama"), gates()
    prompts = texts_of(backbone, [7, 3, 12, 5], seed=2)
    together = run(backbone, own, prompts, size=3)
    for i, prompt in enumerate(prompts):
        ids, depths, logits = run(backbone, own, [prompt])
        assert (together[0][i], together[1][i]) == (ids[0], depths[0])
        assert_close(logits[0], together[2][i])


def test_gates_that_always_run_are_the_model() -> None:
    """Plain decoding, token for token; those that never do run the layers without a gate."""
    backbone = opened("llama")
    prompts = texts_of(backbone, [7, 3], seed=2)
    ids, depths, _ = run(backbone, gates(bias=-1e6), prompts)
    plain, _ = collected(decode(backbone, [Recorder().request(p, 10) for p in prompts]), 2)
    assert ids == plain
    assert {depth for text in depths for depth in text} == {6}
    _, depths, _ = run(backbone, gates(bias=1e6), prompts)
    assert {depth for text in depths for depth in text} == {2}


def test_fixed_input_is_one_path_for_every_token() -> None:
    """The paper's ablation: what a gate cannot see it cannot depend on."""
    backbone = opened("llama")
    prompts = texts_of(backbone, [7, 3, 12], seed=2)
    _, depths, _ = run(backbone, gates("fixed"), prompts)
    assert len({depth for text in depths for depth in text}) == 1
    own = gates("fixed")
    states = torch.randn(50, backbone.shape.hidden_size)
    for layer in LAYERS:
        assert len(own.runs(layer, states).unique()) == 1
        assert len(gates().runs(layer, states).unique()) == 2


@pytest.mark.parametrize("family", BOTH)
def test_an_interrupted_step_leaves_texts_as_they_were(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens come after an error in the middle of a step as without one."""
    backbone, own = opened(family), gates()
    [prompt] = texts_of(backbone, [7], seed=2)
    text = Text([*prompt], backbone.open())
    text.ids.append(int(skip_step(backbone, [text], own).logits.argmax()))  # the prompt is read
    fill = type(backbone).fill

    def go_on() -> None:
        while len(text.ids) < len(prompt) + 10:
            text.ids.append(int(skip_step(backbone, [text], own).logits.argmax()))

    def broken(self: Any, layers: Any, *rest: Any) -> None:
        fill(self, layers, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "fill", broken)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    assert text.done == len(text.ids) - 1
    go_on()
    ids, _, _ = run(backbone, own, [prompt])
    assert text.ids[len(prompt) :] == ids[0]
    backbone.close(text.slot)


# -- files and plans


def test_tuned_gates_are_run(model: Path, rows: Path, tmp_path: Path, shell: Shell) -> None:
    """What 'tune --recipe skip' writes, 'generate --skip' runs, with the input it was given."""
    chosen = settings("skip", alpha=20.0, gate_input="fixed", epochs=2, rows=4)
    folder = tune(str(model), [str(rows)], chosen, tmp_path / "out").folder
    file = folder / "gates.safetensors"
    own = load_skip_gates(file)
    assert (own.facts.gate_input, own.facts.num_layers) == ("fixed", 6)
    assert set(own.weights) == set(LAYERS)
    asked = ("--prompt", "say cat:", "--max-new-tokens", 6, "--backbone", "hf", "--skip", file)
    told = shell.json("generate", folder, *asked)
    assert told["plan"]["run"] == {"kind": "skip", "gates": str(file)}
    ones = torch.ones(1, own.weights[1].shape[1])
    executed = 2 + sum(int(own.runs(layer, ones)) for layer in LAYERS)
    assert told["depth_histogram"] == {str(executed): told["tokens"]}


def test_skip_gates_survive_the_disk(tmp_path: Path) -> None:
    """What is saved is what a plan runs."""
    backbone, path = opened("llama"), tmp_path / "g.safetensors"
    gates().save(path)
    plan = Plan(run=Skip(gates=str(path)))
    plan.check(backbone)
    assert not plan.lossless
    [prompt] = texts_of(backbone, [7], seed=2)
    requests = [Recorder().request(prompt, 10)]
    ids, depths = collected(execute(backbone, requests, plan.run), 1)
    assert (ids, depths) == run(backbone, gates(), [prompt])[:2]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


WRONG: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "a layer too deep": lambda facts, _: facts.update(num_layers=4),
    "an input nobody knows": lambda facts, _: facts.update(gate_input="moon"),
    "an unknown key": lambda facts, _: facts.update(extra=1),
    "an earlier format": lambda facts, _: facts.update(format=1),
    "no model": lambda facts, _: facts.pop("fingerprint"),
    "no bias": lambda _, parts: parts.pop("2.bias"),
    "one tensor more": lambda _, parts: parts.update({"2.more": torch.zeros(2)}),
    "a name that is no layer": lambda _, parts: parts.update(weight=torch.zeros(2)),
    "another width": lambda _, parts: parts.update({"2.weight": torch.zeros(2, 3)}),
    "half precision": lambda _, parts: parts.update({"2.bias": torch.zeros(2).half()}),
    "a weight that is no number": lambda _, parts: parts["2.weight"][0, 0].fill_(torch.nan),
    "nothing": lambda _, parts: parts.clear(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_gates_that_do_not_go_together_are_refused(tmp_path: Path, wrong: str) -> None:
    """Before they steer anything."""
    path = tmp_path / "g.safetensors"
    gates().save(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["offramp_skip"])
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(parts, path, {"offramp_skip": json.dumps(facts), "sha256": gates().digest})
    load_skip_gates(path)
    WRONG[wrong](facts, parts)
    save_file(parts, path, {"offramp_skip": json.dumps(facts)})
    with pytest.raises(OfframpError, match="no file of offramp skip gates"):
        load_skip_gates(path)


CHANGED: dict[str, Change] = {
    "one weight": lambda _, parts: parts["2.weight"][1, 0].add_(1.0),
    "one bias": lambda _, parts: parts["4.bias"].neg_().add_(1.0),
    "two layers in each other's place": lambda _, parts: parts.update(
        {
            f"{here}.{name}": parts[f"{there}.{name}"].clone()
            for here, there in ((2, 4), (4, 2))
            for name in ("weight", "bias")
        }
    ),
    "a layer fewer": lambda _, parts: [parts.pop(f"3.{name}") for name in ("weight", "bias")],
    "a layer's number": lambda _, parts: parts.update(
        {f"5.{name}": parts.pop(f"4.{name}") for name in ("weight", "bias")}
    ),
    "the input": lambda said, _: said.update(
        offramp_skip=said["offramp_skip"].replace("hidden", "fixed")
    ),
    "the model": lambda said, _: said.update(
        offramp_skip=said["offramp_skip"].replace('"fingerprint":"', '"fingerprint":"0')
    ),
    **DIGEST_CHANGES,
}


@pytest.mark.parametrize("change", CHANGED)
def test_tampered_skip_gates_are_refused(tmp_path: Path, change: str) -> None:
    """Whatever was changed, and though what is left is a file of skip gates."""
    path = tmp_path / "g.safetensors"
    gates().save(path)
    tamper(path, CHANGED[change])
    with pytest.raises(OfframpError, match="was changed since it was written"):
        load_skip_gates(path)


def test_other_files_and_models_are_refused(tmp_path: Path) -> None:
    """A missing file, one without facts, a model of another width, depth or fingerprint."""
    path = tmp_path / "g.safetensors"
    with pytest.raises(OfframpError, match="cannot read the skip gates"):
        load_skip_gates(path)
    save_file({"1.weight": torch.zeros(2, 3), "1.bias": torch.zeros(2)}, path)
    with pytest.raises(OfframpError, match="no file of offramp skip gates"):
        load_skip_gates(path)
    own = gates().facts
    for other in (
        gates(width=7),
        replace(gates(), facts=own.model_copy(update={"num_layers": 9})),
        replace(gates(), facts=own.model_copy(update={"fingerprint": "another"})),
    ):
        with pytest.raises(UsageError, match="skip gates were trained with"):
            next(skip(opened("llama"), [Recorder().request([5], 1)], other))


def test_forced_answers_lose_what_a_full_pass_says(tiny: offramp.Model) -> None:
    """The experiment's arms: all layers as static gates, and a path as it is without any."""
    shape = tiny.backbone.shape
    examples = [Example(list(range(40, 60)), 5), Example(list(range(90, 110)), 9)]
    texts = [(one.ids, one.first) for one in examples]
    loss = record(tiny.backbone, texts, ()).loss.mean().item()
    every = skip_gates.static(tiny, range(shape.num_layers))
    row = skip_gates.arm(tiny, every, examples, "all layers")
    assert row["loss"] == pytest.approx(loss, abs=1e-4)
    assert (row["layers"], row["spread"], row["operations"]) == (shape.num_layers, 0, 1)
    some = skip_gates.arm(tiny, skip_gates.static(tiny, [0, 2, 5]), examples, "three")
    assert (some["layers"], some["spread"]) == (3, 0)
    assert some["operations"] < 1
    kept = list(skip_gates.paths(tiny, examples, examples, [3]))
    assert [one["layers"] for one in kept] == [3, 3]
