"""Write the files of a packed folder, or of one unpacked again, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmprune_eval.loading import INDEX, PICKLES
from llmprune_eval.result import MANIFEST, RESULT
from llmprune_kernels import FormatError
from llmprune_kernels.linear import MODULES
from llmprune_kernels.packed_linear import PackedLinear
from torch import Tensor
from tqdm import tqdm

from llmprune.errors import InputError
from llmprune.explain import REPORT
from llmprune.packing import Choice
from llmprune.shards import Header, Weights, shard

CONFIG = "config.json"
NOT_COPIED = shutil.ignore_patterns(".*", "*.safetensors", INDEX, *PICKLES)
"""(folder, names in it) -> those that are hidden or hold weights."""


def write_packed(weights: Weights, choice: Choice, building: Path) -> None:
    """All weight files, every one with what its original holds."""
    packed = {one.key: one for one in choice.packed}
    headers = {
        key: {key.removesuffix("weight") + part: header for part, header in choice.files_parts(packed[key]).items()}
        if key in packed else {key: weights.headers[key]}
        for key in weights.headers
    }  # fmt: skip
    for name in sorted(set(weights.files.values())):
        own = [key for key, file in weights.files.items() if file == name]
        announced = {part: header for key in own for part, header in headers[key].items()}
        with shard(building / name, announced, weights.metadata[name]) as file:
            for key in tqdm(own, desc=f"packing {name}", disable=None, leave=False):
                tensor = weights.read(key)
                if key not in packed:
                    file.put(key, tensor)
                    continue
                layer = MODULES[choice.kind].from_dense(tensor.T.contiguous() if packed[key].transposed else tensor)
                for part in choice.files_parts(packed[key]):
                    stored = tensor.new_empty(0) if part == "weight" else getattr(layer, part).detach()
                    file.put(key.removesuffix("weight") + part, stored)
    files = {part: weights.files[key] for key in headers for part in headers[key]}
    _index(weights, building, files, [header for one in headers.values() for header in one.values()])


def write_dense(
    weights: Weights, layers: Mapping[str, PackedLinear], keys: Mapping[str, str], transposed: set[str], building: Path
) -> None:
    """All weight files, with the weights of `layers` unpacked where their values lie.

    Args:
        keys: names in the folder by names in the model.
    """
    unpacked = {keys[f"{name}.values"]: name for name in layers}
    spent = {keys[f"{name}.{part}"] for name, layer in layers.items() for part in layer.NAMES}
    spent |= {keys[f"{name}.weight"] for name in layers if f"{name}.weight" in keys}  # the guard
    sources = {key: key for key in weights.headers if key not in spent}
    sources |= {key.removesuffix("values") + "weight": key for key in unpacked}
    headers = {
        name: _dense_header(layers[unpacked[key]], weights.headers[key].dtype, unpacked[key] in transposed)
        if key in unpacked else weights.headers[key]
        for name, key in sources.items()
    }  # fmt: skip
    files = {name: weights.files[key] for name, key in sources.items()}
    for file_name in sorted(set(files.values())):
        own = {name: key for name, key in sources.items() if files[name] == file_name}
        with shard(building / file_name, {name: headers[name] for name in own}, weights.metadata[file_name]) as file:
            for name, key in tqdm(own.items(), desc=f"unpacking {file_name}", disable=None, leave=False):
                if key not in unpacked:
                    file.put(name, weights.read(key))
                    continue
                module = unpacked[key]
                parts = [weights.read(keys[f"{module}.{part}"]) for part in layers[module].NAMES]
                dense = _dense(layers[module], parts, module)
                file.put(name, dense.T if module in transposed else dense)
    _index(weights, building, files, headers.values())


def _dense_header(layer: PackedLinear, dtype: str, transposed: bool) -> Header:
    """Of a layer's weight, unpacked."""
    shape = layer.out_features, layer.in_features
    return Header(dtype, shape[::-1] if transposed else shape)


def _dense(layer: PackedLinear, tensors: list[Tensor], name: str) -> Tensor:
    """The weight [out, in] that a layer's stored tensors mean."""
    whole = type(layer)(layer.in_features, layer.out_features, tuple(tensors))
    try:
        return whole.to_dense()
    except FormatError as error:
        raise InputError(f"{name}: {error}; copy or download the file again") from error


def _index(weights: Weights, building: Path, files: Mapping[str, str], headers: Iterable[Header]) -> None:
    """The index, if the original has one."""
    if weights.index is None:
        return
    facts = {**weights.index, "total_size": sum(header.nbytes for header in headers)}
    text = json.dumps({"metadata": facts, "weight_map": dict(sorted(files.items()))}, indent=2)
    (building / INDEX).write_text(text + "\n", encoding="utf-8")


def check_others(folder: Path) -> None:
    """Raise InputError for what lies beside the weights and cannot be copied, such as a link that leads nowhere."""
    for place, folders, files in os.walk(folder):
        copied = {*folders, *files} - NOT_COPIED(place, [*folders, *files])
        folders[:] = copied.intersection(folders)
        for path in (Path(place, name) for name in sorted(copied)):
            if not os.access(path, os.R_OK):
                what = f"{path}, which would be copied, cannot be read"
                raise InputError(f"{what}: mend it, or take it out of the folder")


def copy_others(folder: Path, building: Path) -> None:
    """What lies beside the weights: tokenizer, templates, code; not the config, nor what llmprune says of weights."""
    names = os.listdir(folder)
    for name in sorted({*names} - NOT_COPIED(str(folder), names) - {CONFIG, MANIFEST, RESULT, REPORT}):
        path = folder / name
        if path.is_dir():
            shutil.copytree(path, building / name, ignore=NOT_COPIED)
        else:
            shutil.copyfile(path, building / name)


def write_config(folder: Path, building: Path, entries: Mapping[str, Any] | None) -> None:
    """The config as it is, with a quantization_config or, for None, without one."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if entries is not None:
        config["quantization_config"] = dict(entries)
    (building / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
