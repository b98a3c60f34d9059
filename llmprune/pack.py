"""Pack the sparse weights of a folder, and unpack them again, tensor by tensor: the dense model is never in memory.

As with a pruned model, the folder is built beside the target and appears only when it has been proved: every packed
weight is read back and unpacked, and the packed model is opened and must compute what the dense one does.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from llmprune_eval.loading import empty_model, is_packed, load_config, load_model
from llmprune_eval.result import MANIFEST
from llmprune_kernels import FormatError
from llmprune_kernels.checkpoint_format import METHOD, VERSION, check_files
from llmprune_kernels.huggingface import PackedConfig, expected_tensors, put_packed_layers
from llmprune_kernels.inventory import packed_layers
from llmprune_kernels.linear import MODULES
from llmprune_kernels.pack24 import as_integers
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from llmprune.checkpoint import (
    PROOF_TOKENS,
    built_beside,
    check_target,
    difference_of_logits,
    logits_of,
    proof_tokens,
)
from llmprune.errors import InputError, memory_ran_out
from llmprune.explain import explain
from llmprune.manifest import read_manifest
from llmprune.packed_files import check_others, copy_others, write_config, write_dense, write_packed
from llmprune.packing import FORMATS, Choice, choose
from llmprune.shards import Weights, weight_files

ROOM = 1.3
"""Memory that a model needs to be compared with, over the bytes of its weights."""


@dataclass(frozen=True)
class Packed:
    """What was done to a folder.

    Attributes:
        output: the new folder.
        kind: the format.
        modules: packed layers with the number of their stored values.
        dense: matrices of the decoder that stayed as they were, with the reason.
        weights: bytes of the packed layers' weights, before and after.
        files: bytes of all weight files, before and after.
        share: of the decoder's parameters, packed.
        proof: what was compared before the folder appeared.
    """

    output: str
    kind: str
    modules: dict[str, int]
    dense: dict[str, str]
    weights: tuple[int, int]
    files: tuple[int, int]
    share: float
    proof: dict[str, Any]


def pack(
    folder: Path, output: Path, kind: str = "auto", *, overwrite: bool = False, trust_remote_code: bool = False
) -> Packed:
    """Write a packed copy of a folder.

    Args:
        kind: one of packing.FORMATS.

    Raises:
        InputError: the folder cannot be read, nothing in it can be packed, or the output cannot be written.
        RuntimeError: what was written is not what was read; nothing is left behind.
    """
    if kind not in FORMATS:
        raise InputError(f"format '{kind}' is unknown: use one of {', '.join(FORMATS)}")
    _check_folder(folder)
    if is_packed(load_config(str(folder), trust_remote_code)):
        raise InputError(f"{folder} is packed already: open it, or `llmprune unpack` it")
    check_target(output, overwrite, str(folder))
    check_others(folder)
    model = empty_model(str(folder), "auto", trust_remote_code)
    with Weights(folder) as weights:
        choice = choose(model, weights, kind)
        check_target(output, overwrite, str(folder), _size(folder) - choice.dense_bytes + choice.packed_bytes)
        with built_beside(output, overwrite) as building:
            write_packed(weights, choice, building)
            copy_others(folder, building)
            modules = {one.name: one.stored(choice.kind) for one in choice.packed}
            entries = {"quant_method": METHOD, "format": choice.kind, "version": VERSION, "modules": modules}
            write_config(folder, building, entries)
            signs = _prove_weights(weights, choice, building)
            proof = {"weights": "identical", "signs_of_zeros_lost": signs,
                     **_prove_logits(folder, building, trust_remote_code)}  # fmt: skip
            sizes = _size(folder), _size(building)
            done = Packed(str(output), choice.kind, modules, choice.dense, (choice.dense_bytes, choice.packed_bytes),
                          sizes, choice.share, proof)  # fmt: skip
            _renew_manifest(folder, building, output, done)
    return done


def unpack(
    folder: Path, output: Path, *, overwrite: bool = False, trust_remote_code: bool = False
) -> tuple[int, tuple[int, int]]:
    """Write a plain copy of a packed folder, with the weights that were packed.

    Returns:
        How many layers were unpacked, and the bytes of all weight files before and after.

    Raises:
        InputError: the folder is not packed, is damaged, or the output cannot be written.
    """
    _check_folder(folder)
    config = load_config(str(folder), trust_remote_code)
    if not is_packed(config):
        raise InputError(f"{folder} is not packed: there is nothing to unpack")
    check_target(output, overwrite, str(folder))
    check_others(folder)
    model = empty_model(str(folder), "auto", trust_remote_code)
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    with Weights(folder) as weights:
        try:
            put_packed_layers(model, PackedConfig(**config.quantization_config))
            expected = expected_tensors(model)
            check_files([folder / name for name in weight_files(folder)], expected)
        except FormatError as error:
            raise InputError(f"{folder}: {error}") from error
        keys = expected.keys(weights.headers)
        layers = dict(packed_layers(model))
        dense = sum(one.in_features * one.out_features * one.dtype.itemsize for one in layers.values())
        check_target(output, overwrite, str(folder), _size(folder) + dense)
        with built_beside(output, overwrite) as building:
            write_dense(weights, layers, keys, transposed, building)
            copy_others(folder, building)
            write_config(folder, building, None)
            _renew_manifest(folder, building, output, None)
            return len(layers), (_size(folder), _size(building))


def _check_folder(folder: Path) -> None:
    """Raise InputError unless it is one."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give a folder with a Hugging Face checkpoint")


