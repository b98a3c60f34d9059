"""What a packed checkpoint is: the entry in its config, and the tensors in its files.

    quantization_config = {"quant_method": "llmprune", "format": "2:4" | "bitmap", "version": 1,
                           "modules": {name of a linear layer: how many values it stores}}

A layer's weight [out, in] is stored as `<name>.values` and `<name>.positions` (2:4) or `<name>.bitmap`, in the place of
`<name>.weight`; everything else is stored as in any checkpoint. Names only select among the layers that a model has.
One layer's `<name>.weight` is there, and empty: see `guard`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Expected:
    """What the files of a packed model must hold, by the model's names; the tensors may be on any device.

    Attributes:
        packed: the packed layers' tensors.
        others: all others, but for those that transformers converts or can do without.
        tied: names of tensors that are those of other names, and which; the files hold one of the two.
        prefix: the base model's.
    """

    packed: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    tied: Mapping[str, str]
    prefix: str

    @property
    def layers(self) -> set[str]:
        """The packed layers' names."""
        return {name.rpartition(".")[0] for name in self.packed}

    @property
    def dense(self) -> set[str]:
        """The packed layers' weights, which the files do not hold, but for the guard."""
        return {f"{layer}.weight" for layer in self.layers}

    def keys(self, keys: Iterable[str]) -> dict[str, str]:
        """The files' keys by the model's names, or by themselves where the model has no such name."""
        names = {*self.packed, *self.others, *self.tied, *self.dense}
        return {known_as(key, self.prefix, names) or key: key for key in keys}


def check_files(files: Sequence[str | Path], expected: Expected) -> None:
    """The files are whole, and hold all tensors of the model in their shapes, and of packed layers nothing else.

    Only headers are read.

    Raises:
        FormatError: they do not.
    """
    headers = _headers(files)
    found = {name: headers[key] for name, key in expected.keys(headers).items()}
    found |= {name: found[tied] for tied, name in expected.tied.items() if tied in found and name not in found}
    _check_there(found, expected.packed)
    for name, (_, dtype) in found.items():
        if name in expected.packed and dtype not in (
            FLOATING if expected.packed[name].is_floating_point() else ("U8",)
        ):
            raise FormatError(f"{name} is stored as {dtype}, as packed weights never are: {PACK_AGAIN}")
    endings = tuple({f".{name}" for kind in MODULES.values() for name in kind.NAMES})
    for name in found:
        if name not in expected.packed and name not in expected.others and name.endswith(endings):
            raise FormatError(f"the files hold {name}, of which the config knows nothing: {PACK_AGAIN}")
    _check_there(found, expected.others)
    _check_dense(found, expected)


def _check_there(found: Mapping[str, tuple[list[int], str]], expected: Mapping[str, Tensor]) -> None:
    """Tensors are in the files, in their shapes."""
    for name, tensor in expected.items():
        if name not in found:
            raise FormatError(f"the files lack {name}, which this model needs: copy or download them again")
        if found[name][0] != list(tensor.shape):
            raise FormatError(
                f"{name} has shape {found[name][0]} in the file and {list(tensor.shape)} by the config: they belong to "
                "different models, or one was changed"
            )


def _headers(files: Sequence[str | Path]) -> dict[str, tuple[list[int], str]]:
    """Shapes and dtypes of all tensors."""
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file} is no safetensors file, and packed weights are read from no other: {PACK_AGAIN}")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    found[key] = header.get_shape(), header.get_dtype()
        except (SafetensorError, OSError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise FormatError(f"{file} is truncated or damaged ({reason}): copy or download it again") from error
    return found


def _check_dense(found: Mapping[str, tuple[list[int], str]], expected: Expected) -> None:
    """Of the packed layers' dense weights there is the guard, and none holds anything."""
    for name in expected.dense:
        if name in found and 0 not in found[name][0]:
            raise FormatError(f"the files hold {name} dense beside its packed form: {PACK_AGAIN}")
    mark = guard(expected.layers)
    if mark not in found:
        raise FormatError(f"the files lack {mark}, the empty mark of a packed model: copy or download them again")
