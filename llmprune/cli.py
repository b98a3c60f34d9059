"""The command line: argv becomes a validated config and one call. The only place that prints."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from llmprune_eval.command import eval_command
from llmprune_eval.entry import run
from llmprune_eval.options import Debug, Json

from llmprune.prune_command import prune_command
from llmprune.terminal import say

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


app.command("prune")(prune_command)
app.command("eval")(eval_command)


@app.command("inspect")
def inspect_command(
    folder: Annotated[str, typer.Argument(help="A model folder.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Sparsity per site, the pattern it obeys, and the manifest."""
    from llmprune.commands import run_inspect

    say(run_inspect(folder, as_json))


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
def demo_command(as_json: Json = False, debug: Debug = False) -> None:
    """Prune the embedded model by five methods and show what each cost. No network, no data needed."""
    from llmprune.demo.run import run_demo

    say(run_demo(as_json))
