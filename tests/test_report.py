"""What a run says of itself: warnings where something collapsed, and none where nothing did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llmprune_eval.loading import load_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune.demo
from llmprune import PruneConfig, prune
from llmprune.report import Report

DEMO = Path(llmprune.demo.__file__).parent


@pytest.fixture
def trained() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)


def pruned(model: PreTrainedModel, sparsity: float, **options: object) -> Report:
    config = PruneConfig(method="wanda", sparsity=sparsity, dataset=str(DEMO / "stories.txt"), device="cpu",
                         num_calibration_samples=8, num_holdout_samples=4, max_seq_length=128, **options)  # fmt: skip
    return prune(model, config, tokenizer=load_tokenizer(str(DEMO / "model"))).report


def test_a_healthy_run_warns_of_nothing(trained: PreTrainedModel) -> None:
    report = pruned(trained, 0.5)
    assert report.warnings == []
    assert all(block.relative_error is not None and 0.05 < block.relative_error < 0.7 for block in report.blocks)


def test_blocks_and_perplexity_that_collapse_are_named(trained: PreTrainedModel) -> None:
    report = pruned(trained, 0.99)
    collapsed = [warning for warning in report.warnings if "collapsed: its error is" in warning]
    assert [warning.split()[0] for warning in collapsed] == [block.name for block in report.blocks]
    assert any("the perplexity collapsed from" in warning for warning in report.warnings)


def test_one_ruined_block_is_the_only_one_named(trained: PreTrainedModel) -> None:
    report = pruned(trained, 0.99, targets=("model.layers.1",))
    named = [warning.split()[0] for warning in report.warnings if "collapsed: its error is" in warning]
    assert named == ["model.layers.1"]


def around_first_block(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What enters the first block and what it returns."""
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    return states[0].numpy(), states[1].numpy()


def test_the_error_of_a_block_is_that_of_its_output(trained: PreTrainedModel) -> None:
    """Relative to what the dense block adds to the residual stream: 1 for a block that does nothing any more."""
    tokens = torch.randint(0, 500, (2, 32))
    entered, dense = around_first_block(trained, tokens)
    report = prune(trained, PruneConfig(method="magnitude", sparsity=0.8, device="cpu"), tokens=tokens).report
    _, new = around_first_block(trained, tokens)
    expected = np.linalg.norm(new - dense) / np.linalg.norm(dense - entered)
    assert report.blocks[0].relative_error == pytest.approx(float(expected), rel=1e-4)


def test_inference_mode_is_no_obstacle(trained: PreTrainedModel) -> None:
    tokens = torch.randint(0, 500, (2, 32))
    with torch.inference_mode():
        report = prune(trained, PruneConfig(sparsity=0.5, device="cpu"), tokens=tokens).report
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_tensors_arrays_and_lists_are_the_same_windows(trained: PreTrainedModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, (3, 16))
    digests = set()
    for given in (tokens, tokens.astype(np.uint16), torch.from_numpy(tokens).int(), tokens.tolist()):
        report = prune(trained, PruneConfig(sparsity=0.1, device="cpu"), tokens=given, holdout=given).report
        assert report.calibration is not None
        assert report.loss_before is not None
        digests.add(report.calibration["sha256"])
    assert len(digests) == 1
