"""Low-rank adapters trained beside the gates, by PEFT, and merged into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.blocks import survey
from llmprune.collectives import summed_
from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LEARNING_RATE = 1e-4
SCALING = 2


class Adapters:
    """Adapters on every linear layer of the blocks; AdamW moves them after every step of the gates.

    Attributes:
        parameters: those that are trained.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int) -> None:
        """Raises InputError if PEFT is not installed."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise InputError("adapters need the package peft: pip install llmprune[lora], or leave them out") from error
        names = [site.name for block in survey(model) for site in block.sites if site.index is None]
        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=names, init_lora_weights=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        self._model = model
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts, the model is as if they were not there."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move by gradients that are this rank's share of the mean."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            summed_(gradient)
            parameter.grad = gradient
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, to go on from later."""
        found = {}
        for number, parameter in enumerate(self.parameters):
            found[f"{number}/weight"] = parameter.detach()
            for name, value in self._optimizer.state.get(parameter, {}).items():
                found[f"{number}/{name}"] = value
        return found

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Go back to what `tensors` returned."""
        for number, parameter in enumerate(self.parameters):
            own = {k.split("/")[1]: v for k, v in tensors.items() if k.split("/")[0] == str(number)}
            parameter.data.copy_(own.pop("weight"))
            self._optimizer.state[parameter] = own

    def merge_(self) -> None:
        """Add them to the weights, and leave the model as it was built."""
        for name, layer in self._layers.items():
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            base: Any = layer.get_base_layer()
            assert isinstance(base, nn.Module)
            setattr(self._model.get_submodule(parent), attribute, base)
