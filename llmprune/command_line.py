"""A run's description as what repeats it: a command for the shell, or a call in Python.

Both name the method and every setting that is not the default.
"""

from __future__ import annotations

import shlex
from dataclasses import fields, is_dataclass
from typing import Any

from llmprune.config import PruneConfig

OPTIONS = {"hidden": "hidden-mse"}
"""Options of the command line that are not called like their setting."""


def shell_command(config: PruneConfig, model: str, output: str = "OUT") -> str:
    """`llmprune prune MODEL -o OUT ...`; OUT stands for a folder that need not be the same again."""
    words = ["llmprune", "prune", model, "-o", output]
    for name, value in {"method": config.method, **_chosen(config)}.items():
        option = "--" + OPTIONS.get(name, name).replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for one in value for word in (option, one)]
        else:
            words += [option, str(value)]
    return shlex.join(words)


def python_call(config: PruneConfig, model: str | None, *, tokens: bool, holdout: bool) -> str:
    """`prune(...)`, for what no command can say.

    Args:
        model: a folder or Hub name; None if the model came as an object.
        tokens, holdout: True if windows were given.
    """
    given = ["model" if model is None else repr(model), _source(config)]
    given += ["tokens=tokens"] * tokens + ["holdout=holdout"] * holdout
    return f"prune({', '.join(given)})"


def _chosen(settings: Any) -> dict[str, Any]:
    """The settings that are not the default, those within a setting beside the others."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            found |= _chosen(value)
        elif value != one.default:
            found[one.name] = value
    return found


def _source(settings: Any) -> str:
    """A dataclass as Python writes it, without what is the default."""
    given = []
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            given += [f"{one.name}={_source(value)}"] * bool(_chosen(value))
        elif value != one.default or one.name == "method":
            given.append(f"{one.name}={value!r}")
    return f"{type(settings).__name__}({', '.join(given)})"
