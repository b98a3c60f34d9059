"""Stands in for the fresh process of the reload proof: a fork of one that has imported transformers and nothing else.

Importing transformers is all but a few hundredths of what a proof of a tiny model costs. Nothing of the tests' own
process gets into the fork, as nothing gets into a fresh process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers.modeling_utils", "transformers.models.auto.modeling_auto"])


def run(
    command: Sequence[str], *, input: str, env: dict[str, str], cwd: str, capture_output: bool, text: bool
) -> CompletedProcess[str]:
    """As subprocess.run of `python - ARGUMENTS` does, with what it says on stderr."""
    assert list(command[:2]) == [sys.executable, "-"] and capture_output and text
    said = Path(cwd, "stderr")
    process = PROCESSES.Process(target=_be_python, args=(input, list(command[1:]), env, cwd, said))
    process.start()
    process.join()
    assert process.exitcode is not None
    return CompletedProcess(command, process.exitcode, "", said.read_text())


def _be_python(source: str, argv: list[str], environment: dict[str, str], cwd: str, said: Path) -> None:
    assert "llmprune" not in sys.modules
    sys.stderr = said.open("w")
    sys.argv = argv
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    exec(compile(source, "<stdin>", "exec"), {"__name__": "__main__"})
