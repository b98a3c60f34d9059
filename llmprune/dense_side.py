"""The dense model's stream beside the pruned one, and what it has for each of a block's groups.

It passes through every block while that is still dense. A group whose output is added to the residual stream
is given that output and, on top, the error that the stream has gathered so far: it can cancel it. Any other
group is given its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stream import Stream
from llmprune.wiring import Group, Wiring, listening


class DenseSide:
    """The dense values of every micro-batch, kept on the CPU until they are taken."""

    def __init__(self, dense: Stream, pruned: Stream, residual: float) -> None:
        """`residual` in [0, 1] is the share of the stream's error that is added to the targets."""
        self._dense, self._pruned, self._residual = dense, pruned, residual
        self._values: list[dict[Group, Tensor]] = []
        self._buffers: dict[tuple[int, int], Tensor] = {}  # by micro-batch and group; fresh ones would cost page faults
        self._error: list[Tensor] = []  # dense minus pruned residual stream, by micro-batch

    def run(self, index: int, wiring: Wiring) -> None:
        """Take the dense stream through block `index`, and keep what its groups received or returned."""
        groups = [group for group in wiring.groups if not group.routed]
        joins = any(group.joins_stream for group in groups)

        def keep(group: Group, value: Tensor) -> None:
            place = len(self._values) - 1, groups.index(group)
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = self._buffers[place] = torch.empty_like(value, device="cpu")
            # A copy, as blocks add to what enters or leaves a site in place.
            self._values[-1][group] = buffer.copy_(value)

        def arrived(group: Group, x: Tensor) -> None:
            if not group.joins_stream:
                keep(group, x)

        self._values.clear()
        if joins and not self._error:
            self._error = [torch.empty_like(hidden) for hidden in self._dense.hidden]
        with listening(groups, arrived, keep):
            for batch, hidden in enumerate(self._dense.hidden):
                self._values.append({})
                output = self._dense.run(index, batch)
                if joins:
                    torch.sub(hidden, self._pruned.hidden[batch], out=self._error[batch])
                hidden.copy_(output)
        self._dense.forget(index)

    def take(self, batch: int, group: Group) -> Tensor | None:
        """What the dense model has for the group; None for experts, to which other tokens go there."""
        value = self._values[batch].get(group)
        if value is None:
            return None
        if not group.joins_stream:
            return self._values[batch].pop(group)
        if not self._residual:
            return value
        return value + self._residual * self._error[batch].reshape(value.shape)  # some blocks flatten their tokens

    def settle(self, batch: int, group: Group, output: Tensor | None) -> None:
        """The group has returned `output`, or None: it will hit what it was given.

        What it misses is added to the error that later groups may cancel.
        """
        value, error = self._values[batch].pop(group), self._error[batch]
        if output is None:
            error.zero_()
        else:
            error += value.sub_(output.to("cpu")).reshape(error.shape)
