"""What the sub-commands do: each loads, calls the library once, and returns text for the terminal."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from accelerate import PartialState
from llmprune_eval.devices import resolve_device
from llmprune_eval.loading import empty_model, load_model
from llmprune_eval.windows import check_dataset

from llmprune import tables
from llmprune.checkpoint import check_target
from llmprune.collectives import world
from llmprune.config import PruneConfig
from llmprune.errors import InputError
from llmprune.inspection import inspect_model
from llmprune.manifest import read_manifest
from llmprune.planning import make_plan, plan_as_dict
from llmprune.prune import prune

log = logging.getLogger(__name__)


def run_prune(model: str, output: Path, config: PruneConfig, overwrite: bool, resume: bool, as_json: bool) -> str:
    """Prune, save on rank 0, and report."""
    check_target(output, overwrite, model)
    resolve_device(config.device)
    if config.dataset is None and config.make_recipe().needs:
        raise InputError(
            f"method {config.method} needs calibration text: pass --dataset FILE, a Hub name such as c4, or 'self'"
        )
    check_dataset(config.dataset)
    output = Path(os.path.abspath(output))  # "." has no name
    state = output.with_name(f".{output.name}.learning.safetensors")
    try:
        result = prune(model, config, state=state, resume=resume)
    except KeyboardInterrupt:
        if state.is_file():
            log.warning("%s holds what was learned so far: the same command with --resume goes on from there", state)
        raise
    if world()[0] == 0:
        result.save(output, overwrite=overwrite)
        state.unlink(missing_ok=True)
    if world()[1] > 1:
        PartialState().wait_for_everyone()
    if as_json:
        return json.dumps({"output": str(output), **result.report.as_dict()}, indent=1)
    return tables.report_text(result.report, output)


def show_plan(model: str, config: PruneConfig, as_json: bool) -> str:
    """What a run would do. The model is built from its config, without its weights."""
    check_dataset(config.dataset)
    plan = make_plan(empty_model(model, config.dtype, config.trust_remote_code), config)
    return json.dumps(plan_as_dict(plan, config), indent=1) if as_json else tables.plan_text(plan, config)


def run_inspect(folder: str, as_json: bool) -> str:
    """Sparsity and pattern of every site of a saved model, and its manifest."""
    manifest = read_manifest(Path(folder))
    facts = inspect_model(load_model(folder), empty_model(folder))
    if as_json:
        return json.dumps({"folder": folder, **facts, "manifest": manifest}, indent=1)
    return tables.inspection_text(folder, facts, manifest)
