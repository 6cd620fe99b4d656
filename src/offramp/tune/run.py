"""A tuning run from model and data to a folder that opens like any model."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.card import Base, Card, Recipe, read_card
from offramp.card import Data as CardData
from offramp.errors import OfframpError, UsageError
from offramp.files import write_text
from offramp.hf.adapter import find_layers
from offramp.hf.backbone import fingerprint
from offramp.hf.load import load_checkpoint, quiet
from offramp.machine import versions
from offramp.model import load
from offramp.policy import check_exits
from offramp.tune.answers import answer
from offramp.tune.data import Data, Example, read_examples
from offramp.tune.finish import write_tuned
from offramp.tune.log import draw, read_log
from offramp.tune.loop import make_accelerator, train
from offramp.tune.network import Net
from offramp.tune.recipes import find
from offramp.tune.report import draw_reliability, judge
from offramp.tune.rows import prompts_of, read_rows
from offramp.tune.settings import Settings
from offramp.tune.state import Run, clear_state

REPORT = "report.json"
_BEFORE = "before.json"
Figures = dict[str, list[dict[str, Any]]]
"""Rows of :func:`offramp.tune.report.judge`, by the name of the text judged on."""


@dataclass(frozen=True)
class Tuned:
    """What came out of a run."""

    folder: Path
    card: Card
    before: Figures
    after: Figures


def tune(
    name: str | None,
    data: Sequence[str],
    settings: Settings,
    out: Path,
    *,
    watch: Sequence[str] = (),
    limit: int | None = None,
    skip_bad: bool = False,
    save_every: int = 25,
    trust_remote_code: bool = False,
) -> Tuned:
    """Tune a model on data and write it to a folder; the same call goes on after a kill.

    Args:
        name: hub id, local folder or GGUF file; None for the default model.
        data: files or hub ids to train on.
        settings: how.
        out: the folder, which takes states and log on the way.
        watch: more data that nothing is learnt from, judged before and after.
        limit: read no more rows than this.
        skip_bad: count and leave out rows that are wrong.
        save_every: steps between states.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        OfframpError: model or data cannot be read, the folder holds another run or a finished one,
            the loss is no number any more, or something cannot be written.
        UsageError: settings that do not go together, or exits the model does not have.
    """
    check_settings(settings)
    if read_card(out) is not None:
        raise OfframpError(f"{out} holds a tuned model already; name another --out")
    accelerator = make_accelerator(settings)
    material = None
    if settings.answers is not None:
        with accelerator.main_process_first():  # the others then find the answers written
            material = _answered(name, data, settings, out, limit, skip_bad, trust_remote_code)
    model, tokenizer, shown = load_checkpoint(name, trust_remote_code=trust_remote_code)
    started_from = fingerprint(model)  # adapters change its parameters' names
    net, adapted = open_net(model, settings)
    read = partial(
        read_examples,
        tokenizer=tokenizer,
        raw=settings.raw,
        max_length=settings.length,
        skip_bad=skip_bad,
    )
    if material is None:
        material = read(data, limit=limit)
    training, held = hold_out(material.examples, settings)
    judged = {"held out": held} if held else {}
    for source in watch:
        judged[Path(source).name] = read([source]).examples
    run = Run(settings.model_dump(mode="json"), material.files, started_from)
    net.to(accelerator.device)
    before = _before(out, run, lambda: _judged(net, judged, settings, accelerator))
    seen = train(net, training, settings, run, out, accelerator, save_every=save_every)
    after = _judged(net, judged, settings, accelerator)
    card = _card(shown, run, settings, material, seen, net)
    if accelerator.is_main_process:
        report = {"before": before, "after": after, "skipped": material.skipped}
        write_text(out / REPORT, json.dumps(report, indent=1))
        draw(out, read_log(out))
        if held and settings.exits:
            draw_reliability(out, before["held out"], after["held out"])
        write_tuned(out, net, adapted, tokenizer, card)
        clear_state(out)
        (out / _BEFORE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return Tuned(out, card, before, after)


def _answered(
    name: str | None,
    data: Sequence[str],
    settings: Settings,
    out: Path,
    limit: int | None,
    skip_bad: bool,
    trust_remote_code: bool,
) -> Data:
    """Return the prompts of the data with answers by a model; opened for that alone."""
    rows = read_rows(data, answers=False, limit=limit, skip_bad=skip_bad)
    speaker = load(
        name if settings.answers == "self" else settings.answers,
        weights=settings.answer_weights,
        trust_remote_code=trust_remote_code,
    )
    made = answer(
        speaker,
        prompts_of(rows.rows),
        out,
        rows.files,
        raw=settings.raw,
        length=settings.length,
        max_new_tokens=settings.answer_tokens,
    )
    made.skipped |= rows.faults.counts
    return made


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not go together, before anything is loaded.

    Raises:
        UsageError: they do not.
    """
    find(settings.recipe)
    own = settings.readout != "shared"
    if (settings.recipe == "heads") != own:
        raise UsageError("--readout affine, head or block goes with --recipe heads, and only there")
    if settings.recipe not in ("sft", "skip") and not settings.exits:
        raise UsageError(f"--recipe {settings.recipe} needs --exits DEPTH,...")
    if own and (settings.lora or settings.distill):
        raise UsageError(
            "--recipe heads trains readouts on the last layer's distribution: it takes neither "
            "--lora nor --distill"
        )
    if settings.teacher == "base" and not settings.distill:
        raise UsageError("--teacher says who is distilled: give --distill SHARE, too")


