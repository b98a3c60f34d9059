"""The models of a comparison: what is known of each, read from its folder or from a file of measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmprune_eval.hashing import sha256_of_files
from llmprune_eval.result import MANIFEST, RESULT, Part, Result

from llmprune.errors import InputError
from llmprune.manifest import read_manifest

HELD_OUT = "held-out calibration text"
"""Name of the perplexity that a pruning run measures itself."""


@dataclass(frozen=True)
class Candidate:
    """One model.

    Attributes:
        name: that it is shown by.
        model: folder or Hub name of its weights.
        base: what it was pruned from; None if nobody says.
        parts: what was measured of it.
        manifest: the account of its pruning, or None.
        bytes: of its weights' files.
        parameters, nonzero: counts over the whole model.
        dense: True for the model that others were pruned from.
    """

    name: str
    model: str
    base: str | None = None
    parts: tuple[Part, ...] = ()
    manifest: dict[str, Any] | None = None
    bytes: int | None = None
    parameters: int | None = None
    nonzero: int | None = None
    dense: bool = False

    @classmethod
    def from_manifest(cls, name: str, model: str, manifest: dict[str, Any], parts: Sequence[Part] = ()) -> Candidate:
        """A model that was pruned here.

        Raises:
            InputError: the manifest lacks what every manifest has.
        """
        try:
            saved = manifest["saved"]
            _look_at(manifest)
            return cls(name, model, manifest["model"], (*_held_out(manifest), *parts), manifest, saved["bytes"],
                       saved["parameters"], saved["nonzero"])  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the manifest {Path(model) / MANIFEST} is damaged ({error!r}): prune again, or delete it"
            ) from error

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The blocks of its manifest, in order."""
        return list(self.manifest["blocks"]) if self.manifest else []


def _look_at(manifest: dict[str, Any]) -> None:
    """Touch everything that is shown, so that a damaged manifest is found before anything is written."""
    config = manifest["config"]
    for name in ("method", "compensation", "refine", "sequential", "target", "seed"):
        config[name]
    str(manifest["pattern"]), manifest["sparsity"] + manifest["decoder_share"] + manifest["pruned"]
    list(manifest["warnings"]), list(manifest["curves"]), dict(manifest["versions"])
    for block in manifest["blocks"]:
        str(block["name"]), block["relative_error"]
        for site in block["sites"]:
            rows, columns = site["shape"]
            rows * columns / max(site["pruned"], 1)
            str(site["name"]), site["relative_error"]
    for kind in (manifest["widths"] or {"kinds": []})["kinds"]:
        kind["units"], kind["before"] + kind["after"], kind["projection"]


def _held_out(manifest: dict[str, Any]) -> list[Part]:
    """The perplexity before and after that the run has measured; figures of one text are comparable by its hash."""
    calibration = manifest["calibration"] or {}
    if manifest["loss_before"] is None or not calibration.get("holdout_sha256"):
        return []
    keys = ("dataset", "joiner", "seqlen", "holdout", "holdout_sha256")
    protocol = {key: calibration[key] for key in keys if calibration.get(key) is not None}
    values = {"perplexity": manifest["perplexity_after"], "dense_perplexity": manifest["perplexity_before"]}
    return [Part("perplexity", HELD_OUT, {**protocol, "against": manifest["model"]}, values,
                 versions=manifest["versions"], hardware={})]  # fmt: skip


def read_candidates(paths: Sequence[Path]) -> list[Candidate]:
    """The models that folders and result files speak of, named as shortly as tells them apart.

    Raises:
        InputError: one holds nothing to compare, is damaged, or is given twice.
    """
    places = [path.parent if path.name in (MANIFEST, RESULT) and os.path.isfile(path) else path for path in paths]
    whole = [Path(os.path.realpath(place)) for place in places]
    for i, place in enumerate(whole):
        if place in whole[:i]:
            raise InputError(f"{paths[i]} is given twice: leave it out once")
    names = [place.stem if os.path.isfile(place) else place.name for place in whole]
    found = [_read(place, name) for place, name in zip(places, names, strict=True)]
    same = {one.name for i, one in enumerate(found) if one.name in [other.name for other in found[:i]]}
    return [replace(one, name=str(path)) if one.name in same else one for one, path in zip(found, paths, strict=True)]


def _read(path: Path, name: str) -> Candidate:
    if os.path.isfile(path):
        return _from_result(Result.read(path), name, path)
    if not os.path.isdir(path):
        raise InputError(f"{path} does not exist: give folders that llmprune wrote, or files of `llmprune eval`")
    manifest = read_manifest(path)
    result = Result.read(path / RESULT) if (path / RESULT).exists() else None
    if manifest is not None:
        return from_folder(path, name, manifest, result)
    if result is not None:
        return _from_result(result, name, path / RESULT)
    raise InputError(
        f"{path} holds neither {MANIFEST} nor {RESULT}: measure it by `llmprune eval {path} --output FILE` and give "
        "that file"
    )


def from_folder(folder: Path, name: str, manifest: dict[str, Any], result: Result | None) -> Candidate:
    """A pruned model, as its folder is now."""
    measured = None if result is None else result.model.get("manifest_sha256")
    if measured is not None and measured != sha256_of_files([folder / MANIFEST]):
        raise InputError(f"{folder / RESULT} holds measurements of another model: delete it, and measure this one")
    parts = [] if result is None else result.parts
    candidate = Candidate.from_manifest(name, str(folder), manifest, parts)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return replace(candidate, bytes=size or candidate.bytes)


def _from_result(result: Result, name: str, path: Path) -> Candidate:
    """What a file of measurements says, with the manifest of its model where that still lies in its place."""
    facts = result.model
    model = facts.get("name")
    if not isinstance(model, str):
        raise InputError(f"{path} does not name the model that was measured: measure again")
    there = Path(model, MANIFEST)
    manifest = read_manifest(Path(model)) if os.path.isfile(there) else None
    if manifest is not None and sha256_of_files([there]) == facts.get("manifest_sha256"):
        return from_folder(Path(model), name, manifest, result)
    return Candidate(name, model, None, tuple(result.parts), None, facts.get("bytes"), facts.get("parameters"),
                     facts.get("nonzero"))  # fmt: skip


def same_model(one: str | None, other: str | None) -> bool:
    """True if both name the same folder, or the same model of the Hub."""
    if one is None or other is None:
        return False
    return one == other or (os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other))


def with_dense(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates behind their dense models; one that was not given stands there with what the others know."""
    bases: list[str] = []
    for one in candidates:
        if one.base is not None and not any(same_model(one.base, base) for base in bases):
            bases.append(one.base)
    dense: list[Candidate] = []
    rest = list(candidates)
    for base in bases:
        given = next((one for one in candidates if same_model(one.model, base) and one.manifest is None), None)
        known = _known_of(base, candidates)
        if given is not None:
            rest = [one for one in rest if one is not given]
            known = replace(given, bytes=given.bytes or known.bytes, parameters=given.parameters or known.parameters)
        dense.append(replace(known, dense=True))
    taken = {one.name for one in rest}
    return [replace(one, name=one.model) if one.name in taken else one for one in dense] + rest


def _known_of(base: str, candidates: Sequence[Candidate]) -> Candidate:
    """A dense model, from the manifests of what was pruned from it."""
    manifest = next(one.manifest for one in candidates if same_model(one.base, base) and one.manifest)
    return Candidate(
        Path(base).name, base, None, (), None, manifest["saved"]["dense_bytes"], manifest["model_parameters"]
    )
