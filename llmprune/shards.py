"""safetensors files, tensor by tensor: of a model's folder no more than one is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from llmprune_eval.loading import INDEX, WEIGHTS, check_weight_files
from safetensors import safe_open
from torch import Tensor

from llmprune.errors import InputError

BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Of one element, by the name that safetensors has for a dtype."""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without reading it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * BYTES[self.dtype]


class Weights:
    """The weights of a model's folder, closed at the end of a `with`.

    Attributes:
        headers: of every tensor, file by file.
        files: the name of the file that a tensor lies in.
        metadata: of every file.
        index: what the index says beside the files' names; None if there is one file alone.

    Raises:
        InputError: files are missing, damaged, or of a dtype that is not known.
    """

    def __init__(self, folder: Path) -> None:
        check_weight_files(folder)
        self.headers: dict[str, Header] = {}
        self.files: dict[str, str] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.index = None if (folder / WEIGHTS).is_file() else _index(folder).get("metadata", {})
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}
        for name in weight_files(folder):
            opened = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            self._opened[name] = opened
            self.metadata[name] = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                if part.get_dtype() not in BYTES:
                    raise InputError(f"{folder / name} holds {key} as {part.get_dtype()}, which is not understood")
                self.headers[key] = Header(part.get_dtype(), tuple(part.get_shape()))
                self.files[key] = name

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, key: str) -> Tensor:
        """A tensor."""
        tensor: Tensor = self._opened[self.files[key]].get_tensor(key)
        return tensor


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    return sorted(set(_index(folder)["weight_map"].values()))


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index


class Shard:
    """One safetensors file that is being written, its tensors in any order."""

    def __init__(self, file: Any, headers: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._open = dict(headers)
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._starts, end = {}, 0
        # The larger elements first, as safetensors does it, so that each begins at a multiple of its size.
        for name in sorted(headers, key=lambda name: (-BYTES[headers[name].dtype], name)):
            header = headers[name]
            self._starts[name], end = end, end + header.nbytes
            entries[name] = {
                "dtype": header.dtype,
                "shape": list(header.shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._begin = 8 + len(text)
        file.truncate(self._begin + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was announced."""
        header = self._open.pop(name)
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert tuple(tensor.shape) == header.shape and data.nbytes == header.nbytes, name
        self._file.seek(self._begin + self._starts[name])
        self._file.write(data)

    def close(self) -> None:
        """All that was announced has been written."""
        assert not self._open, f"not written: {sorted(self._open)[:3]}"


@contextmanager
def shard(path: Path, headers: Mapping[str, Header], metadata: Mapping[str, str]) -> Iterator[Shard]:
    """Write a safetensors file with these tensors."""
    with path.open("wb") as file:
        one = Shard(file, headers, metadata)
        yield one
        one.close()
