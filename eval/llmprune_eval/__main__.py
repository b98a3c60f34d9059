"""`python -m llmprune_eval MODEL ...`: what `llmprune eval` is, without the pruner."""

import sys

import typer

from llmprune_eval.command import eval_command
from llmprune_eval.entry import run


def main() -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(eval_command)
    run(app, sys.argv[1:], "llmprune_eval")


if __name__ == "__main__":
    main()
