"""The hidden states of some token windows on their way through a model, block by block.

A stream is captured once: the model runs with its blocks replaced by recorders, so that each block's own
arguments (masks, positions: they differ between blocks of sliding-window models) are known without naming
any of them. From then on only one block at a time is needed, on whichever device has room.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a block, the hidden states left out."""


class Stream:
    """Hidden states of micro-batches, kept on the CPU.

    Attributes:
        hidden: one [batch, seqlen, hidden] tensor per micro-batch: what enters the next block.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], windows: Tensor, batch_size: int):
        """Embed token windows [n, seqlen] and record the arguments of every block.

        `model` must be in eval mode; n may be 0.
        """
        self._model, self._blocks = model, list(blocks)
        self._batches: list[Tensor] = list(windows.split(batch_size)) if len(windows) else []
        self.hidden: list[Tensor] = []
        self._arguments: list[list[Arguments]] = [[] for _ in self._blocks]  # [block][micro-batch]
        self._tuples: dict[type[nn.Module], bool] = {}
        with replaced_forwards(self._blocks, self._recorder):
            for batch in self._batches:
                self._model.base_model(input_ids=batch.to(_embedding_device(model)), use_cache=False)

    def __len__(self) -> int:
        return len(self._batches)

    def _recorder(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        block = self._blocks[index]
        first = next(iter(inspect.signature(forward).parameters))

        def record(*args: Any, **kwargs: Any) -> Any:
            if type(block) not in self._tuples:
                output = forward(*args, **kwargs)
                self._tuples[type(block)] = isinstance(output, tuple)
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
            recorded: Arguments = send_to_device((rest, kwargs), "cpu")
            earlier = self._arguments[index]
            self._arguments[index].append(_interned(recorded, earlier[-1]) if earlier else recorded)
            if index == 0:
                self.hidden.append(hidden.to("cpu"))
            return (hidden,) if self._tuples[type(block)] else hidden

        return record

    def run(self, index: int, batch: int) -> Tensor:
        """Run block `index` on micro-batch `batch`; the result is on the block's device."""
        block = self._blocks[index]
        device = next(block.parameters()).device
        args, kwargs = send_to_device(self._arguments[index][batch], device)
        output = block(self.hidden[batch].to(device), *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        return hidden

    def forget(self, index: int) -> None:
        """Drop the arguments of a block that will not run again."""
        self._arguments[index] = []

    def logits(self, batch: int) -> Tensor:
        """What the model's own end (final norm, head) makes of the hidden states, [batch, seqlen, vocabulary].

        The blocks are stepped over; the last one hands out `hidden`.
        """
        last = len(self._blocks) - 1

        def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def skip(*args: Any, **kwargs: Any) -> Any:
                given: Tensor = args[0] if args else next(iter(kwargs.values()))
                output = self.hidden[batch].to(given.device) if index == last else given
                return (output,) if self._tuples[type(self._blocks[index])] else output

            return skip

        with replaced_forwards(self._blocks, stub):
            tokens = self._batches[batch].to(_embedding_device(self._model))
            output = self._model(input_ids=tokens, use_cache=False)
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    def tokens(self, batch: int) -> Tensor:
        """The token ids [batch, seqlen] of a micro-batch."""
        return self._batches[batch]


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give each module the forward that make(index, its own forward) returns, and put the old one back.

    An instance's own `forward` is restored, never deleted: accelerate keeps its device hook there.
    """
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            own = module.__dict__.get("forward")
            new = make(index, module.forward)
            if own is None:
                stack.callback(module.__dict__.pop, "forward", None)
            else:
                stack.callback(module.__dict__.__setitem__, "forward", own)
            module.__dict__["forward"] = new
        yield


@contextmanager
def visiting(block: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """Bring a block to a device (None: where it is) and take it home again."""
    home = next(block.parameters()).device
    away = device is not None and device != home
    if away:
        block.to(device)
    try:
        yield device if away and device is not None else home
    finally:
        if away:
            block.to(home)


def _embedding_device(model: PreTrainedModel) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device


def _interned(value: Any, before: Any) -> Any:
    """The object of the micro-batch before where it is equal: masks and positions mostly repeat."""
    if isinstance(value, Tensor) and isinstance(before, Tensor):
        same = value.shape == before.shape and value.dtype == before.dtype and torch.equal(value, before)
        return before if same else value
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(_interned(v, b) for v, b in zip(value, before, strict=True))
    if isinstance(value, dict) and isinstance(before, dict):
        return {key: _interned(v, before.get(key)) for key, v in value.items()}
    return value
