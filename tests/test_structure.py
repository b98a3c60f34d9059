"""The direction of dependencies, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

PACKAGES = {"llmprune": ROOT / "llmprune", "llmprune_eval": ROOT / "eval", "llmprune_kernels": ROOT / "kernels"}

# From the ground up: a module may import from its own layer or one below it.
LAYERS = (
    {"errors", "collectives", "reload_proof", "manifest", "shards"},
    {"moments", "gram", "cross", "patterns"},
    {"inputs", "sites", "blocks", "biases", "stream", "unprunable", "least_squares", "swaps", "packing"},
    {"wiring", "learning", "collect", "dense_side", "targets", "criteria", "report", "structured"},
    {"orders", "walk", "recipe", "config", "command_line"},
    {"calibration", "planning", "checkpoint", "inspection", "tables", "pages", "explain"},
    {"outlook", "packed_files"},
    {"advice"},
    {"advice_text"},
    {"prune", "pack"},
    {"bench", "commands", "compare", "demo"},
    {"bench_command", "cli", "options", "pack_command", "plan_command", "prune_command", "terminal"},
)


def imports(path: Path, at_import_time: bool = False) -> set[str]:
    """Dotted names that a file imports; with `at_import_time` only those at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_time else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return [path for path in PACKAGES[package].rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("leaf", ["llmprune_eval", "llmprune_kernels"])
def test_a_leaf_never_imports_the_trunk(leaf: str) -> None:
    package = PACKAGES[leaf] / leaf
    for path in package.rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] != "llmprune", f"{path} imports {name}"


def test_heavy_optional_packages_are_never_imported_at_import_time() -> None:
    for package in PACKAGES:
        for path in files(package):
            inner = imports(path, at_import_time=True)
            tops = {name.split(".")[0] for name in inner}
            assert not tops & {"lm_eval", "matplotlib", "jinja2"}, path
            if path.parent.name != "triton_kernels":  # themselves imported only where a kernel is launched
                assert "triton" not in tops and not any("triton_kernels" in name for name in inner), path
    slow = ("triton", "lm_eval", "datasets", "scipy", "torch._dynamo", "transformers.modeling_utils")
    code = f"import sys, llmprune, llmprune.cli; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"

    code = "import sys, llmprune_eval.__main__; print([m for m in ('llmprune', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "eval", check=True)
    assert done.stdout.strip() == "[]"


def test_the_trunk_is_layered() -> None:
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for path in files("llmprune"):
        inner = path.relative_to(ROOT / "llmprune").with_suffix("").parts[0]
        if inner in ("__init__", "__main__"):
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "llmprune" and len(parts) > 1 and parts[1] in level:
                assert level[parts[1]] <= level[inner], f"{path.name} must not import {name}"


def test_every_module_has_its_layer() -> None:
    level = {module for layer in LAYERS for module in layer}
    names = {path.relative_to(ROOT / "llmprune").with_suffix("").parts[0] for path in files("llmprune")}
    assert names - {"__init__", "__main__"} == level


def test_source_roots_are_no_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


def test_only_the_command_line_prints() -> None:
    for path in files("llmprune"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), path
