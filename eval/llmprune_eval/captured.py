"""Greedy decoding as servers do it: a cache of fixed size, and each step replayed from one CUDA graph.

Launched one by one, the hundreds of small kernels of a step keep a GPU waiting for the CPU, and a model that reads
fewer bytes is no faster. In a graph the time of a step is the GPU's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from llmprune_kernels.graphs import capture_stream, capturing
from torch import Tensor

from llmprune_eval.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2
_NO_GRAPH = "its decoding cannot be timed in a CUDA graph; pass --no-graph to launch each step from Python"
Action = Callable[[], None]
Record = Callable[[Action, Action], Action]


def captured(model: PreTrainedModel, tokens: Tensor, new_tokens: int, record: Record | None = None) -> Iterator[Tensor]:
    """Yield the likeliest next tokens [batch, 1], as speed.greedy does, at most `new_tokens` after the first.

    The prompt is read, and the step is warmed up and captured, before the first is yielded. What is yielded is
    overwritten by the next step.

    Args:
        tokens: ids [batch, prompt].
        record: (step, rewind) -> what repeats the step, with everything rewound; None captures it in a CUDA graph.

    Raises:
        InputError: the step cannot be captured.
    """
    from transformers.cache_utils import StaticCache, StaticLayer

    batch, prompt = tokens.shape
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=prompt + new_tokens)
    layers = [layer for layer in cache.layers if type(layer) is StaticLayer]
    if len(layers) < len(cache.layers):  # a graph does not repeat what they count in Python, nor forget what they mixed
        raise InputError(f"{type(model).__name__} keeps sliding windows or recurrent states: {_NO_GRAPH}")
    first = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    token, position = first.clone(), torch.full((batch, 1), prompt, device=tokens.device)

    def step() -> None:
        logits = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    def rewind() -> None:
        token.copy_(first)
        position.fill_(prompt)
        for layer in layers:
            layer.cumulative_length.fill_(prompt)

    replay = (record or _graph)(step, rewind)
    yield token
    while True:
        replay()
        yield token


def _graph(step: Action, rewind: Action) -> Action:
    """The step in a CUDA graph of the current device."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    own = capture_stream(torch.cuda.current_device())
    own.wait_stream(before)
    with torch.cuda.stream(own):  # libraries make their workspaces for the stream of the capture
        for _ in range(WARM_UP):
            rewind()
            step()
        rewind()
    before.wait_stream(own)
    try:
        with capturing(graph, stream=own):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error.__context__ or error).partition("\n")[0]
        raise InputError(f"a step of this model cannot be captured ({reason}): {_NO_GRAPH}") from error
    graph.replay()  # the first launch also carries the graph to the device
    rewind()
    return graph.replay
