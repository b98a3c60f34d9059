"""The hidden states of some token windows on their way through a model, block by block.

A stream is captured once: the model runs with its blocks replaced by recorders, so that each block's own
arguments (masks, positions: they differ between blocks of sliding-window models) are known without naming
any of them. From then on only one block at a time is needed, on whichever device has room.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from llmprune.errors import InputError

if TYPE_CHECKING:
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

        Raises:
            InputError: the blocks are no chain that hands on hidden states and nothing else.
        """
        self._model, self._blocks = model, list(blocks)
        self._batches: list[Tensor] = list(windows.split(batch_size)) if len(windows) else []
        self.hidden: list[Tensor] = []
        self._arguments: list[list[Arguments]] = [[] for _ in self._blocks]  # [block][micro-batch]
        self._further: dict[type[nn.Module], tuple[Any, ...] | None] = {}  # outputs behind the hidden states
        with replaced_forwards(self._blocks, self._recorder):
            for number, batch in enumerate(self._batches, start=1):
                self._model.base_model(input_ids=batch.to(_embedding_device(model)), use_cache=False)
                self._check_calls(number)
        self._further = {kind: rest if rest is None else (None,) * len(rest) for kind, rest in self._further.items()}

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def copy(self) -> Stream:
        """A second stream that begins where this one is."""
        twin = copy.copy(self)
        twin.hidden = [hidden.clone() for hidden in self.hidden]
        twin._arguments = copy.deepcopy(self._arguments)  # some hold what blocks share, such as keys and values
        return twin

    def _recorder(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        block = self._blocks[index]
        first = next(iter(inspect.signature(forward).parameters))

        def record(*args: Any, **kwargs: Any) -> Any:
            if type(block) not in self._further:
                output = forward(*args, **kwargs)
                self._further[type(block)] = output[1:] if isinstance(output, tuple) else None
            self._check_handed_on(block, (*args, *kwargs.values()))
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
            recorded: Arguments = send_to_device((rest, kwargs), "cpu")
            earlier = self._arguments[index]
            self._arguments[index].append(_interned(recorded, earlier[-1]) if earlier else recorded)
            if index == 0:
                self.hidden.append(hidden.to("cpu", copy=True))  # ours alone: the walk writes to it
            return self._as_output(block, hidden)

        return record

    def _as_output(self, block: nn.Module, hidden: Tensor) -> Any:
        """The hidden states in the shape in which such a block returns them: a tensor or a tuple."""
        further = self._further[type(block)]
        return hidden if further is None else (hidden, *further)

    def _check_handed_on(self, block: nn.Module, arguments: Sequence[Any]) -> None:
        """Raise InputError if a block is given what another returned beside the hidden states: a replay lacks it."""
        for item in (item for further in self._further.values() for item in further or ()):
            if isinstance(item, Tensor) and any(argument is item for argument in arguments):
                raise InputError(
                    f"{type(block).__name__} takes more than hidden states from the block before: "
                    "such models are not supported"
                )

    def _check_calls(self, batches: int) -> None:
        """Raise InputError unless every block has run once in each of so many micro-batches."""
        for block, calls in zip(self._blocks, self._arguments, strict=True):
            if len(calls) != batches:
                raise InputError(
                    f"{type(block).__name__} does not run exactly once in a forward pass: such models are not supported"
                )

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
                return self._as_output(self._blocks[index], output)

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
