"""How a command line begins and ends: logging, all processes, and every way out in one line."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

import typer
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from llmprune_eval.errors import InputError, memory_ran_out
from llmprune_eval.launch import all_ranks
from llmprune_eval.terminal import is_first

# Typer brings its own copy of click since 0.24 and uses the installed one before: this is either's UsageError.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

INTERRUPTED = 130
"""The exit code of what Ctrl-C has ended: 128 and the number of the signal."""

LESS_MEMORY = (
    "try --batch-size 1, a smaller --max-seq-length or --dtype bfloat16; where masks are learned, also --checkpointing"
)


def run(app: typer.Typer, words: Sequence[str], module: str) -> None:
    """Call a command of `python -m module`, and exit. Bad input ends with one line on stderr and exit code 2."""
    debug = "--debug" in words
    _configure_logging(debug)
    try:
        with all_ranks(module), logging_redirect_tqdm():
            code = app(args=list(words), standalone_mode=False)
            if code == INTERRUPTED:  # Typer has caught it
                raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UsageError as error:
        describe = getattr(error, "format_message", error.__str__)
        _fail(f"{describe()} (see --help)", module, debug)
    except InputError as error:
        _fail(str(error), module, debug)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        _fail(f"no memory is left ({str(error).partition('. ')[0][:120]}): {LESS_MEMORY}", module, debug)
    except (KeyboardInterrupt, typer.Abort):
        if is_first():
            typer.echo(f"{module}: interrupted; nothing half-written is left", err=True)
        sys.exit(INTERRUPTED)


def cleaned_up(command: Callable[..., None]) -> Callable[..., None]:
    """A command that SIGTERM, as schedulers and containers send it, ends as Ctrl-C does: nothing half-written is left.

    Not for a command that forks, as lm-eval does for standard errors: where SIGTERM has a handler, Python forgets one
    that reaches a fork while it starts, and a pool that ends its processes so would wait for that one for ever.
    """

    @functools.wraps(command)
    def run_command(**options: Any) -> None:
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            command(**options)
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    return run_command


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _fail(message: str, module: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if is_first():
        typer.echo(f"{module}: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not debug:
        transformers_logging.set_verbosity_error()  # what matters of its warnings, this package says in one line
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("llmprune", "llmprune_eval"):
        logging.getLogger(name).setLevel((logging.DEBUG if debug else logging.INFO) if is_first() else logging.ERROR)
