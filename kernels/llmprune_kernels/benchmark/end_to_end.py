"""Whole decoding: a Llama of a real shape with random 2:4 weights, dense with its zeros and then packed in place.

One step reads one token per sequence, with a static cache, in one CUDA graph. Attention, norms, embedding and the
output head stay dense, as they do in a pruned model. q/k/v are one layer and gate/up another, for dense and packed
alike: transformers' Phi-3 is a Llama that is stored so, and a launch is paid for four times in a block, not seven.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmprune_kernels.benchmark.contest import Refusal, half_of
from llmprune_kernels.benchmark.timing import Recorder
from llmprune_kernels.linear import SparseLinear24

LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT, REPEATS = 64, 40
LENGTH = 128  # of the cache: the prompt, and a place for each step of a run (REPEATS and the ones to warm up)
AGREE = 0.05  # relative difference of the logits: bf16 rounds otherwise in every layer, and the differences add up


@dataclass(frozen=True)
class Decoding:
    """What was found for one model at one batch size.

    Attributes:
        microseconds: of a step, one for each repetition.
        peak: bytes allocated at most while decoding; None on a CPU.
        logits: [batch, 1, vocabulary] of the first step.
    """

    microseconds: list[float]
    peak: int | None
    logits: Tensor


class Decoder:
    """One step of a batch behind a prompt of random tokens, always the same step until its cache is full."""

    def __init__(self, model: Any, batch: int):
        from transformers import StaticCache

        device = model.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (batch, PROMPT + 1), generator=generator).to(device)
        self._model, self._token = model, tokens[:, PROMPT:].contiguous()
        self._cache: Any = StaticCache(config=model.config, max_cache_len=LENGTH)
        self._position = torch.full((batch, 1), PROMPT, device=device)
        mask = torch.zeros(batch, 1, 1, LENGTH, dtype=model.dtype, device=device)
        self._mask = mask.index_fill_(3, torch.arange(PROMPT + 1, LENGTH, device=device), -torch.inf)
        model(input_ids=tokens[:, :PROMPT], past_key_values=self._cache, use_cache=True)

    def rewind(self) -> None:
        """Forget all steps."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def step(self) -> Tensor:
        """Logits [batch, 1, vocabulary]."""
        output = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def build(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama with random weights of which every block's linear layers obey 2:4; made on the device."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**sizes, pad_token_id=None, sliding_window=None)
    with torch.device(device):
        model = Phi3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for _, layer in linears(model):
        layer.weight.data = half_of(layer.weight.data, "2:4")
    return model


def linears(model: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers of all blocks, by their names in `model.model.layers`."""
    return [(name, layer) for name, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)]


def pack(model: Any, layout: str) -> None:
    """Every linear layer of the blocks packed, one after the other, so that no second model is ever held."""
    for name, layer in linears(model):
        packed = SparseLinear24.from_dense(layer.weight.data)
        packed.use_layout(layout)
        model.model.layers.set_submodule(name, packed)
        layer.weight = None  # type: ignore[assignment]


@torch.no_grad()
def decode(model: Any, batch: int, record: Recorder) -> Decoding:
    """Time one step; memory is that of the model, its cache and the step, not of reading the prompt."""
    cuda = model.device.type == "cuda"
    decoder = Decoder(model, batch)
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()  # of earlier runs: this one makes its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decoder.rewind()
    run = record([decoder.step])
    decoder.rewind()
    logits = run.answers()[0].clone()
    decoder.rewind()
    times = run.microseconds(REPEATS)
    return Decoding(times, torch.cuda.max_memory_allocated() if cuda else None, logits)


def compare(
    model: Any, name: str, layout: str, batches: tuple[int, ...], record: Recorder
) -> Iterator[dict[str, Any] | Refusal]:
    """Rows of the table: the model dense at every batch size, then packed; it stays packed.

    Args:
        name: of the model, for the table.
    """
    dense = {batch: decode(model, batch, record) for batch in batches}
    pack(model, layout)
    for batch, before in dense.items():
        yield _row(name, "cuBLAS", batch, before, before)
        after = decode(model, batch, record)
        truth = before.logits.double()
        difference = float((after.logits.double() - truth).norm() / truth.norm())
        if difference <= AGREE:
            yield _row(name, layout, batch, after, before) | {"relative_error": difference}
        else:
            yield Refusal(name, batch, layout, f"wrong: the logits differ by {difference:.2g} from the dense model's")


def _row(name: str, kernel: str, batch: int, found: Decoding, dense: Decoding) -> dict[str, Any]:
    low, median, high = (float(value) for value in np.percentile(found.microseconds, [10, 50, 90]))
    row: dict[str, Any] = {
        "layer": name,
        "dtype": str(found.logits.dtype).removeprefix("torch."),
        "rows": batch,
        "kernel": kernel,
        "microseconds": median,
        "p10": low,
        "p90": high,
        "speedup": float(np.median(dense.microseconds)) / median,
        "tokens_per_second": batch / median * 1e6,
    }
    if found.peak is not None and dense.peak is not None:
        row |= {"peak_megabytes": found.peak / 1e6, "memory_ratio": found.peak / dense.peak}
    return row
