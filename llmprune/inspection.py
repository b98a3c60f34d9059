"""What a checkpoint's weights show by themselves, whatever its manifest claims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from llmprune_kernels import obeys
from torch import Tensor

from llmprune.blocks import all_sites, survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FORMATS = ((1, 4), (2, 4), (4, 8), (2, 8), (8, 16))


def pattern_of(weight: Tensor) -> str:
    """The tightest n:m among FORMATS that a weight [out, in] obeys, else "unstructured" or "dense"."""
    if not bool((weight == 0).any()):
        return "dense"
    return next((f"{n}:{m}" for n, m in FORMATS if obeys(weight, n, m)), "unstructured")


@torch.no_grad()
def inspect_model(model: PreTrainedModel) -> dict[str, Any]:
    """Zeros and pattern of every site, and over all of them."""
    sites: list[dict[str, Any]] = []
    for site in all_sites(survey(model)):
        weight = site.weight
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
    size = sum(s["shape"][0] * s["shape"][1] for s in sites)
    return {
        "sparsity": sum(s["zeros"] for s in sites) / size,
        "patterns": sorted({str(s["pattern"]) for s in sites}),
        "sites": sites,
    }
