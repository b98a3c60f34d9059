"""Which matrices of a decoder block are never pruned: embeddings, convolutions, routers, gates of one row.

Like the sites they are found from their place among the modules, never from a model's name.
"""

from __future__ import annotations

from torch import nn


def why_not(owner: nn.Module, parameter: nn.Parameter, routers: set[int]) -> str | None:
    """Why a parameter is never pruned, or None."""
    if isinstance(owner, nn.Embedding):
        return "an embedding"
    if isinstance(owner, (nn.Conv1d, nn.Conv2d)):
        return "a convolution"
    if id(parameter) in routers or (isinstance(owner, nn.Linear) and len(parameter) == 1):
        return "a router or gate"
    return None


def is_matrix(key: str, parameter: nn.Parameter) -> bool:
    """False for vectors, and for the biases of all experts side by side."""
    return parameter.ndim > 2 or (parameter.ndim == 2 and not key.endswith("_bias"))


def find_routers(block: nn.Module) -> set[int]:
    """The ids of the matrices that choose among experts.

    A router lies beside the experts, alone in its module, and has one row per expert. The rows by themselves
    say nothing: Qwen3-Next has 512 experts, and keys, values and a shared expert of 512 features.
    """
    found = set()
    for module in block.modules():
        counts = _expert_counts(module)
        for child in module.children() if counts else ():
            matrices = [p for key, p in child.named_parameters() if is_matrix(key, p)]
            if len(matrices) == 1 and matrices[0].ndim == 2 and len(matrices[0]) in counts:
                found.add(id(matrices[0]))
    return found


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module holds, in fused parameters or as a list, itself or in a child; empty if none."""
    fused = {
        len(parameter)
        for owner in (module, *module.children())
        if hasattr(owner, "is_transposed")
        for parameter in owner.parameters(recurse=False)
        if parameter.ndim == 3
    }
    return fused | {len(m) for name, m in module.named_children() if isinstance(m, nn.ModuleList) and "expert" in name}
