"""Write a pruned model so that it reloads anywhere, prove it, and only then let the target appear.

The folder is built beside the target under a hidden name and renamed at the end: a killed run or a full
disk leaves the target as it was. It is a plain checkpoint: no sparsity_config and no quantization_config,
which some runtimes refuse to load.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llmprune import reload_proof
from llmprune.calibration import vocabulary_size
from llmprune.errors import InputError
from llmprune.report import Report

MANIFEST = "llmprune.json"
PROOF_TOKENS = 32
LAUNCHER_VARIABLES = frozenset("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split())


def check_target(target: Path, overwrite: bool, source: str | None = None, size: int = 0) -> None:
    """Find out before the work begins whether the result can be written.

    Args:
        source: the model that is read; the target must not touch it.
        size: bytes that will be written.

    Raises:
        InputError: it cannot.
    """
    whole = target.resolve()
    if source is not None and Path(source).exists():
        origin = Path(source).resolve()
        if whole == origin or whole in origin.parents:
            raise InputError(f"output {target} is or contains the input model {source}: choose another folder")
    if target.exists():
        if not target.is_dir():
            raise InputError(f"output {target} is a file: give a folder that does not exist yet")
        if not overwrite:
            raise InputError(f"output {target} exists: choose another folder, or pass --overwrite to replace it")
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise InputError(f"output {target} exists and is no model folder, so it is not replaced: choose another")
    parent = next(p for p in whole.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {target} cannot be written: {parent} is not a writable folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".llmprune-", dir=parent):
            pass
    except OSError as error:
        raise InputError(f"output {target} cannot be written: {error.strerror or error}") from error
    free = shutil.disk_usage(parent).free
    if size > free:
        raise InputError(f"output {target} needs {size / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free")


def save_checkpoint(
    model: PreTrainedModel, target: Path, report: Report, tokenizer: Any | None = None, *, overwrite: bool = False
) -> Path:
    """Write model, tokenizer and manifest to `target`, after proving that the folder reloads.

    Raises:
        InputError: the target cannot be written.
        RuntimeError: the written folder does not reload to the same model; nothing is left behind.
    """
    check_target(target, overwrite, size=sum(p.numel() * p.element_size() for p in model.parameters()))
    with _built_beside(target, overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        proof = prove_reload(model, folder)
        manifest = {**report.as_dict(), "reload": proof}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


@contextmanager
def _built_beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder on the target's file system that becomes the target if all goes well."""
    whole = target.absolute()
    building = whole.with_name(f".{whole.name}.building-{os.getpid()}")
    retired = whole.with_name(f".{whole.name}.old-{os.getpid()}")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
        yield building
        if whole.exists():
            whole.rename(retired)
        try:
            building.rename(whole)
        except OSError:
            if retired.exists():
                retired.rename(whole)
            raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space" in str(error)
        what = "the disk is full" if full else str(error)
        raise InputError(f"output {target} cannot be written ({what}); nothing was left behind") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def prove_reload(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Load `folder` in a fresh process by transformers alone; compare every weight and some logits.

    Returns:
        What was compared, for the manifest.

    Raises:
        RuntimeError: it does not load, or not to the same model.
    """
    device = str(model.device)
    tokens = (torch.arange(PROOF_TOKENS) * 7919 % vocabulary_size(model)).view(1, -1)
    was_training = model.training
    with torch.no_grad():
        own = model.eval()(input_ids=tokens.to(device)).logits.float().cpu()
    model.train(was_training)
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "question.safetensors"), Path(scratch, "answer.safetensors")
        save_file({"tokens": tokens}, question)
        source = Path(reload_proof.__file__).read_text(encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        command = [sys.executable, "-", str(folder.absolute()), str(question), str(answer), device]
        done = subprocess.run(
            command,
            input=source,
            env={**environment, "HF_HUB_OFFLINE": "1"},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the written model does not load in a fresh process:\n{done.stderr[-2000:]}")
        with safe_open(answer, framework="pt") as file:
            facts = file.metadata()
        reloaded = load_file(answer)["logits"]
    keys = json.loads(facts["keys"])
    if keys:
        raise RuntimeError(f"the written model reloads with missing or unexpected weights: {keys[:3]}")
    if facts["fingerprint"] != reload_proof.fingerprint(model):
        raise RuntimeError("the written model reloads with other weights than those in memory")
    difference = ((own - reloaded).abs().max() / own.abs().max().clamp(min=1e-12)).item()
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not difference <= tolerance:
        raise RuntimeError(f"the written model's logits differ from those in memory by {difference:.2g} of their size")
    return {"weights": "identical", "logits_relative_difference": difference, "tokens": PROOF_TOKENS}
