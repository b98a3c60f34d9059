"""The one file that the measurements of a model are kept in: finished parts, each with its protocol.

Every command that measures adds parts to it as soon as they are finished, so that none is lost when a later one
fails, and takes those that are there already as done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from llmprune_kernels.inventory import count_weights

from llmprune_eval.errors import InputError
from llmprune_eval.hashing import sha256_of_files
from llmprune_eval.surroundings import hardware, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SCHEMA = 1
RESULT = "evaluation.json"
"""Name of the file in a model's folder."""
MANIFEST = "llmprune.json"
"""In a folder that a pruner wrote: there the result belongs."""
KINDS = ("perplexity", "task", "generation", "speed")


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        kind: one of KINDS.
        name: the dataset, the task, or what was timed.
        protocol: how it was measured: everything that must agree before two figures may be compared.
        values: the figures by name; None where one is not finite (a ruined model has an infinite perplexity).
        stderr: standard errors, of the figures that have one.
        samples: rows behind the figures, where they are worth reading: texts, single timings.
        seconds: that it took.
    """

    kind: str
    name: str
    protocol: dict[str, Any]
    values: dict[str, float | None]
    stderr: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=versions)
    hardware: dict[str, str | int] = field(default_factory=hardware)

    def __post_init__(self) -> None:
        """Raise TypeError for what a damaged file may hold."""
        figures = isinstance(self.values, dict) and all(
            v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in self.values.values()
        )
        if self.kind not in KINDS or not isinstance(self.name, str) or not figures:
            raise TypeError(f"a part of kind {self.kind!r} with values {self.values!r}")
        for table in (self.protocol, self.stderr, self.versions, self.hardware):
            if not isinstance(table, dict):
                raise TypeError(f"{self.kind} {self.name} holds {table!r} where names and values belong")
        if not isinstance(self.samples, list) or not all(isinstance(row, dict) for row in self.samples):
            raise TypeError(f"{self.kind} {self.name} has samples that are no rows")

    def answers(self, kind: str, name: str, asked: Mapping[str, Any]) -> bool:
        """True if this is that measurement, by all that is asked of its protocol."""
        return (self.kind, self.name) == (kind, name) and all(self.protocol.get(k) == v for k, v in asked.items())


@dataclass
class Result:
    """What was measured of one model.

    Attributes:
        model: what `describe_model` says.
        parts: in the order in which they were measured.
        path: file that every change is written to; None keeps it in memory.
    """

    model: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def open(cls, path: Path | None, model: dict[str, Any]) -> Result:
        """What a file holds of this model, or a new one.

        Raises:
            InputError: the file is damaged, or of another model.
        """
        if path is None or not path.is_file():
            return cls(model, path=path)
        found = cls.read(path)
        if found.model.get("weights_sha256") != model.get("weights_sha256"):
            raise InputError(
                f"{path} holds measurements of another model ({found.model.get('name')}): name another file with "
                "--output, or delete it"
            )
        return cls(model, found.parts, path)

    @classmethod
    def read(cls, path: Path) -> Result:
        """What a file holds.

        Raises:
            InputError: it is no result of this schema.
        """
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["schema"] != SCHEMA:
                raise InputError(f"{path} has schema {facts['schema']}, and this version reads {SCHEMA}: measure again")
            return cls(dict(facts["model"]), [Part(**part) for part in facts["parts"]], path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no result of an evaluation ({error}): delete it and measure again") from error

    def find(self, kind: str, name: str, asked: Mapping[str, Any]) -> Part | None:
        """The newest part that answers."""
        return next((part for part in reversed(self.parts) if part.answers(kind, name, asked)), None)

    def add(self, part: Part) -> None:
        """Keep a part, in place of one of the same protocol, and write the file.

        What others have added to the file in the meantime stays.
        """
        if self.path is None:
            self._keep(part)
            return
        with _alone(self.path):
            self.parts = Result.open(self.path, self.model).parts if self.path.is_file() else self.parts
            self._keep(part)
            write_json(self.path, self.as_dict())

    def _keep(self, part: Part) -> None:
        self.parts = [p for p in self.parts if not p.answers(part.kind, part.name, part.protocol)] + [part]

    def as_dict(self) -> dict[str, Any]:
        """For the file and --json."""
        return {"schema": SCHEMA, "model": self.model, "parts": [asdict(part) for part in self.parts]}


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON file at once or not at all.

    Raises:
        InputError: it cannot be written.
    """
    write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n", "name another file with --output")


def write_text(path: Path, text: str, advice: str) -> None:
    """Write a file at once or not at all.

    Raises:
        InputError: it cannot be written; ends with `advice`.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        building.write_bytes(text.encode("utf-8", "surrogateescape"))
        building.replace(path)
    except OSError as error:
        with suppress(OSError):
            building.unlink()
        raise InputError(f"{path} cannot be written ({error}): {advice}") from error


def check_place(path: Path | None) -> None:
    """Find out before the work begins whether a result can be kept.

    Raises:
        InputError: it cannot.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file, such as {path / RESULT}")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if (path.exists() and not path.is_file()) or not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written: name another file with --output")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While it lasts, no other process of this machine adds to the file."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir(), f"llmprune-{name}.lock")):
        yield


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def own_file(name: str) -> Path | None:
    """Where the results of a folder belong that a pruner has written; None for other models."""
    return Path(name, RESULT) if os.path.isfile(os.path.join(name, MANIFEST)) else None


def describe_model(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Which model was measured, its sizes, and a hash of its weights, or the Hub's commit."""
    folder = Path(name)
    manifest = folder / MANIFEST
    parameters, nonzero = count_weights(model)
    return {
        "name": name,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": parameters,
        "nonzero": nonzero,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")) or None,
        "weights_sha256": weights_sha256(folder) if folder.is_dir() else getattr(model.config, "_commit_hash", None),
        "manifest_sha256": sha256_of_files([manifest]) if manifest.is_file() else None,
    }


def weights_sha256(folder: Path) -> str:
    """Of the config and all weights of a model's folder, in the order of their names."""
    return sha256_of_files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
