"""What was timed once on a device and is worth remembering: which of several ways is the fastest, which algorithm.

Kept in one JSON file per device and versions, in $XDG_CACHE_HOME/llmprune or ~/.cache/llmprune. Times of another
machine or another version are never read: the file's name is a hash of both, and its content repeats them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.graphs import capture_stream, capturing, replay_times

Timer = Callable[[Callable[[], object]], float]
"""Median microseconds of a call."""

MOST_ROWS = 4096  # more rows run as so many do


@dataclass(frozen=True)
class Problem:
    """A product x [rows, inputs] W^T [inputs, outputs], rows rounded up to a power of two, at most MOST_ROWS."""

    outputs: int
    inputs: int
    dtype: str
    rows: int

    @classmethod
    def of(cls, x: Tensor, outputs: int) -> Problem:
        """The problem that x [rows, inputs] poses to a weight with so many outputs."""
        rows = min(MOST_ROWS, 1 << max(0, x.shape[0] - 1).bit_length())
        return cls(outputs, x.shape[1], str(x.dtype).removeprefix("torch."), rows)

    def __str__(self) -> str:
        return f"{self.outputs} x {self.inputs}, {self.dtype}, {self.rows} rows"


class Measured:
    """Times and findings of one device, read when first asked for and written whenever one is added.

    Nothing is measured while a CUDA graph is captured, because what is timed would become part of the graph: then
    the caller's rule decides, and is not remembered.
    """

    def __init__(self, file: Path, device: Mapping[str, str], timer: Timer, capturing: Callable[[], bool]):
        """
        Args:
            file: where to keep them; need not exist.
            device: what they depend on: names and versions.
            timer: median microseconds of a call.
            capturing: whether a CUDA graph is being captured.
        """
        self._file, self._device, self._timer, self._capturing = file, dict(device), timer, capturing
        self._found: dict[str, dict[str, Any]] = self._read(_warn) or {}
        self._writable = True

    def fastest(self, problem: Problem, candidates: Mapping[str, Callable[[], object]], otherwise: str) -> str:
        """The name of the fastest candidate.

        Args:
            candidates: calls that solve the problem; each is timed if a time of any of them is missing.
            otherwise: the answer while a CUDA graph is captured and nothing is known yet.
        """
        times = self._found.get(str(problem), {}).get("microseconds", {})
        if not candidates.keys() <= times.keys():
            if self._capturing():
                return otherwise
            times = {name: self._timer(call) for name, call in candidates.items()}
            self._add(problem, "microseconds", times)
        return min(candidates, key=lambda name: float(times[name]))

    def remembered(self, problem: Problem, name: str, find: Callable[[], list[int]], otherwise: list[int]) -> list[int]:
        """What `find` found for the problem, now or earlier; `otherwise` while a CUDA graph is captured."""
        known: list[int] | None = self._found.get(str(problem), {}).get(name)
        if known is None:
            if self._capturing():
                return otherwise
            known = find()
            self._add(problem, name, known)
        return known

    def _add(self, problem: Problem, name: str, value: object) -> None:
        self._found.setdefault(str(problem), {})[name] = value
        if not self._writable:
            return
        others = self._read(lambda text: None) or {}  # what other processes have found in the meantime
        for key, theirs in others.items():
            self._found[key] = theirs | self._found.get(key, {})
        try:
            self._write()
        except OSError as error:
            self._writable = False
            _warn(f"measured times cannot be kept in {self._file}: {error}; they are measured anew in every process")

    def _read(self, say: Callable[[str], None]) -> dict[str, dict[str, Any]] | None:
        """What the file holds; None if there is none that can be read, which is said unless there is no file."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            say(f"measured times in {self._file} cannot be read: {error}; they are measured anew")
            return None
        if not (isinstance(content, dict) and content.get("device") == self._device and _sound(content.get("found"))):
            say(f"{self._file} does not hold the measured times of this device; they are measured anew")
            return None
        found: dict[str, dict[str, Any]] = content["found"]
        return found

    def _write(self) -> None:
        """Whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._file.parent, suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"device": self._device, "found": self._found}, file, indent=1, sort_keys=True)
            part.replace(self._file)
        finally:
            part.unlink(missing_ok=True)


def _sound(found: object) -> bool:
    """{problem: {"microseconds": {name: number}, other names: [integers]}}."""

    def entry(name: str, value: object) -> bool:
        if name == "microseconds":
            return isinstance(value, dict) and all(isinstance(time, (int, float)) for time in value.values())
        return isinstance(value, list) and all(isinstance(item, int) for item in value)

    return isinstance(found, dict) and all(
        isinstance(entries, dict) and all(entry(name, value) for name, value in entries.items())
        for entries in found.values()
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def cuda_microseconds(device: torch.device, call: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call on a CUDA device, as in a CUDA graph and with nothing in its L2 cache.

    Python's own time would decide otherwise, which is longer than many a product. Two graphs are timed, one that
    empties the cache before each call and one that only empties it; the calls took the difference.
    """
    calls = 4
    with torch.cuda.device(device):
        cold = torch.empty(3 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        nothing: Callable[[], object] = int
        for graph, also in zip(graphs, (call, nothing), strict=True):
            with capturing(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(calls):
                    cold.zero_()
                    also()
        with_call, without = (statistics.median(replay_times(graph, repeats)) for graph in graphs)
    return 1e3 * max(0.0, with_call - without) / calls


def cusparselt_version() -> str:
    """As torch states it, 802 for 0.8.2, or "none"."""
    found = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return "none" if found is None else str(found)


def triton_version() -> str:
    """Or "none"."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _text_of_kernels() -> str:
    """SHA-256 of the sources that what is measured depends on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for name in ("decode.py", "fragments.py", "portable.py", "prefill.py", "selftest.py", "triton_kernels/mma_sp.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


@functools.cache
def measured(device: torch.device) -> Measured:
    """The one table of a CUDA device in this process; `device` with its index."""
    about = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cusparselt": cusparselt_version(),
        "kernels": _text_of_kernels(),
    }
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = home / "llmprune" / f"measured-{name}.json"
    timer = functools.partial(cuda_microseconds, device)
    return Measured(file, about, timer, torch.cuda.is_current_stream_capturing)
