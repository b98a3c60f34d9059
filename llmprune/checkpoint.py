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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval.result import MANIFEST
from llmprune_eval.windows import vocabulary_size
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune import reload_proof
from llmprune.errors import InputError
from llmprune.explain import explain
from llmprune.report import Report
from llmprune.structured.curves import draw_curves

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CURVES = "learning.png"
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
    if os.path.islink(target) and not os.path.exists(target):
        raise InputError(f"output {target} is a link that leads nowhere: choose another folder")
    try:
        whole = target.resolve()
        _check_replaceable(target, whole, overwrite, source)
        parent = next(p for p in whole.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"output {target} cannot be written: {parent} is not a writable folder")
        with tempfile.TemporaryDirectory(prefix=_hidden_name(whole), dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        raise InputError(f"output {target} cannot be written ({error.strerror}): choose another folder") from error
    if size > free:
        raise InputError(f"output {target} needs {decimal(size)}, but {parent} has {decimal(free)} free")


def _check_replaceable(target: Path, whole: Path, overwrite: bool, source: str | None) -> None:
    """Nothing is in the target's place that must stay; `whole` is the target without links."""
    if source is not None and os.path.exists(source):
        origin = Path(source).resolve()
        if whole == origin or whole in origin.parents:
            raise InputError(f"output {target} is or contains the input model {source}: choose another folder")
        if origin in whole.parents:
            raise InputError(f"output {target} lies inside the input model {source}: choose another folder")
    if target.exists():
        if not target.is_dir():
            raise InputError(f"output {target} is a file: give a folder that does not exist yet")
        if not overwrite:
            raise InputError(
                f"output {target} exists: choose another folder, or pass --overwrite (overwrite=True) to replace it"
            )
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise InputError(f"output {target} exists and is no model folder, so it is not replaced: choose another")


def save_checkpoint(
    model: PreTrainedModel, target: Path, report: Report, tokenizer: Any | None = None, *, overwrite: bool = False
) -> Path:
    """Write model, tokenizer, manifest, card and page to `target`, after proving that the folder reloads.

    Raises:
        InputError: the target cannot be written.
        RuntimeError: the written folder does not reload to the same model; nothing is left behind.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_target(target, overwrite, report.model, size)
    with built_beside(target, overwrite) as folder:
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # written for its owner alone
            shutil.copymode(folder / "config.json", file)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        proof = prove_reload(model, folder)
        manifest = {**report.as_dict(), "reload": proof, "saved": _saved(model, folder, report.model)}
        if report.curves and report.widths:
            units = {k["projection"]: k["before"] for k in report.widths["kinds"]}
            draw_curves(report.curves, units).savefig(folder / CURVES, dpi=110)
        explain(folder, target.resolve().name, manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


def _saved(model: PreTrainedModel, folder: Path, base: str) -> dict[str, int | None]:
    """Bytes of weights, here and in the model that was pruned, if that is a folder; parameters, and those not zero."""
    here, there = (sum(f.stat().st_size for f in Path(p).glob("*.safetensors")) for p in (folder, base))
    parameters = list(model.parameters())
    counts = {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
    }
    return {"bytes": here, "dense_bytes": there or None, **counts}


@contextmanager
def built_beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder on the target's file system that becomes the target if all goes well."""
    whole = target.resolve()  # what a link leads to is replaced, not the link
    building, retired = (whole.with_name(_hidden_name(whole) + kind) for kind in ("building", "old"))
    new = [parent for parent in whole.parents if not parent.exists()]
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
        yield building
        _check_replaceable(target, whole, overwrite, None)  # it may have come up in the meantime
        if whole.exists():
            whole.rename(retired)
        building.rename(whole)
    except (OSError, SafetensorError) as error:
        what = "the disk is full: make room" if _is_full(error) else str(error)
        raise InputError(f"output {target} cannot be written, and nothing was left behind; {what}") from error
    finally:
        if retired.exists() and not whole.exists():
            retired.rename(whole)
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
        for parent in new if not whole.exists() else ():
            with suppress(OSError):
                parent.rmdir()


def _hidden_name(whole: Path) -> str:
    """The beginning of the names of what lies beside the target for the time of writing."""
    return f".{whole.name}.llmprune-{os.getpid()}-"


def _is_full(error: OSError | SafetensorError) -> bool:
    """True for a full disk, a full quota, or the limit on a file's size; safetensors tells by its text alone."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(f"os error {number})" in str(error) for number in numbers)


def prove_reload(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Load `folder` in a fresh process by transformers alone; compare every weight and some logits.

    Returns:
        What was compared, for the manifest.

    Raises:
        InputError: its logits are not finite, so that there is nothing to compare.
        RuntimeError: it does not load, or not to the same model.
    """
    device = str(model.device)
    tokens = proof_tokens(model)
    own = logits_of(model, tokens)
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
    difference = difference_of_logits(own, reloaded, model.dtype)
    return {"weights": "identical", "logits_relative_difference": difference, "tokens": PROOF_TOKENS}


def proof_tokens(model: PreTrainedModel) -> Tensor:
    """Tokens [1, PROOF_TOKENS] from all over the vocabulary, always the same."""
    return (torch.arange(PROOF_TOKENS) * 7919 % vocabulary_size(model)).view(1, -1)


def difference_of_logits(own: Tensor, written: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of the written model's logits from a model's own, relative to the largest of these.

    Raises:
        RuntimeError: it is more than another order of summation can make in `dtype`.
    """
    difference = ((own - written).abs().max() / own.abs().max().clamp(min=1e-12)).item()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if not difference <= tolerance:
        raise RuntimeError(f"the written model's logits differ from those in memory by {difference:.2g} of their size")
    return difference


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the model in memory computes for tokens [1, length]: [1, length, vocabulary] float32 on the CPU.

    Raises:
        InputError: they are not finite.
    """
    was_training = model.training
    logits: Tensor = model.eval()(input_ids=tokens.to(model.device)).logits.float().cpu()
    model.train(was_training)
    if not torch.isfinite(logits).all():
        raise InputError("the pruned model's logits are not finite (NaN or infinity): try --dtype float32")
    return logits
