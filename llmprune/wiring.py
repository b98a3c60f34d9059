"""How the sites of a block hang together, and ways to see what passes through them.

Modules are seen by hooks. An expert's slice of a fused parameter has no module: its calls are recognised by the
memory that the weight argument lives in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.sites import Site

_PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


@dataclass(eq=False)
class Group:
    """Sites that receive the same tensor; the first is watched for all.

    Attributes:
        stage: position in the order in which inputs arrive. The experts of one part arrive together.
        joins_stream: True if the output is added to the residual stream with nothing in between.
        routed: True for experts, to which other tokens may go in another model.
    """

    sites: list[Site]
    stage: int
    joins_stream: bool = False
    routed: bool = False

    @property
    def leader(self) -> Site:
        """The site that is watched."""
        return self.sites[0]


@dataclass
class Wiring:
    """The groups of a block by stage.

    Attributes:
        repeats: names of sites that were called more than once in the pass.
    """

    groups: list[Group]
    repeats: list[str]

    def stages(self) -> list[list[Group]]:
        """The groups of each stage, in order."""
        numbers = sorted({group.stage for group in self.groups})
        return [[group for group in self.groups if group.stage == number] for number in numbers]


class SliceWatch(TorchFunctionMode):
    """Sees every matrix product and reports those whose weight is a slice of a fused parameter."""

    def __init__(self, slices: Sequence[Site], saw: Callable[[Site, Tensor], None]) -> None:
        super().__init__()
        self._saw = saw
        self._by_address = {site.weight.data_ptr(): site for site in slices}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            site = self._by_address.get(args[1].data_ptr())
            if site is not None and args[1].ndim == 2:
                stored_transposed = func is not nn.functional.linear
                if stored_transposed != site.transposed:
                    raise RuntimeError(f"{site.name} is used in another orientation than its module announces")
                self._saw(site, args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def listening(
    groups: Sequence[Group],
    arrived: Callable[[Group, Tensor], None],
    returned: Callable[[Group, Tensor], None] | None = None,
) -> Iterator[None]:
    """Report every input that arrives at a group, and the outputs of those that join the stream.

    The experts of a fused parameter are left out: they have no module to watch.
    """
    with ExitStack() as stack:
        for group in (group for group in groups if group.leader.index is None):
            module = group.leader.module

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], group: Group = group) -> None:
                arrived(group, first_of(args, kwargs))

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if group.joins_stream and returned is not None:

                def after(
                    module: nn.Module,
                    args: tuple[Any, ...],
                    output: Tensor,
                    group: Group = group,
                    returned: Callable[[Group, Tensor], None] = returned,
                ) -> None:
                    returned(group, output)

                stack.callback(module.register_forward_hook(after).remove)
        yield


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's input, however it was passed."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value
