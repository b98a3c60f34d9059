"""Tell transformers of packed checkpoints, without importing what it takes a second to import.

transformers keeps its quantization methods in two tables of one module, which it imports when a model is loaded. If
that module is there, packed checkpoints are entered at once, else as soon as it has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Have transformers open packed checkpoints from now on; a second call changes nothing."""
    if TABLES in sys.modules:
        _enter()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _enter() -> None:
    from llmprune_kernels.huggingface import register_now

    register_now()


class _Watch(MetaPathFinder):
    """Waits for the module with the tables, and for nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as everybody finds it, with what is done after its import."""
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """A loader that enters packed checkpoints once the module is there."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As it would be without this."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then enter what it lacks."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _enter()
