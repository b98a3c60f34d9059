"""What a gated model is asked for: to say what the dense model says."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.blocks import find_blocks
from llmprune.structured.adapters import Adapters
from llmprune.structured.gates import Gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distillation:
    """kl * KL(dense || gated) + ce * cross-entropy + hidden * sum over blocks of the MSE of their outputs.

    Means over the tokens of windows [n, seqlen]; the dense model is the same with its gates open.
    """

    model: PreTrainedModel
    gates: Gates
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    adapters: Adapters | None = None

    def __call__(self, windows: Tensor) -> Tensor:
        """The loss, differentiable at the gates."""
        ids = windows.to(self.model.device)
        logits, states = self._run(ids)
        value = torch.zeros((), device=logits.device)
        if self.kl or self.hidden:
            with torch.no_grad(), self.gates.opened(), self.adapters.disabled() if self.adapters else nullcontext():
                wanted, wanted_states = self._run(ids)
            own = F.log_softmax(logits.flatten(0, 1).float(), -1)
            dense = F.log_softmax(wanted.flatten(0, 1).float(), -1)
            value = value + self.kl * F.kl_div(own, dense, reduction="batchmean", log_target=True)
            for ours, theirs in zip(states, wanted_states, strict=True):
                value = value + self.hidden * F.mse_loss(ours.float(), theirs.float())
        if self.ce:
            value = value + self.ce * F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return value

    def _run(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits, and the blocks' outputs if they matter."""
        states: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for _, block in find_blocks(self.model) if self.hidden else ():
                stack.callback(block.register_forward_hook(keep).remove)
            output = self.model(input_ids=ids, use_cache=False)
        return output.logits, tuple(states)
