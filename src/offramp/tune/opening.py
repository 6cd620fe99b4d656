"""Opens a model for a recipe, and refuses settings that do not go together."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.errors import OfframpError, UsageError
from offramp.hf.adapter import find_layers
from offramp.hf.load import quiet
from offramp.hf.tuned import is_whole
from offramp.policy import check_exits
from offramp.tune.gradients import seeded
from offramp.tune.network import Net
from offramp.tune.recipes import find
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
    if settings.teacher == "base" and not settings.distill:
        raise UsageError("--teacher says who is distilled: give --distill SHARE, too")
    if settings.recipe in ("sft", "skip") and settings.distill and settings.teacher == "last":
        raise UsageError(
            f"--recipe {settings.recipe} trains the last layer alone, which --distill cannot teach "
            "itself: give --teacher base, too"
        )
    if settings.lora_layers and not settings.lora:
        raise UsageError("--lora-layers says which layers get adapters: give --lora RANK, too")
    if find_spec("matplotlib") is None:
        raise OfframpError("tuning draws its losses: pip install 'offramp[tune]'")


def must_be_whole(name: str | None) -> None:
    """Refuse an adapter or readouts, which would be tuned without the model below them.

    Raises:
        UsageError: the folder holds no whole checkpoint.
    """
    if not is_whole(name):
        raise UsageError(
            f"{name} holds an adapter or readouts over another model: tune that one, or a whole "
            "checkpoint"
        )


def open_net(model: Any, settings: Settings) -> tuple[Net, Any]:
    """Return the model opened for a recipe, and the peft model around it or None.

    Raises:
        UsageError: exits, or layers for adapters, that the model does not have.
        OfframpError: adapters are wanted, but peft is not installed.
    """
    teacher = copy.deepcopy(model) if settings.teacher == "base" else None
    net = Net(model, settings.exits, settings.readout, teacher)
    check_exits(settings.exits, net.num_layers)
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
