"""A tuning run from model and data to a folder that opens like any model."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from offramp.card import Base, Card, Recipe
from offramp.card import Data as CardData
from offramp.errors import UsageError
from offramp.files import write_text
from offramp.hf.backbone import fingerprint
from offramp.hf.load import DEFAULT_MODEL
from offramp.hf.tuned import at_full_depth
from offramp.machine import versions
from offramp.model import load
from offramp.policy import check_exits
from offramp.sketch import sketched
from offramp.tune.answers import answer
from offramp.tune.data import Data, Example, read_examples
from offramp.tune.figures import Figures, digest, figures_before, judge_all
from offramp.tune.finish import write_tuned
from offramp.tune.log import draw, read_log
from offramp.tune.loop import Tracker, make_accelerator, train
from offramp.tune.network import Net
from offramp.tune.opening import check_settings, open_net, open_origin, open_teacher
from offramp.tune.place import BEFORE, held
from offramp.tune.report import draw_reliability
from offramp.tune.rounding import settle
from offramp.tune.rows import prompts_of, read_rows
from offramp.tune.settings import Settings
from offramp.tune.state import Run, clear_state, must_continue

REPORT = "report.json"
_HELD_OUT = "held out"


@dataclass(frozen=True)
class Tuned:
    """What came out of a run."""

    folder: Path
    card: Card
    before: Figures
    after: Figures
    skipped: dict[str, int]
    """Rows left out, by reason."""
    truncated: int
    """Answers that were cut."""
    main: bool
    """Whether this process is the one of several that reports."""


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
    tracker: Tracker | None = None,
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
        tracker: who is told each step's figures, beside the log in the folder.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        OfframpError: model or data cannot be read, the folder holds another run or a finished one,
            the loss is no number any more, or something cannot be written.
        UsageError: settings that do not go together, or exits the model does not have.
    """
    check_settings(settings)
    accelerator = make_accelerator(settings, tracker, out)
    with held(out, main=accelerator.is_main_process):
        origin = open_origin(name, settings, trust_remote_code=trust_remote_code)
        # Now, as adapters change its parameters' names.
        base = Base(
            name=at_full_depth(name) or DEFAULT_MODEL, fingerprint=fingerprint(origin.model)
        )
        started_from = fingerprint(origin.model, origin.readouts)
        # Before hours of answering: it may be refused.
        teacher = open_teacher(origin, settings, trust_remote_code=trust_remote_code)
        material = None
        if settings.answers is not None:
            with accelerator.main_process_first():  # the others then find the answers written
                material = _answered(
                    name, data, settings, out, limit, skip_bad, trust_remote_code, accelerator
                )
        net, adapted = open_net(origin, settings, teacher)
        read = partial(
            read_examples,
            tokenizer=origin.tokenizer,
            raw=settings.raw,
            max_length=settings.length,
            skip_bad=skip_bad,
        )
        if material is None:
            material = read(data, limit=limit)
        training, kept_out = hold_out(material.examples, settings)
        judged = {_HELD_OUT: kept_out} if kept_out else {}
        for source in watch:
            judged[_free(Path(source).name, judged)] = read([source]).examples
        chosen = settings.model_dump(mode="json")
        taught_by = None if teacher is None else fingerprint(teacher)
        run = Run(chosen, material.files, started_from, digest(material.examples), taught_by)
        must_continue(out, run)
        net.to(accelerator.device)
        figures = partial(judge_all, net, judged, settings, accelerator)
        before = figures_before(out, run, judged, figures, main=accelerator.is_main_process)
        accelerator.init_trackers("offramp", {k: str(value) for k, value in chosen.items()})
        seen = train(net, training, settings, run, out, accelerator, save_every=save_every)
        settle(net.adapter.layers)
        card = _card(base, run, settings, material, seen, net)
        tuned = Tuned(
            out,
            card,
            before,
            figures(),
            material.skipped,
            material.truncated,
            accelerator.is_main_process,
        )
        if tuned.main:
            _write(tuned, net, adapted, origin.tokenizer)
        accelerator.end_training()
        accelerator.wait_for_everyone()
    return tuned


def _write(tuned: Tuned, net: Net, adapted: Any, tokenizer: Any) -> None:
    """Write report, pictures and model, then remove what only an unfinished run needs."""
    out = tuned.folder
    report = {
        "before": tuned.before,
        "after": tuned.after,
        "skipped": tuned.skipped,
        "truncated": tuned.truncated,
    }
    write_text(out / REPORT, json.dumps(report, indent=1))
    draw(out, read_log(out))
    if _HELD_OUT in tuned.after and tuned.card.exits:
        draw_reliability(out, tuned.before[_HELD_OUT], tuned.after[_HELD_OUT])
    write_tuned(out, net, adapted, tokenizer, tuned.card)
    clear_state(out)
    (out / BEFORE).unlink(missing_ok=True)


def _free(name: str, taken: Collection[str]) -> str:
    """Return a name for a text: two files in different folders may share theirs."""
    names = [name, *(f"{name} ({number})" for number in range(2, len(taken) + 3))]
    return next(free for free in names if free not in taken)


def _answered(
    name: str | None,
    data: Sequence[str],
    settings: Settings,
    out: Path,
    limit: int | None,
    skip_bad: bool,
    trust_remote_code: bool,
    accelerator: Accelerator,
) -> Data:
    """Return the prompts of the data with answers by a model; opened for that alone.

    What would be refused after hours of answering is refused before.
    """
    rows = read_rows(data, answers=False, limit=limit, skip_bad=skip_bad)
    prompts = prompts_of(rows.rows)
    if prompts:
        _must_leave_some(len(prompts), settings)
    speaker = load(  # exits have no say in what it answers: all layers are run
        at_full_depth(name) if settings.answers == "self" else settings.answers,
        weights=settings.answer_weights,
        trust_remote_code=trust_remote_code,
    )
    if settings.answers == "self":
        check_exits(settings.exits, speaker.backbone.shape.num_layers)
    made = answer(
        speaker,
        prompts,
        out,
        rows.files,
        raw=settings.raw,
        length=settings.length,
        max_new_tokens=settings.answer_tokens,
        show=accelerator.is_main_process,
    )
    made.skipped |= rows.faults.counts
    return made


def hold_out(
    examples: Sequence[Example], settings: Settings
) -> tuple[list[Example], list[Example]]:
    """Return (what is trained on, what is kept out); a function of the seed.

    Raises:
        UsageError: nothing would be left to train on.
    """
    order = list(range(len(examples)))
    random.Random(f"held out:{settings.seed}").shuffle(order)
    _must_leave_some(len(order), settings)
    held = sorted(order[: settings.held_out])
    kept = sorted(order[settings.held_out :])
    return [examples[i] for i in kept], [examples[i] for i in held]


def _must_leave_some(count: int, settings: Settings) -> None:
    if count <= settings.held_out:
        raise UsageError(
            f"--held-out {settings.held_out} leaves none of {count} examples to train on; hold out "
            "fewer"
        )


def _card(base: Base, run: Run, settings: Settings, material: Data, seen: int, net: Net) -> Card:
    return Card(
        base=base,
        exits=settings.exits,
        readouts={int(depth): net.kind for depth in net.readouts},
        teacher=run.teacher,
        recipe=Recipe(name=settings.recipe, settings=settings.model_dump(mode="json")),
        data=CardData(
            files=material.files,
            texts=len(material.examples),
            tokens=seen,
            prompts=sketched(material.prompts),
        ),
        versions=versions(),
    )
