"""What a packed checkpoint is: the entry in its config, and the tensors in its files.

    quantization_config = {"quant_method": "llmprune", "format": "2:4" | "bitmap", "version": 1,
                           "modules": {name of a linear layer: how many values it stores}}

A layer's weight [out, in] is stored as `<name>.values` and `<name>.positions` (2:4) or `<name>.bitmap`, in the place of
`<name>.weight`; everything else is stored as in any checkpoint. Names only select among the layers that a model has.
One layer's `<name>.weight` is there, and empty: see `guard`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune_kernels.format import FormatError
from llmprune_kernels.linear import MODULES

METHOD = "llmprune"
VERSION = 1
KEYS = ("quant_method", "format", "version", "modules")
FLOATING = ("F16", "BF16", "F32", "F64")
PACK_AGAIN = "pack the model again with `llmprune pack`"


def check_entries(entries: Mapping[str, Any]) -> None:
    """The entry in the config says what this version reads, and nothing else.

    Raises:
        FormatError: it does not.
    """
    for key in KEYS:
        if key not in entries:
            raise FormatError(f"quantization_config of a packed model lacks '{key}': {PACK_AGAIN}")
    for key in entries:
        if key not in KEYS:
            raise FormatError(f"quantization_config holds '{key}', which no packed model has: {PACK_AGAIN}")
    if type(entries["version"]) is not int or entries["version"] != VERSION:
        raise FormatError(
            f"the packed model is of version {entries['version']!r}, and version {VERSION} can be read: take the "
            "llmprune that packed it, or pack it again"
        )
    if not isinstance(entries["format"], str) or entries["format"] not in MODULES:
        raise FormatError(f"format {entries['format']!r} is unknown ({', '.join(MODULES)} are known): {PACK_AGAIN}")
    modules = entries["modules"]
    if not isinstance(modules, dict) or not modules:
        raise FormatError(f"'modules' of quantization_config names no layers: {PACK_AGAIN}")
    for name, stored in modules.items():
        if not isinstance(name, str) or type(stored) is not int:
            raise FormatError(f"'modules' of quantization_config holds {name!r}: {stored!r}, no count: {PACK_AGAIN}")


def guard(modules: Iterable[str]) -> str:
    """Name of the one dense weight that a packed checkpoint holds, with no element in it.

    A transformers that knows nothing of packed models skips an unknown quantization_config with a warning, and fills
    what it does not find at random. It refuses this weight for its shape.
    """
    return min(modules) + ".weight"


def known_as(key: str, prefix: str, names: Collection[str]) -> str | None:
    """The one of a model's names that a file's key means: the same, or the same but for the base model's prefix."""
    candidates = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in names), None)


def check_files(files: Sequence[str | Path], expected: Mapping[str, Tensor], prefix: str) -> None:
    """The files are whole, and hold exactly the packed tensors that the config promises, in their shapes.

    Only headers are read.

    Args:
        expected: the packed layers' tensors by name, on any device.
        prefix: the base model's.

    Raises:
        FormatError: they do not.
    """
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file} is no safetensors file, and packed weights are read from no other: {PACK_AGAIN}")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    found[known_as(key, prefix, expected) or key] = header.get_shape(), header.get_dtype()
        except (SafetensorError, OSError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise FormatError(f"{file} is truncated or damaged ({reason}): copy or download it again") from error
    for name, tensor in expected.items():
        if name not in found:
            raise FormatError(f"the files lack {name}, which the config promises: copy or download them again")
        shape, dtype = found[name]
        if shape != list(tensor.shape):
            raise FormatError(
                f"{name} has shape {shape} in the file and {list(tensor.shape)} by the config: they belong to "
                "different models, or one was changed"
            )
        if dtype not in (FLOATING if tensor.is_floating_point() else ("U8",)):
            raise FormatError(f"{name} is stored as {dtype}, as packed weights never are: {PACK_AGAIN}")
    endings = {f".{name}" for kind in MODULES.values() for name in kind.NAMES}
    for name in found:
        if name not in expected and any(name.endswith(ending) for ending in endings):
            raise FormatError(f"the files hold {name}, of which the config knows nothing: {PACK_AGAIN}")
