"""Open a checkpoint, or say in one line why it cannot be opened. safetensors only; nothing is unpickled."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from llmprune_kernels import FormatError
from llmprune_kernels.checkpoint_format import METHOD
from llmprune_kernels.huggingface import register
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from llmprune_eval.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "float16", "bfloat16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a local folder or Hub model, checked to be a decoder-only causal language model.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    if not os.path.exists(name) and _looks_like_a_path(name):
        raise InputError(f"model '{name}' does not exist: give a folder with a Hugging Face checkpoint")
    if os.path.isfile(name):
        raise InputError(f"model '{name}' is a file: give the folder with its config.json and weights")
    if os.path.exists(name) and not Path(name, "config.json").is_file():
        raise InputError(f"{name} has no config.json: give a folder with a Hugging Face checkpoint")
    _check_entries(name)
    with _opening(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    _check_kind(name, config, trust_remote_code)
    return config


def _check_entries(name: str) -> None:
    """Raise InputError for a quantization_config that transformers cannot read; all else it says itself."""
    file = Path(name, "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    entries = config.get("quantization_config") if isinstance(config, dict) else None
    if entries is not None and not isinstance(entries, dict):
        raise InputError(
            f"{file}: quantization_config is {entries!r}, not a table of entries: copy or download the model again"
        )


def load_model(
    name: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model on the CPU, a device, or spread by a device map, every weight from the checkpoint.

    Packed models are opened packed.

    Raises:
        InputError: it cannot be opened, lacks weights, or holds NaN or infinity.
    """
    check_dtype(dtype)
    load_config(name, trust_remote_code)
    if Path(name).is_dir():
        check_weight_files(Path(name))
    with _opening(name):
        register()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{name} does not hold {missing[0]} in the shape its config asks for ({len(missing)} such weights): "
            "the checkpoint is incomplete or its config belongs to another model"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        log.warning("%s: %s has no place for %d of its weights (%s, ...): they are left out", name,
                    type(model).__name__, len(unused), unused[0])  # fmt: skip
    check_finite(model)
    place: Any = model.eval()
    return model if device is None else cast("PreTrainedModel", place.to(device))


def empty_model(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, without weights: all parameters are on the meta device, and dense.

    Raises:
        InputError: there is no such model, or its config makes no sense.
    """
    check_dtype(dtype)
    config = load_config(name, trust_remote_code)
    own = config.dtype or torch.float32
    with _opening(name), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=own if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    return model


def check_dtype(name: str) -> None:
    """Raise InputError for a name of no dtype."""
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is unknown: use one of {', '.join(DTYPES)}")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies with the model, or None if there is none."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # nothing narrower: for a wrong schema the tokenizers library raises just that
        raise InputError(
            f"the tokenizer of {name} cannot be opened ({_reason(error)}): copy the tokenizer files of the original "
            "model again"
        ) from error


def check_finite(model: PreTrainedModel) -> None:
    """Raise InputError that names the first weight with NaN or infinity, or that is not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} is not in memory (offloaded): load the model on the CPU, without a device map")
        if parameter.is_inference():
            raise InputError(f"{name} was made under torch.inference_mode(), where weights are fixed: load it outside")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise InputError(
                f"{name} holds NaN or infinity: the checkpoint is damaged (download it again), or overflows in "
                f"{parameter.dtype} (try another --dtype)"
            )


def check_weight_files(folder: Path) -> None:
    """Raise InputError unless a folder holds whole safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when opened: convert it to "
                "safetensors first (save_pretrained of a current transformers does)"
            )
        raise InputError(f"{folder} holds no weights: {WEIGHTS} is missing")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or damaged ({_reason(error)}): download it again") from error
    if not (folder / WEIGHTS).is_file():
        _check_shards(folder)


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: download what is missing")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [shard for shard in shards if not Path(folder, shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({_reason(error)}): download it again") from error
    if absent:
        raise InputError(f"{folder} lacks {absent[0]} ({len(absent)} of {len(shards)} shards): download it again")


def _check_kind(name: str, config: Any, trust_remote_code: bool) -> None:
    architectures = config.architectures or []
    wanted = "only decoder-only causal language models can be pruned"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model ({config.model_type}): {wanted}")
    causal = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ([v] if isinstance(v, str) else v)}
    remote = trust_remote_code and getattr(config, "auto_map", None)
    if architectures and not remote and not causal & set(architectures):
        raise InputError(f"{name} is a {architectures[0]}, no causal language model: {wanted}")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        raise InputError(f"{name} is an encoder-only model ({config.model_type}): {wanted}")
    if getattr(config, "quantization_config", None) is not None and not is_packed(config):
        raise InputError(f"{name} is quantised: prune the original weights first, then quantise")


def is_packed(config: Any) -> bool:
    """True for the config of a checkpoint that llmprune has packed, loaded or as transformers reads it."""
    entries = getattr(config, "quantization_config", None)
    method = entries.get("quant_method") if isinstance(entries, dict) else getattr(entries, "quant_method", None)
    return bool(method == METHOD)


def _looks_like_a_path(name: str) -> bool:
    """False for what can be a Hub name: one word, or owner/name where no folder of the owner's name is here."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.exists())


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Whatever transformers raises about a checkpoint or its config, as one line."""
    try:
        yield
    except FormatError as error:  # says what to do
        raise InputError(f"{name}: {error}") from error
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, ZeroDivisionError,
        SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        reason = _reason(error)
        if os.path.exists(name):
            raise InputError(f"{name} cannot be opened ({reason}): give a whole Hugging Face checkpoint") from error
        raise InputError(
            f"model '{name}' is no local folder and cannot be had from the Hub ({reason}): pass the path of a local "
            "folder"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an exception says, or the line that matters."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
