"""What comes with offramp: exits that leave the default model as it was, and a certified plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offramp
from offramp import shipped
from offramp.plan import read_plan
from offramp.runs import Exit
from offramp.text import encode
from offramp.trace import record

PROMPTS = ["Why is the sky blue?", "Name three fruits.", "Write a haiku about rain."]


def test_a_local_folder_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name never hides what the user has; any other name is a path."""
    assert shipped.folder("elsewhere") is shipped.folder(None) is None
    assert shipped.plan("my.json") == Path("my.json")
    assert shipped.folder(shipped.EXITS) == shipped.plan(shipped.EXITS).parent
    (tmp_path / shipped.EXITS).mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped.folder(shipped.EXITS) is None


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
def test_the_plan_is_certified_for_the_exits_and_runs() -> None:
    """As sealed: nobody changed it, it is for these weights, and tokens do leave."""
    plan = read_plan(shipped.plan(shipped.EXITS))
    assert plan.certificate is not None
    assert plan.certificate.weights == "int8"
    model = offramp.load(shipped.EXITS, weights="int8")
    plan.check(model.backbone)
    assert isinstance(plan.run, Exit)
    depths = model.generate(PROMPTS, plan=plan, max_new_tokens=24).outputs
    assert min(depth for one in depths for depth in one.depths) in plan.run.thresholds
