"""Least squares towards the dense model's output by brute force, the oracle of the dense target.

For every single site both whole models run over all windows, the target is formed for every token, and every row
is solved for on its own, in float64. Which outputs join the residual stream is known from reading the models' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from brute_force import in_order_of_calls, slots_of
from families import Family
from torch import Tensor, nn
from transformers import PreTrainedModel

JOINS: dict[str, dict[str, tuple[str, str]]] = {
    "llama": {"self_attn.o_proj": ("input_layernorm", ""), "mlp.down_proj": ("post_attention_layernorm", "")},
    "opt": {"self_attn.out_proj": ("self_attn_layer_norm", ""), "fc2": ("final_layer_norm", "")},
    "gptj": {"attn.out_proj": ("ln_1", ""), "mlp.fc_out": ("ln_1", "attn.out_proj")},
    "falcon": {"self_attention.dense": ("ln_attn", ""), "mlp.dense_4h_to_h": ("ln_attn", "self_attention.dense")},
    "gemma2": {},
    "olmo2": {},
}
"""By family: the sites whose output is added to the residual stream as it is, the module that has received the
stream, and the site whose output is added to it in the meantime. The others have norms behind their outputs."""

LIKE_LLAMA = frozenset({"self_attn.o_proj", "mlp.down_proj"})
ATTENTION_ONLY = frozenset({"self_attn.o_proj"})
LIKE_BLOOM = frozenset({"self_attention.dense", "mlp.dense_4h_to_h"})
JOINING: dict[str, frozenset[str]] = {
    **{name: frozenset(sites) for name, sites in JOINS.items()},
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "phi3", "cohere", "stablelm"), LIKE_LLAMA),
    **dict.fromkeys(("qwen3_moe", "ernie4_5_moe", "deepseek_v3"), LIKE_LLAMA),  # each has a block without experts
    **dict.fromkeys(("mixtral", "olmoe", "gpt_oss"), ATTENTION_ONLY),
    **dict.fromkeys(("falcon_alibi", "bloom"), LIKE_BLOOM),
    **dict.fromkeys(("gemma3", "gemma4", "granite"), frozenset()),  # norms, or a factor, behind the outputs
    "starcoder2": frozenset({"self_attn.o_proj", "mlp.c_proj"}),
    "gpt2": frozenset({"attn.c_proj", "mlp.c_proj"}),
    "gpt_neox": frozenset({"attention.dense", "mlp.dense_4h_to_h"}),
    "mpt": frozenset({"attn.out_proj", "ffn.down_proj"}),
    "qwen3_next": frozenset({"linear_attn.out_proj", "self_attn.o_proj"}),
}
"""The sites that JOINS speaks of, by the names of all families in a block. What is summed with the output of routed
experts is not among them."""


@dataclass
class Solved:
    """What is expected of a site: weight [out, in], bias [out] or None, and the mask that its target's scores give."""

    weight: Tensor
    bias: Tensor | None
    keep: Tensor


def ridge(rows: int, width: int) -> float:
    """The damping, as a share of the mean diagonal."""
    return 0.01 + width / rows


def rows_through(model: PreTrainedModel, windows: Tensor, receive: Sequence[str], give: Sequence[str]) -> list[Tensor]:
    """Float64 rows [tokens, width] that enter the modules `receive` and leave the modules `give`."""
    rows: dict[int, Tensor] = {}
    handles = []
    for place, name in enumerate((*receive, *give)):
        entering = place < len(receive)

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Any, place: int = place) -> None:
            rows[place] = output.double().flatten(0, -2)  # a copy: blocks write on

        def keep_input(module: nn.Module, args: tuple[Tensor, ...], place: int = place) -> None:
            rows[place] = args[0].double().flatten(0, -2)

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(keep_input) if entering else module.register_forward_hook(keep))
    model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return [rows[place] for place in range(len(rows))]


def solve(W: Tensor, b: Tensor | None, x: Tensor, wanted: Tensor, keep: Tensor) -> Solved:
    """Minimise the squares of w x + bias - wanted and, damped, those of w - W, over the kept w of every row."""
    x_mean, t_mean = (x.mean(0), wanted.mean(0)) if b is not None else (x.mean(0) * 0, wanted.mean(0) * 0)
    H = (x - x_mean).T @ (x - x_mean)
    D = ridge(*x.shape) * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    right = (wanted - t_mean).T @ (x - x_mean) + W @ D
    weight = torch.zeros_like(W)
    for i, row in enumerate(keep):
        S = row.nonzero()[:, 0]
        weight[i, S] = torch.linalg.solve((H + D)[S][:, S], right[i, S])
    target = torch.linalg.solve(H + D, right.T).T
    scores = target.abs() * x.square().mean(0).sqrt()
    threshold = scores.kthvalue(scores.shape[1] // 2, dim=1, keepdim=True).values
    return Solved(weight, None if b is None else t_mean - weight @ x_mean, scores > threshold)


def regress_by_hand(
    name: str,
    family: Family,
    dense: PreTrainedModel,
    working: PreTrainedModel,
    windows: Tensor,
    chosen: Callable[[str], Tensor],
    *,
    mix: float = 0.75,
    residual: float = 1.0,
    sequential: str = "site",
) -> dict[str, Solved]:
    """Solve for `working` on the masks `chosen`, in place."""
    everything: dict[str, Solved] = {}
    for number, slots in enumerate(slots_of(working, family)):
        prefix = f"{family.blocks}.{number}."
        block = working.get_submodule(prefix[:-1])
        solved: dict[str, Solved] = {}
        joined = False
        for (site,) in in_order_of_calls(working, block, slots, family, number):
            module = working.get_submodule(site)
            bias: Any = module.bias
            W, b = slots[site].weight.double(), None if bias is None else bias.double()
            stream, between = JOINS[name].get(site.removeprefix(prefix), ("", ""))
            receive = [site, *[prefix + stream] * bool(stream)]
            give = [prefix + between] * bool(between)
            theirs, ours = (rows_through(model, windows, receive, give) for model in (dense, working))
            wanted = mix * theirs[0] @ W.T + (1 - mix) * ours[0] @ W.T + (0 if b is None else b)
            # In block order the sites before this one are still dense: the first that joins is to repair it all.
            if stream and not (sequential == "block" and joined):
                errors = [there - here for there, here in zip(theirs[1:], ours[1:], strict=True)]
                wanted = wanted + mix * residual * sum(errors)
                joined = True
            solved[site] = solve(W, b, ours[0], wanted, chosen(site))
            if sequential == "site":
                _write(working, slots, {site: solved[site]})
        _write(working, slots, solved)
        everything |= solved
    return everything


def _write(model: PreTrainedModel, slots: dict[str, Any], solved: dict[str, Solved]) -> None:
    for name, found in solved.items():
        slots[name].weight.copy_(found.weight)
        if found.bias is not None:
            bias: Any = model.get_submodule(name).bias
            bias.copy_(found.bias)
