"""What comes with offramp: exits over the default model, half of its layers for a narrow task."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import offramp
from offramp import shipped
from offramp.batch import Span, Text
from offramp.fast.pack import Format
from offramp.plan import read_plan
from offramp.runs import Exit
from offramp.text import encode
from offramp.trace import record

NAMES = ["The Amber Kettle", "Blue Lantern"]
MEANINGS = [
    f"name: {NAMES[0]} | type: pub | food: Greek | price: cheap | area: riverside\nText:",
    f"name: {NAMES[1]} | type: coffee shop | rating: 5 out of 5 | near: The Rusty Fox\nText:",
]
PROMPTS = ["Why is the sky blue?", "Name three fruits.", "Write a haiku about rain."]


def test_a_local_folder_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name never hides what the user has; any other name is a path."""
    assert shipped.folder("elsewhere") is shipped.folder(None) is None
    assert shipped.plan("my.json") == Path("my.json")
    monkeypatch.chdir(tmp_path)
    for name in shipped.PLANS:
        assert shipped.plan(name).is_file()
        assert shipped.folder(name) in (None, shipped.plan(name).parent)
        (tmp_path / name).mkdir()
        assert shipped.folder(name) is None
        assert shipped.plan(name) == Path(name)


def test_a_plan_is_not_taken_for_a_model() -> None:
    """Before the hub is asked for it."""
    with pytest.raises(offramp.UsageError, match="--plan default-int4"):
        offramp.load(shipped.REFINED)


def test_all_of_it_is_small() -> None:
    """25 MB at most: everybody who installs offramp takes it along."""
    assert sum(f.stat().st_size for f in Path(shipped.__file__).parent.rglob("*")) < 25e6


@pytest.mark.real
def test_the_exits_leave_the_model_as_it_was_and_know_it(smol: offramp.Model) -> None:
    """Full depth is the untouched model's; an exit agrees far more often than without its block."""
    taught = offramp.load(shipped.EXITS, backbone="hf")
    assert taught.name == shipped.EXITS
    assert taught.card is not None
    exits = taught.card.exits
    own = smol.generate(PROMPTS, max_new_tokens=24)
    assert [one.text for one in taught.generate(PROMPTS, max_new_tokens=24).outputs] == [
        one.text for one in own.outputs
    ]
    texts = []
    for prompt, output in zip(PROMPTS, own.outputs, strict=True):
        ids = encode(smol.tokenizer, prompt)
        texts.append((ids + list(output.token_ids), len(ids)))
    before, after = (
        record(model.backbone, texts, exits).agrees.float().mean(0) for model in (smol, taught)
    )
    assert torch.all(after > before + 0.1)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "source", "weights", "prompts"),
    [
        (shipped.EXITS, shipped.EXITS, "int8", PROMPTS),
        (shipped.NARROW, shipped.NARROW, "int8", MEANINGS),
    ],
)
def test_a_plan_is_certified_for_its_model_and_spares_work(
    name: str, source: str | None, weights: Format, prompts: list[str]
) -> None:
    """As sealed: nobody changed it, it is for these weights, and tokens do leave."""
    plan = read_plan(shipped.plan(name))
    assert plan.certificate is not None
    assert plan.certificate.weights == weights
    model = offramp.load(source, weights=weights)
    plan.check(model.backbone)
    assert isinstance(plan.run, Exit)
    said = model.generate(prompts, plan=plan, max_new_tokens=24)
    depths = [depth for one in said.outputs for depth in one.depths]
    assert min(depths) in plan.run.thresholds
    assert said.figures.work.head_rows < 0.8 * len(depths)  # who leaves is spared the full head


@pytest.mark.real
def test_a_refined_head_chooses_as_the_weights_do(smol: offramp.Model) -> None:
    """Its tokens are the choice of the whole head in fp32 from the same states in int4.

    And so are those of the head in int8 that plain decoding reads.
    """
    plan = read_plan(shipped.plan(shipped.REFINED))
    model = offramp.load(weights="int4")
    backbone, layers = model.backbone, range(model.backbone.shape.num_layers)
    plan.check(backbone)
    said = model.generate(PROMPTS, plan=plan, max_new_tokens=24)
    assert said.figures.work.head_rows == 0
    plain = model.generate(PROMPTS, max_new_tokens=24)
    assert [one.token_ids for one in plain.outputs] == [one.token_ids for one in said.outputs]
    for prompt, output in zip(PROMPTS, said.outputs, strict=True):
        asked, new = encode(model.tokenizer, prompt), list(output.token_ids)
        text, states = Text(asked + new[:-1], backbone.open()), []
        for start, stop in pairwise([0, *range(len(asked), len(text.ids) + 1)]):
            spans = [Span(text, start, stop)]
            states.append(backbone.run(layers, backbone.embed(spans), spans)[-1:])
        exact = smol.backbone.readout(torch.cat(states), len(layers))
        assert exact.argmax(-1).tolist() == new


@pytest.mark.real
def test_sixteen_layers_write_a_sentence_that_repeats_the_names() -> None:
    """Names that nobody taught it; the default model, asked as plainly, does not know the task."""
    model = offramp.load(shipped.NARROW, weights="int8")
    assert model.backbone.shape.num_layers == 16
    plan = read_plan(shipped.plan(shipped.NARROW))
    for output, name in zip(
        model.generate(MEANINGS, plan=plan, max_new_tokens=48).outputs, NAMES, strict=True
    ):
        assert name in output.text
        assert output.finish_reason == "stop"
