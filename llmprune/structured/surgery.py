"""Cut the pruned units out: a smaller plain model of the same class, proven to compute what the masked one does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval.evaluate import evaluating
from torch import Tensor
from transformers.initialization import no_init_weights

from llmprune.blocks import find_blocks
from llmprune.errors import InputError
from llmprune.structured.layout import Layout
from llmprune.structured.widths import changed_config, config_changes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

PROOF_TOKENS = 32


@torch.no_grad()
def shrunk(model: PreTrainedModel, layout: Layout, units: Sequence[Mapping[str, Tensor]]) -> PreTrainedModel:
    """A smaller model that has only some units of each block.

    Args:
        model: its pruned units are masked already (the columns of the output projections are zero), so that both
            models must compute the same.
        layout: of `model` as it is now.
        units: for every block, the numbers of the units that stay [kept], ascending, by output projection; as many
            in every block.

    Raises:
        InputError: the parts of the model are spread over devices.
        RuntimeError: the smaller model computes something else.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise InputError("the model lies on several devices: load it without a device map to cut it")
    changes = config_changes(model, layout, {site: len(kept) for site, kept in units[0].items()})
    assert changes is not None, "widths are chosen among those that the config can say"
    with no_init_weights():
        built: Any = type(model)(changed_config(model.config, changes))
    smaller: PreTrainedModel = built.to(model.device)
    smaller.load_state_dict(_cut_state(model, layout, units), assign=True)
    smaller.tie_weights()
    _make_alike_(smaller, model)
    _prove_same(model, smaller)
    return smaller


def _make_alike_(smaller: PreTrainedModel, model: PreTrainedModel) -> None:
    """What a state dict does not carry over: the buffers that are not saved, in their dtype, and the flags."""
    for name, buffer in model.named_buffers():
        parent, _, key = name.rpartition(".")
        smaller.get_submodule(parent)._buffers[key] = buffer.clone()
    for name, parameter in model.named_parameters():
        smaller.get_parameter(name).requires_grad_(parameter.requires_grad)
    for name, module in model.named_modules():
        smaller.get_submodule(name).training = module.training
    smaller.generation_config = model.generation_config
    smaller.name_or_path = model.name_or_path


def _cut_state(model: PreTrainedModel, layout: Layout, units: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Every parameter and buffer that is saved, those of the blocks without what goes."""
    state = dict(model.state_dict())
    for (path, _), kept in zip(find_blocks(model), units, strict=True):
        for kind in layout.kinds:
            for cut in kind.cuts if kind.site in kept else ():
                name = f"{path}.{cut.name}"
                entries = cut.kept(kept[kind.site]).to(state[name].device)
                state[name] = state[name].index_select(cut.axis, entries).contiguous()
    return state


def _prove_same(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Raise RuntimeError unless both models give the same logits, InputError where these are not finite."""
    tokens = (torch.arange(PROOF_TOKENS, device=model.device) * 7919 % model.config.get_text_config().vocab_size)[None]
    with evaluating(model), evaluating(smaller):
        masked, cut = (m(input_ids=tokens, use_cache=False).logits.float() for m in (model, smaller))
    if not bool(torch.isfinite(masked).all()):
        raise InputError(
            "the pruned model's logits are not finite (NaN or infinity): the model overflows in its dtype; try "
            "--dtype float32"
        )
    difference = ((masked - cut).norm() / masked.norm().clamp(min=1e-12)).item()
    if not difference <= (1e-4 if model.dtype == torch.float32 else 5e-2):  # half precision rounds other sums
        raise RuntimeError(
            f"the cut model's logits differ from the masked model's by {difference:.2g} of their size; nothing was "
            "written; please report this"
        )
    log.info("cut model equals masked model: logits differ by %.1g of their size", difference)
