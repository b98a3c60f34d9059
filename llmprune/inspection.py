"""What a checkpoint's weights show by themselves, whatever its manifest claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from llmprune_kernels import obeys
from llmprune_kernels.inventory import packed_layers
from llmprune_kernels.packed_linear import PackedLinear
from torch import Tensor

from llmprune.blocks import all_sites, survey
from llmprune.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FORMATS = ((1, 4), (2, 4), (4, 8), (2, 8), (8, 16))


def pattern_of(weight: Tensor) -> str:
    """The tightest n:m among FORMATS that a weight [out, in] obeys, else "unstructured" or "dense"."""
    if not bool((weight == 0).any()):
        return "dense"
    return next((f"{n}:{m}" for n, m in FORMATS if obeys(weight, n, m)), "unstructured")


@torch.no_grad()
def inspect_model(model: PreTrainedModel, skeleton: PreTrainedModel | None = None) -> dict[str, Any]:
    """Zeros and pattern of every site, and over all of them.

    Args:
        skeleton: the same model with dense layers, on any device, where layers of `model` are packed.
    """
    sites: list[dict[str, Any]] = []
    for site in all_sites(survey(skeleton or model)):
        weight = _weight(model, site)
        zeros = int((weight == 0).sum())
        sites.append(
            {
                "name": site.name,
                "shape": list(site.shape),
                "zeros": zeros,
                "sparsity": zeros / weight.numel(),
                "pattern": pattern_of(weight),
                "negative_zeros": int(((weight == 0) & torch.signbit(weight)).sum()),
            }
        )
    packed = [layer for _, layer in packed_layers(model)]
    size = sum(s["shape"][0] * s["shape"][1] for s in sites)
    return {
        "sparsity": sum(s["zeros"] for s in sites) / size,
        "patterns": sorted({str(s["pattern"]) for s in sites}),
        "packed": _packing(packed) if packed else None,
        "sites": sites,
    }


def _weight(model: PreTrainedModel, site: Site) -> Tensor:
    """The weight [out, in] of a site that was found in this model or in its skeleton, unpacked."""
    fused = "" if site.index is None else f".{site.parameter}.{site.index}"
    module = model.get_submodule(site.name.removesuffix(fused))
    return module.to_dense() if isinstance(module, PackedLinear) else replace(site, module=module).weight


def _packing(layers: Sequence[PackedLinear]) -> dict[str, Any]:
    """In what format layers are packed, and how many bytes that saves."""
    dense = sum(one.in_features * one.out_features * one.dtype.itemsize for one in layers)
    packed = sum(one.weight_bytes for one in layers)
    return {"format": layers[0].FORMAT, "modules": len(layers), "dense_bytes": dense, "packed_bytes": packed}
