"""Opens a model for a recipe, and refuses settings that do not go together."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.errors import OfframpError, UsageError
from offramp.hf.adapter import find_layers
from offramp.hf.load import quiet
from offramp.hf.tuned import Tuned, is_whole, load_tuned
from offramp.policy import check_exits
from offramp.tune.gradients import seeded
from offramp.tune.network import Net
from offramp.tune.recipes import find
from offramp.tune.rounding import round_layers
from offramp.tune.settings import Settings


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not go together, before anything is loaded.

    Raises:
        UsageError: they do not.
        OfframpError: matplotlib is not installed.
    """
    find(settings.recipe)
    check_exits(settings.exits, max(settings.exits, default=0) + 1)  # how many layers, later
    own = settings.readout != "shared"
    if settings.recipe == "heads" and not own:
        raise UsageError("--recipe heads needs --readout affine, head or block")
    if settings.recipe in ("sft", "gates", "skip") and own:
        raise UsageError(f"--recipe {settings.recipe} trains no --readout {settings.readout}")
    if settings.recipe not in ("sft", "skip") and not settings.exits:
        raise UsageError(f"--recipe {settings.recipe} needs --exits DEPTH,...")
    if settings.recipe in ("heads", "gates") and (settings.lora or settings.distill):
        raise UsageError(
            f"--recipe {settings.recipe} leaves the model alone and learns from its last layer: it "
            "takes neither --lora nor --distill"
        )
    if settings.teacher != "last" and not settings.distill:
        raise UsageError("--teacher says who is distilled: give --distill SHARE, too")
    if settings.recipe in ("sft", "skip") and settings.distill and settings.teacher == "last":
        raise UsageError(
            f"--recipe {settings.recipe} trains the last layer alone, which --distill cannot teach "
            "itself: give --teacher base or a model, too"
        )
    if settings.rounding != "none" and (settings.lora or settings.recipe in ("heads", "gates")):
        raise UsageError(
            "--rounding is for recipes that train all weights: adapters are rounded when they have "
            "been merged, and --recipe heads and gates leave the model alone"
        )
    if settings.lora_layers and not settings.lora:
        raise UsageError("--lora-layers says which layers get adapters: give --lora RANK, too")
    if find_spec("matplotlib") is None:
        raise OfframpError("tuning draws its losses: pip install 'offramp[tune]'")


def open_origin(name: str | None, settings: Settings, *, trust_remote_code: bool = False) -> Tuned:
    """Open what is to be tuned, with the readouts of its exits that this run goes on with.

    Args:
        name: a whole checkpoint, or readouts over one that they left as it was.
        settings: which exits are taught, and what reads them out.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        UsageError: it is an adapter, which would be tuned without the model below it; it is
            readouts, and no exit goes on with one; or it learnt prompts as they are and would now
            be asked in another way.
        OfframpError: it cannot be opened.
    """
    origin = load_tuned(name, trust_remote_code=trust_remote_code)
    card, whole = origin.card, is_whole(name)
    if origin.changed and not whole:
        raise UsageError(
            f"{name} is an adapter, and what lies below it would be tuned without it: make one "
            "checkpoint of both (offramp export, with all its layers)"
        )
    if card is not None and card.recipe.settings.get("raw") is True and not settings.raw:
        raise UsageError(f"{name} was tuned on prompts as they are: give --raw here, too")
    going_on = {
        depth: readout
        for depth, readout in origin.readouts.items()
        if depth in settings.exits and readout.kind == settings.readout
    }
    if not going_on and not whole:
        owned = {} if card is None else card.readouts
        had = [f"{kind} at {depth}" for depth, kind in sorted(owned.items())]
        raise UsageError(
            f"{name} is another model with what its exits own ({', '.join(had) or 'gates'}), none "
            "of which goes on: give such --exits and --readout, or tune that model"
        )
    return replace(origin, readouts=going_on)


def open_teacher(origin: Tuned, settings: Settings, *, trust_remote_code: bool = False) -> Any:
    """Return the model that is distilled, or None where it is the tuned model's own last layer.

    Args:
        origin: what is to be tuned, as yet unchanged.
        settings: who the teacher is; a tuned model of any form may be one, at its full depth.
        trust_remote_code: run modelling code that comes with the teacher.

    Raises:
        OfframpError: the teacher cannot be opened.
        UsageError: it speaks other tokens.
    """
    if settings.teacher == "last":
        return None
    if settings.teacher == "base":
        return copy.deepcopy(origin.model)
    teacher = load_tuned(settings.teacher, trust_remote_code=trust_remote_code)
    words = [len(m.get_output_embeddings().weight) for m in (origin.model, teacher.model)]
    if words[0] != words[1] or origin.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UsageError(
            f"--teacher {settings.teacher} speaks other tokens than the model to be taught: its "
            "distribution says nothing about theirs"
        )
    return teacher.model


def open_net(origin: Tuned, settings: Settings, teacher: Any = None) -> tuple[Net, Any]:
    """Return the model opened for a recipe, and the peft model around it or None.

    Args:
        origin: what is to be tuned, see :func:`open_origin`.
        settings: how.
        teacher: another model that is distilled, see :func:`open_teacher`.

    Raises:
        UsageError: exits, or layers for adapters, that the model does not have.
        OfframpError: adapters are wanted, but peft is not installed; or readouts do not fit.
    """
    model = origin.model
    net = Net(model, settings.exits, settings.readout, teacher)
    check_exits(settings.exits, net.num_layers)
    for depth, readout in origin.readouts.items():
        try:
            net.readouts[str(depth)].load_state_dict(readout.tensors)
        except RuntimeError as error:  # names or shapes
            raise OfframpError(
                f"the {readout.kind} of exit {depth} in {origin.name} is of another model"
            ) from error
    if settings.rounding == "int4":
        round_layers(net.adapter.layers)
    # Last, and in place: an exit's block starts as a plain copy of the last layer.
    return net, _with_adapters(model, settings) if settings.lora else None


def _with_adapters(model: Any, settings: Settings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise OfframpError("--lora needs peft: pip install 'offramp[tune]'") from error
    linear = (nn.Linear, Conv1D)
    layers = find_layers(model)
    if settings.lora_layers > len(layers):
        raise UsageError(
            f"--lora-layers {settings.lora_layers}: the model has {len(layers)} layers"
        )
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
    with quiet(), seeded(settings.seed):
        return get_peft_model(model, config)
