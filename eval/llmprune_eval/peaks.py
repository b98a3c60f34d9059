"""Peak memory of a model at work, of its own and of nothing else's.

On a CPU a process can only say what all of it has held at most, so that each model is given a fresh one, which loads
it, reads and writes. On an accelerator torch counts what it hands out, and the other model's weights are left out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import torch
from llmprune_kernels.huggingface import register
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmprune_eval.errors import InputError
from llmprune_eval.speed import ACTIONS, Load, Peaks
from llmprune_eval.surroundings import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MEMORY = {
    "cpu": "peak resident memory of a fresh process that imports the libraries, loads the model and does this, after "
    "all that stands before it: smaller batches, and prefill before decode",
    "cuda": "weights and buffers, and what torch.cuda allocates beside them while the model does this",
}
"""How it is measured, by the type of the device, for the protocol."""


def resident_peaks(
    name: str, loads: Sequence[Load], *, dtype: str = "auto", trust_remote_code: bool = False
) -> list[Peaks]:
    """Bytes on the CPU for every load, in a process of its own; `loads` with the smaller batches first.

    Raises:
        InputError: the system has ended the process, or as `decode`.
    """
    context = multiprocessing.get_context("spawn")  # a forked one would start with all that this one holds
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_work, name, loads, dtype, trust_remote_code, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"the process that measures the memory of {name} was ended by the system, most likely because no "
                "memory is left: pass smaller --batch-sizes or a shorter --prompt"
            ) from error


def _work(name: str, loads: Sequence[Load], dtype: str, trust_remote_code: bool, threads: int) -> list[Peaks]:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    register()
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    ).eval()
    peaks: list[Peaks] = []
    for load in loads:
        peaks.append({})
        for action_name, action in ACTIONS.items():
            action(model, load)
            peaks[-1][action_name] = peak_memory()
    return peaks


def allocated_peaks(model: PreTrainedModel, load: Load) -> Peaks:
    """Bytes on the CUDA device that a model is on, under one load, beside whatever else is there."""
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    peaks = {}
    for name, action in ACTIONS.items():
        torch.cuda.synchronize(model.device)
        torch._C._cuda_clearCublasWorkspaces()  # of earlier work, also the other model's: this makes its own
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        action(model, load)
        peaks[name] = own + torch.cuda.max_memory_allocated(model.device) - before
    return peaks
