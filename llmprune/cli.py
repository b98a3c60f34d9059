"""The command line: argv becomes a validated config and one call. The only place that prints."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from llmprune.bench_command import bench_command
from llmprune.errors import InputError, memory_ran_out
from llmprune.launch import all_ranks
from llmprune.options import Batch, Debug, Device, Dtype, Json, Length, Model, Remote
from llmprune.plan_command import plan_command
from llmprune.prune_command import prune_command
from llmprune.terminal import is_first, say

# Typer brings its own copy of click since 0.24 and uses the installed one before: this is either's UsageError.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

INTERRUPTED = 130
"""The exit code of what Ctrl-C has ended: 128 and the number of the signal."""

LESS_MEMORY = (
    "try --batch-size 1, a smaller --max-seq-length or --dtype bfloat16; where masks are learned, also --checkpointing"
)

app = typer.Typer(
    name="llmprune",
    help="One-shot pruning of Hugging Face language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    _configure_logging(debug)
    try:
        with all_ranks(), logging_redirect_tqdm():
            code = app(args=spread(sys.argv[1:]), standalone_mode=False)
            if code == INTERRUPTED:  # Typer has caught it
                raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UsageError as error:
        describe = getattr(error, "format_message", error.__str__)
        _fail(f"{describe()} (see --help)", debug)
    except InputError as error:
        _fail(str(error), debug)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        _fail(f"no memory is left ({str(error).partition('. ')[0][:120]}): {LESS_MEMORY}", debug)
    except (KeyboardInterrupt, typer.Abort):
        if is_first():
            typer.echo("llmprune: interrupted; no output was written", err=True)
        sys.exit(INTERRUPTED)


def spread(words: list[str]) -> list[str]:
    """`--ignore A B` as `--ignore A --ignore B`, where the model stands first and cannot be meant by B."""
    if len(words) < 2 or words[1].startswith("-"):
        return words
    done: list[str] = []
    option = ""  # the many-valued option that later words belong to, once it has its first
    for word in words:
        if option and not word.startswith("-") and done[-1] != option:
            done.append(option)
        elif word.startswith("-"):
            option = word if word in ("--ignore", "--targets") else ""
        done.append(word)
    return done


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if is_first():
        typer.echo(f"llmprune: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not debug:
        transformers_logging.set_verbosity_error()  # what matters of its warnings, this package says in one line
    logging.getLogger("llmprune").setLevel((logging.DEBUG if debug else logging.INFO) if is_first() else logging.ERROR)


app.command("plan")(plan_command)
app.command("prune")(prune_command)
app.command("bench")(bench_command)


@app.command("eval")
def eval_command(
    model: Model,
    dataset: Annotated[
        str, typer.Option(help="FILE (also .npy), wikitext2, c4, owner/name, wikitext2:FILE or c4:FILE.")
    ],
    against: Annotated[str | None, typer.Option(help="The dense model, for divergence from it.")] = None,
    max_seq_length: Length = None,
    num_samples: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity by the papers' protocol, and with --against the divergence from the dense model."""
    from llmprune.commands import run_eval

    say(
        run_eval(
            model,
            dataset,
            against,
            device,
            dtype,
            trust_remote_code,
            as_json,
            max_seq_length=max_seq_length,
            num_samples=num_samples,
            batch_size=batch_size,
        )
    )


@app.command("inspect")
def inspect_command(
    folder: Annotated[str, typer.Argument(help="A model folder.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Sparsity per site, the pattern it obeys, and the manifest."""
    from llmprune.commands import run_inspect

    say(run_inspect(folder, as_json))


@app.command("compare")
def compare_command(
    models: Annotated[list[Path], typer.Argument(help="Folders that llmprune wrote, or result files of `eval`.")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Models side by side: size, quality, speed; figures of one protocol only share a column."""
    from llmprune.compare import run_compare

    say(run_compare(models, html, as_json))


@app.command("methods")
def methods_command(as_json: Json = False, debug: Debug = False) -> None:
    """The methods, one line each."""
    from llmprune.criteria import methods

    if as_json:
        rows = {name: {"summary": m.summary, "source": m.source, "group": m.group} for name, m in methods().items()}
        say(json.dumps(rows, indent=1))
        return
    for name, method in methods().items():
        say(f"{name:<10} {method.summary} ({method.source})")


@app.command("demo")
def demo_command(
    html: Annotated[Path, typer.Option("--html", help="The page that is written.")] = Path("llmprune-demo.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune the embedded model by every kind of method and show what each cost. No network, no data needed."""
    from llmprune.demo.run import run_demo

    say(run_demo(as_json, html))
