"""Start the ranks that `accelerate launch --cpu --num_processes N` does not.

On a CPU accelerate starts one process whatever N is, unless MPI is there, and leaves no trace of N but its
own command line. Pruning on one process where two were asked for would be a silent fall-back; so the process
that accelerate starts becomes rank 0 and starts the others. On GPUs, and under torchrun, every rank is
started by the launcher and nothing happens here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from accelerate.commands.launch import launch_command_parser

from llmprune_eval.errors import InputError


@contextmanager
def all_ranks(module: str) -> Iterator[None]:
    """Run with every rank that was asked for, each a `python -m module`; they end with this one.

    Raises:
        InputError: several machines were asked for, which only torchrun starts.
    """
    missing = _missing_ranks(module)
    started = [_start_rank(module, rank) for rank in range(1, missing + 1)]
    finished = False
    try:
        yield
        finished = True
    finally:
        for process in started if not finished else ():
            process.terminate()
        for process in started:
            process.wait()


def _missing_ranks(module: str) -> int:
    """How many processes accelerate was asked for beside this one and did not start."""
    environment = os.environ
    by_accelerate = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment
    if not by_accelerate or "WORLD_SIZE" in environment or "LOCAL_RANK" in environment:
        return 0
    parent = psutil.Process().parent()
    arguments = launcher_arguments(parent.cmdline()) if parent is not None else None
    if arguments is None:
        return 0
    asked, _ = launch_command_parser().parse_known_args(arguments)
    if (asked.num_machines or 1) > 1 or asked.num_processes is None:
        raise InputError(
            "accelerate launch --cpu starts one process here: pass --num_processes N on one machine, or start the "
            f"ranks with torchrun --nproc_per_node N -m {module} ..."
        )
    count: int = asked.num_processes
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    return count - 1


def launcher_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, or None if it is another command."""
    for i, word in enumerate(command):
        name = Path(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(command[i + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[i + 1 : i + 2] == ["launch"]:
            return list(command[i + 2 :])
    return None


def _start_rank(module: str, rank: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-m", module, *sys.argv[1:]], env=environment)
