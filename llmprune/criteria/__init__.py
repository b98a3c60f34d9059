"""The registry: every module in this folder that defines a `Criterion` adds a method."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from llmprune.criteria.base import COMPENSATIONS, Criterion, Pruned
from llmprune.errors import InputError

__all__ = ["COMPENSATIONS", "Criterion", "Pruned", "criterion", "methods"]


@cache
def methods() -> dict[str, type[Criterion]]:
    """All methods by name, in alphabetical order."""
    found: dict[str, type[Criterion]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Criterion) and value.__module__ == module.__name__:
                name = getattr(value, "name", None)
                if name is not None:
                    found[name] = value
    return dict(sorted(found.items()))


def criterion(name: str, seed: int = 0, compensation: str | None = None) -> Criterion:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown method '{name}': {hint}choose from {', '.join(known)}")
    return known[name](seed, compensation)
