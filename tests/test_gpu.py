"""With a CUDA device: one block at a time visits it, and the result is the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from llmprune import PruneConfig, prune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(
    ("method", "flips"), [("wanda", 0.01), ("stade", 0.01), ("sparsegpt", 0.01), ("ria", 0.01), ("regress", 0.05)]
)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_blocks_visit_the_device_and_come_home(
    method: str, flips: float, pattern: str, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    here, there = llama, copy.deepcopy(llama)
    prune(here, PruneConfig(method=method, pattern=pattern, device="cpu"), tokens=windows)
    report = prune(there, PruneConfig(method=method, pattern=pattern, device="cuda"), tokens=windows).report
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert theirs.device.type == "cpu", name
        # Other kernels round otherwise: a score on the threshold may fall on the other side.
        assert ((mine == 0) != (theirs == 0)).float().mean() < flips, name


def test_a_model_on_the_device_stays_there(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    model = llama.cuda()
    report = prune(model, PruneConfig(method="wanda"), tokens=windows, holdout=windows[:2]).report
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert report.loss_after is not None
