"""Gates on units: a factor on what each unit hands to its output projection, through which a loss can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval.evaluate import evaluating
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmprune.blocks import Block
from llmprune.collectives import summed_, world
from llmprune.errors import InputError
from llmprune.patterns import Columns
from llmprune.stream import replaced_forwards
from llmprune.wiring import first_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """One factor for every unit of every block; with all at 1 the model is as it was.

    Attributes:
        values: by output projection's path, [blocks, units] float32.
        sizes: columns of a unit, by the same path.
        keeps: how many of them are to stay in a block.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        """The blocks' sites are the output projections, with their `Columns`."""
        self._blocks = blocks
        self.values: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.keeps: dict[str, int] = {}
        self._open = False
        for site in blocks[0].sites:
            path = site.name.removeprefix(f"{blocks[0].name}.")
            assert isinstance(site.pattern, Columns)
            self.sizes[path], self.keeps[path] = site.pattern.size, site.pattern.kept
            self.values[path] = torch.ones(len(blocks), site.shape[1] // site.pattern.size, device=device)

    def of_site(self, name: str) -> Tensor:
        """[units], the gates of one projection by its full name."""
        for index, block in enumerate(self._blocks):
            if name.startswith(f"{block.name}."):
                return self.values[name.removeprefix(f"{block.name}.")][index]
        raise KeyError(name)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the model runs with the gates."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                for path in self.values:
                    module = block.module.get_submodule(path)
                    stack.callback(module.register_forward_pre_hook(self._gate(path, index), with_kwargs=True).remove)
            yield

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While it lasts, applied gates let everything pass: the model is dense."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _gate(self, path: str, index: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._open:
                return None
            x = first_of(args, kwargs)
            gates = self.values[path][index].repeat_interleave(self.sizes[path])
            gated = (x.float() * gates).to(x.dtype)
            return ((gated, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): gated})

        return before


Loss = Callable[[Tensor], Tensor]
"""What to minimise: token windows [n, seqlen] -> mean over their tokens, with the gates applied."""


def gradients(
    gates: Gates, loss: Loss, windows: Tensor, batch_size: int, also: Sequence[Tensor] = ()
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Mean loss over windows [n, seqlen], of all ranks together, and its gradient at the gates as they are.

    Each rank takes its share of the windows; every rank returns the same. At what is in `also` the gradients are
    this rank's part of the sum.
    """
    leaves = {path: value.detach().requires_grad_() for path, value in gates.values.items()}
    sums = {path: torch.zeros_like(value) for path, value in gates.values.items()}
    further = [torch.zeros_like(value) for value in also]
    total = torch.zeros(1, device=next(iter(sums.values())).device)
    plain, gates.values = gates.values, leaves
    try:
        with gates.applied():
            for batch, share in own_batches(windows, batch_size):
                with torch.enable_grad():
                    value = loss(batch)
                found = torch.autograd.grad(value, [*leaves.values(), *also])
                for part, gradient in zip([*sums.values(), *further], found, strict=True):
                    part += share * gradient
                total += share * value.detach()
    finally:
        gates.values = plain
    for part in (total, *sums.values()):
        summed_(part)
    return total.item(), sums, further


@torch.no_grad()
def mean_loss(gates: Gates, loss: Loss, windows: Tensor, batch_size: int) -> float:
    """Mean loss over windows [n, seqlen], of all ranks together, at the gates as they are."""
    total = torch.zeros(1, device=next(iter(gates.values.values())).device)
    with gates.applied():
        for batch, share in own_batches(windows, batch_size):
            total += share * loss(batch)
    summed_(total)
    return total.item()


def own_batches(windows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, float]]:
    """This rank's windows, each batch with its share of all ranks' windows; a rank may have none."""
    rank, ranks = world()
    own = windows[rank::ranks]
    for batch in own.split(batch_size) if len(own) else ():
        yield batch, len(batch) / len(windows)


@contextmanager
def frozen(model: PreTrainedModel, device: torch.device | None) -> Iterator[torch.device]:
    """The whole model on one device, in evaluation mode, its weights without gradients; all is put back after."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise InputError("the model lies on several devices: load it without a device map to learn on it")
    home, place = model.device, device or model.device
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moved: Any = model.requires_grad_(False)
    moved.to(place)
    try:
        with evaluating(model):
            yield place
    finally:
        moved.to(home)
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(blocks: Sequence[Block]) -> Iterator[None]:
    """Keep of every block only what enters it, and run it again for its gradients."""

    def make(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return again

    with replaced_forwards([block.module for block in blocks], make):
        yield
