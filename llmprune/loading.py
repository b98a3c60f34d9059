"""Open a checkpoint, or say in one line why it cannot be opened. safetensors only; nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from llmprune.errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a local folder or Hub model, checked to be a decoder-only causal language model.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    folder = Path(name)
    if not folder.exists() and _looks_like_a_path(name):
        raise InputError(f"model '{name}' does not exist: give a folder with a Hugging Face checkpoint")
    if folder.is_file():
        raise InputError(f"model '{name}' is a file: give the folder with its config.json and weights")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json: give a folder with a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_cannot_open(name, error)) from error
    _check_kind(name, config, trust_remote_code)
    return config


def load_model(
    name: str, dtype: str = "auto", trust_remote_code: bool = False, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model on the CPU or a device, every weight of it from the checkpoint.

    Raises:
        InputError: it cannot be opened, lacks weights, or holds NaN or infinity.
    """
    load_config(name, trust_remote_code)
    if Path(name).is_dir():
        check_weight_files(Path(name))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise InputError(_cannot_open(name, error)) from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise InputError(
            f"{name} does not hold {missing[0]} in the shape its config asks for ({len(missing)} such weights): "
            "the checkpoint is incomplete or its config belongs to another model"
        )
    assert isinstance(model, PreTrainedModel)
    check_finite(model)
    place: Any = model.eval()
    return model if device is None else cast(PreTrainedModel, place.to(device))


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies with the model, or None if there is none."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {name} cannot be opened: {_first_line(error)}") from error


def check_finite(model: PreTrainedModel) -> None:
    """Raise InputError that names the first weight with NaN or infinity, or that is not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} is not in memory (offloaded): load the model on the CPU, without a device map")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise InputError(f"{name} holds NaN or infinity: the checkpoint is damaged")


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
        raise InputError(f"{folder} holds no weights: model.safetensors is missing")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or damaged ({_first_line(error)}): download it again") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({_first_line(error)}): download it again") from error
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
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
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantised: prune the original weights first, then quantise")


def _looks_like_a_path(name: str) -> bool:
    """False for what can be a Hub name: one word, or owner/name where no folder of the owner's name is here."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.exists())


def _cannot_open(name: str, error: Exception) -> str:
    reason = _first_line(error)
    if Path(name).exists():
        return f"{name} cannot be opened: {reason}"
    return (
        f"model '{name}' is no local folder and cannot be had from the Hub ({reason}): pass the path of a local folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
