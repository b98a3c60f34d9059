"""What goes to the terminal: only here and in the entry point is anything printed."""

from __future__ import annotations

import os

import typer


def is_first() -> bool:
    """True on the one process that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on rank 0; nothing for an empty answer."""
    if text and is_first():
        typer.echo(text)