def _size(folder: Path) -> int:
    """Bytes of its weight files."""
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def _prove_weights(weights: Weights, choice: Choice, building: Path) -> int:
    """Read every packed weight back, unpack it and compare it bit by bit with the original.

    Returns:
        How many negative zeros have lost their sign.

    Raises:
        RuntimeError: a weight is another one.
    """
    signs = 0
    kind = MODULES[choice.kind]
    with Weights(building) as written:
        for one in tqdm(choice.packed, desc="reading back", disable=None, leave=False):
            original = weights.read(one.key).T if one.transposed else weights.read(one.key)
            stem = one.key.removesuffix("weight")
            rows, columns = one.shape
            back = kind(columns, rows, tuple(written.read(stem + name) for name in kind.NAMES)).to_dense()
            differ = as_integers(back) != as_integers(original.contiguous())
            if bool((differ & ((back != 0) | (original != 0))).any()):
                raise RuntimeError(f"{one.name} is not what was packed: the disk or the memory is at fault")
            signs += int(differ.sum())
    return signs


def _prove_logits(folder: Path, building: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Open the packed model, then the dense one if there is memory for it, and compare what they compute on the CPU.

    Raises:
        InputError: the model does not run with packed layers, or computes something else.
    """
    packed = load_model(str(building), "auto", trust_remote_code)
    tokens, dtype, name = proof_tokens(packed), packed.dtype, type(packed).__name__
    try:
        logits = logits_of(packed, tokens)
    except InputError:
        raise
    except (AttributeError, ValueError, RuntimeError, TypeError) as error:  # such as a look at a layer's weight
        if memory_ran_out(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{name} does not run with packed layers ({reason}): keep it dense; nothing was written"
        ) from error
    del packed
    needed, there = round(ROOM * _size(folder)), psutil.virtual_memory().available
    if needed > there:
        why = f"the dense model needs {needed / 1e9:.1f} GB, {there / 1e9:.1f} are free"
        return {"logits": f"finite on {PROOF_TOKENS} tokens, and not compared: {why}"}
    own = logits_of(load_model(str(folder), "auto", trust_remote_code), tokens)
    try:
        difference = difference_of_logits(own, logits, dtype)
    except RuntimeError as error:
        raise InputError(
            f"{name} computes otherwise with packed layers ({error}): keep it dense; nothing was written"
        ) from error
    return {"logits_relative_difference": difference, "tokens": PROOF_TOKENS}


def _renew_manifest(folder: Path, building: Path, output: Path, done: Packed | None) -> None:
    """The manifest of a folder that llmprune pruned, with what packing did, or for None without; card and page."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    manifest.pop("packed", None)
    if done is not None:
        command = ["llmprune", "pack", str(folder), "-o", str(output), "--format", done.kind]
        manifest["packed"] = {**asdict(done), "command": shlex.join(command)}
    if isinstance(manifest.get("saved"), dict):
        manifest["saved"]["bytes"] = _size(building)
    explain(building, output.resolve().name, manifest)
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
