"""Packed checkpoints in transformers: registered, `from_pretrained` opens them straight into packed layers.

The dense weights never exist: the layers are replaced while the model has no storage yet, and the files hold the
packed tensors under their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune_kernels.checkpoint_format import METHOD, PACK_AGAIN, Expected, check_entries, check_files, guard, known_as
from llmprune_kernels.format import FormatError
from llmprune_kernels.inventory import packed_layers
from llmprune_kernels.linear import MODULES
from llmprune_kernels.packed_linear import PackedLinear
from llmprune_kernels.placement import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The `quantization_config` of a packed checkpoint; see checkpoint_format.

    Attributes:
        format: a name in llmprune_kernels.linear.MODULES.
        version: of the checkpoint's form.
        modules: packed layers by name, each with the number of values that it stores.

    Raises:
        FormatError: an entry is unknown, missing, or of another version.
    """

    quant_method: Any

    def __init__(self, **entries: Any) -> None:
        check_entries(entries)
        if entries["quant_method"] != METHOD:
            raise FormatError(f"quant_method is {entries['quant_method']!r}, not {METHOD!r}")
        self.quant_method = METHOD
        self.format: str = entries["format"]
        self.version: int = entries["version"]
        self.modules: dict[str, int] = dict(entries["modules"])


class PackedQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Puts packed layers into a model before its weights are loaded, and checks them afterwards."""

    quantization_config: PackedConfig

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        """Raise FormatError for a checkpoint that is not packed: nothing is packed while it is loaded."""
        if not self.pre_quantized:
            raise FormatError("this checkpoint is not packed: run `llmprune pack FOLDER -o OUT` and open OUT")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        put_packed_layers(model, self.quantization_config)
        for _, layer in packed_layers(model):
            layer.weight = _passed_over()
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, _every_form(_guard(model), model.base_model_prefix)}
        files: Sequence[str] | None = options.get("checkpoint_files")
        if files:
            check_files(files, expected_tensors(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        _check_all_loaded(model)
        for name, layer in packed_layers(model):
            del layer.weight
            layer.requires_grad_(False)  # transformers has made new parameters
            with _in_memory(layer):
                if next(layer.parameters()).is_meta:  # device_map="meta": there is nothing to look at
                    continue
                try:
                    layer.check()
                except FormatError as error:
                    raise FormatError(f"{name}: {error}; copy or download the file again") from error
        lay_out(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is saved: the canonical tensors, and the guard."""
        return {**model.state_dict(), _guard(model): torch.empty(0, dtype=model.dtype)}, {}

    def is_serializable(self) -> bool:
        """A loaded model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """nm_linear is one custom operator."""
        return True


def register() -> None:
    """Have transformers open packed checkpoints from now on; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedQuantizer)


def put_packed_layers(model: PreTrainedModel, config: PackedConfig) -> None:
    """Replace the linear layers that a config names by packed ones, yet without weights, on the meta device.

    Raises:
        FormatError: a name is of no linear layer of this model, or of the output head; or a count is impossible.
    """
    kind = MODULES[config.format]
    linears = {name: module for name, module in model.named_modules() if is_plain_linear(module)}
    for key, stored in config.modules.items():
        name = known_as(key, model.base_model_prefix, linears)
        linear = linears.get(name or "")
        if name is None or linear is None or linear is model.get_output_embeddings():
            raise FormatError(
                f"'{key}' is no linear layer of {type(model).__name__} that can be packed: {PACK_AGAIN}, or open it "
                "with AutoModelForCausalLM"
            )
        shape = linear.weight.shape
        rows, columns = reversed(shape) if isinstance(linear, Conv1D) else shape
        try:
            layer = kind.empty(
                columns, rows, stored, linear.bias is not None, linear.weight.dtype, torch.device("meta")
            )
        except FormatError as error:
            raise FormatError(f"{name}: {error}; {PACK_AGAIN}") from error
        model.set_submodule(name, layer.train(linear.training))


def is_plain_linear(module: nn.Module) -> bool:
    """True for a layer that a packed one can stand for: a subclass may compute in a way of its own."""
    return type(module) in (nn.Linear, Conv1D)


def expected_tensors(model: PreTrainedModel) -> Expected:
    """What the files of this model, whose layers are packed, must hold."""
    names = {f"{name}.{part}" for name, layer in packed_layers(model) for part in layer.NAMES}
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    tied = model.all_tied_weights_keys
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *_converted(model)]
    others = {
        name: tensor
        for name, tensor in state.items()
        if name not in names and name not in tied and not any(re.search(pattern, name) for pattern in optional)
    }
    return Expected({name: state[name] for name in sorted(names)}, others, tied, model.base_model_prefix)


def _converted(model: PreTrainedModel) -> list[str]:
    """Patterns of the names that transformers may make of other names while it loads, such as experts from single ones.

    A target holds text, places for groups (\\1) and for numbers (*).
    """
    targets = [target for one in get_model_conversion_mapping(model) for target in one.target_patterns]
    return [".*".join(map(re.escape, re.split(r"\\\d+|\*", target.strip("^$")))) for target in targets]


def _guard(model: nn.Module) -> str:
    """The guard's name in this model, which lacks the base model's prefix where the config has it or the reverse."""
    return guard(name for name, _ in packed_layers(model))


def _every_form(name: str, prefix: str) -> str:
    """A pattern of all keys that known_as takes for a name."""
    return rf"^({re.escape(prefix)}\.)*{re.escape(name.removeprefix(f'{prefix}.'))}$"


def _passed_over() -> Tensor:
    """Stands for a layer's weight while transformers initialises what was not loaded.

    Some models (GPT-2) initialise the weights of their children by name; what bears this mark they leave alone.
    """
    tensor = torch.empty(0, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _check_all_loaded(model: PreTrainedModel) -> None:
    """Raise FormatError that names a parameter which no file held: transformers has filled it at random.

    Models spread over devices, or kept on disk, are left to the look at the files' headers: their tensors have been
    replaced.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1 or places & {"disk", "meta"}:
        return
    optional = model._keys_to_ignore_on_load_missing or ()
    for name, parameter in model.named_parameters():
        loaded = getattr(parameter, "_is_hf_initialized", False) or name in model.all_tied_weights_keys
        if not loaded and not any(re.search(pattern, name) for pattern in optional):
            raise FormatError(f"the files lack {name}: copy or download them again")


def _in_memory(layer: PackedLinear) -> Any:
    """While it lasts, the layer's tensors are there, also where accelerate has offloaded them."""
    if not hasattr(layer, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)