def open_net(model: Any, settings: Settings) -> tuple[Net, Any]:
    """Return the model opened for a recipe, and the peft model around it or None.

    Raises:
        UsageError: exits that the model does not have.
        OfframpError: adapters are wanted, but peft is not installed.
    """
    teacher = copy.deepcopy(model) if settings.teacher == "base" else None
    adapted = _with_adapters(model, settings) if settings.lora else None
    net = Net(model, settings.exits, settings.readout, teacher)
    check_exits(settings.exits, net.num_layers)
    return net, adapted


def _with_adapters(model: Any, settings: Settings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise OfframpError("--lora needs peft: pip install 'offramp[tune]'") from error
    linear = (nn.Linear, Conv1D)
    layers = find_layers(model)
    config = LoraConfig(
        r=settings.lora,
        lora_alpha=2 * settings.lora,
        target_modules=sorted(
            {
                name.rpartition(".")[2]
                for layer in layers
                for name, module in layer.named_modules()
                if isinstance(module, linear)
            }
        ),
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(settings.lora_layers or len(layers))),
    )
    with quiet():
        return get_peft_model(model, config)


def hold_out(
    examples: Sequence[Example], settings: Settings
) -> tuple[list[Example], list[Example]]:
    """Return (what is trained on, what is kept out); a function of the seed.

    Raises:
        UsageError: nothing would be left to train on.
    """
    order = list(range(len(examples)))
    random.Random(f"held out:{settings.seed}").shuffle(order)
    if len(order) <= settings.held_out:
        raise UsageError(
            f"--held-out {settings.held_out} leaves none of {len(order)} examples to train on"
        )
    held = sorted(order[: settings.held_out])
    kept = sorted(order[settings.held_out :])
    return [examples[i] for i in kept], [examples[i] for i in held]


def _judged(
    net: Net, judged: dict[str, list[Example]], settings: Settings, accelerator: Accelerator
) -> Figures:
    with accelerator.autocast():
        return {
            name: judge(net, examples, settings.length, accelerator.device)
            for name, examples in judged.items()
        }


def _before(out: Path, run: Run, measure: Any) -> Figures:
    """Return the figures of the untouched model: measured once, kept for when a run goes on."""
    path = out / _BEFORE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["model"] == run.model and kept["data"] == dict(run.data):
            figures: Figures = kept["figures"]
            return figures
    except (OSError, ValueError, KeyError, TypeError):
        pass
    figures = measure()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OfframpError(f"cannot make the folder {out}: {error.strerror}") from error
    kept = {"model": run.model, "data": dict(run.data), "figures": figures}
    write_text(path, json.dumps(kept))
    return figures


def _card(shown: str, run: Run, settings: Settings, material: Data, seen: int, net: Net) -> Card:
    return Card(
        base=Base(name=shown, fingerprint=run.model),
        exits=settings.exits,
        readouts={int(depth): net.kind for depth in net.readouts},
        recipe=Recipe(name=settings.recipe, settings=settings.model_dump(mode="json")),
        data=CardData(files=material.files, texts=len(material.examples), tokens=seen),
        versions=versions(),
    )
