"""The command line: argv becomes a validated config and one call. The only place that prints."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from llmprune_eval.command import eval_command
from llmprune_eval.entry import cleaned_up, run
from llmprune_eval.options import Debug, Json

from llmprune.bench_command import bench_command
from llmprune.pack_command import pack_command, unpack_command
from llmprune.plan_command import plan_command
from llmprune.prune_command import prune_command
from llmprune.terminal import is_first, say

app = typer.Typer(
    name="llmprune",
    help="One-shot pruning of Hugging Face language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    run(app, spread(sys.argv[1:]), "llmprune")


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


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """A command that measures, and brings the card and the page in the model's folder up to what it found."""

    @functools.wraps(command)
    def measure(**options: Any) -> None:
        from llmprune.explain import refresh

        try:
            command(**options)
        finally:  # what is finished is kept, whatever came after it
            if is_first():
                refresh(Path(options["model"]))

    return measure


app.command("plan")(plan_command)
app.command("prune")(cleaned_up(prune_command))
app.command("pack")(cleaned_up(pack_command))
app.command("unpack")(cleaned_up(unpack_command))
app.command("eval")(explained(eval_command))
app.command("bench")(explained(bench_command))


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
@cleaned_up
def demo_command(
    html: Annotated[Path, typer.Option("--html", help="The page that is written.")] = Path("llmprune-demo.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune the embedded model by every kind of method and show what each cost. No network, no data needed."""
    from llmprune.demo.run import run_demo

    say(run_demo(as_json, html))
