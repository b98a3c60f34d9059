"""Tiny random models of many families, and what a reader of their code knows to be prunable in them.

The names are written down by hand: they are what the search for prunable weights is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
LLAMA_LIKE = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
ATTENTION = "q_proj k_proj v_proj o_proj"


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half, [..., 2 n] -> [..., n]."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """The interleaved, clamped gate of gpt_oss, [..., 2 n] -> [..., n]."""
    gate, up = gate_up[..., 0::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


def gelu_gate(gate_up: Tensor) -> Tensor:
    """GELU (the tanh form) of the first half times the second half, [..., 2 n] -> [..., n]."""
    gate, up = gate_up.chunk(2, -1)
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        build: makes the model, random, in evaluation mode.
        sites: last parts of the names of the modules, or fused parameters, that are pruned.
        unpruned: last parts of the names of the matrices in the blocks that are left alone: routers, convolutions.
        blocks: path of the list of blocks.
        gate: what an expert does between its two products; None without experts.
        experts_transposed: True if a fused parameter is [expert, in, out].
    """

    build: Callable[..., PreTrainedModel]
    sites: frozenset[str]
    unpruned: frozenset[str] = frozenset()
    blocks: str = "model.layers"
    gate: Callable[[Tensor], Tensor] | None = None
    experts_transposed: bool = False


def _build(model_type: str, settings: dict[str, object], **changes: object) -> PreTrainedModel:
    """A model with random biases and norms too: at their initial zeros and ones they would hide mistakes."""
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    assert isinstance(model, PreTrainedModel)
    return model


COMMON: dict[str, object] = {
    "hidden_size": 40,
    "intermediate_size": 67,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def _family(model_type: str, sites: str = LLAMA_LIKE, unpruned: str = "", **settings: object) -> Family:
    """A family whose config speaks the common names."""
    build = partial(_build, model_type, {**COMMON, **settings})
    return Family(build, frozenset(sites.split()), frozenset(unpruned.split()))


def _old(model_type: str, blocks: str, sites: str, **settings: object) -> Family:
    """A family with names of its own."""
    return Family(partial(_build, model_type, settings), frozenset(sites.split()), blocks=blocks)


def _mixture(model_type: str, sites: str, router: str, gate: Callable[[Tensor], Tensor] = swiglu,
             transposed: bool = False, **settings: object) -> Family:  # fmt: skip
    """A mixture of experts whose fused parameters are gate_up_proj and down_proj."""
    sizes: dict[str, object] = {"hidden_size": 32, "intermediate_size": 24, "num_experts_per_tok": 2}
    build = partial(_build, model_type, {**COMMON, **sizes, **settings})
    names = frozenset([*sites.split(), "gate_up_proj", "down_proj"])
    return Family(build, names, frozenset(router.split()), gate=gate, experts_transposed=transposed)


FAMILIES: dict[str, Family] = {
    "llama": _family("llama"),
    "mistral": _family("mistral", sliding_window=7),
    "qwen2": _family("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": _family("qwen3", head_dim=12),
    "gemma2": _family("gemma2", head_dim=12, sliding_window=7, query_pre_attn_scalar=12),
    "gemma3": _family(
        "gemma3_text", head_dim=12, sliding_window=7, query_pre_attn_scalar=12, layer_types=MIXED_LAYERS
    ),
    "phi3": _family("phi3", "qkv_proj o_proj gate_up_proj down_proj"),
    "starcoder2": _family("starcoder2", f"{ATTENTION} c_fc c_proj", sliding_window=7),
    "cohere": _family("cohere"),
    "stablelm": _family("stablelm", partial_rotary_factor=0.4),
    "olmo2": _family("olmo2"),
    "granite": _family("granite", attention_bias=True, residual_multiplier=0.5, embedding_multiplier=2.0),
    "opt": _old(
        "opt", "model.decoder.layers", "q_proj k_proj v_proj out_proj fc1 fc2",
        hidden_size=40, word_embed_proj_dim=40, ffn_dim=67, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, init_std=0.2,
    ),
    "gpt2": _old(
        "gpt2", "transformer.h", "c_attn c_proj c_fc",
        n_embd=40, n_inner=67, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2,
    ),
    "gpt_neox": _old(
        "gpt_neox", "gpt_neox.layers", "query_key_value dense dense_h_to_4h dense_4h_to_h",
        hidden_size=40, intermediate_size=67, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, rotary_pct=0.4,
    ),
    "gptj": _old(
        "gptj", "transformer.h", "q_proj k_proj v_proj out_proj fc_in fc_out",
        n_embd=40, n_inner=67, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.2,
    ),
    "falcon": _old(
        "falcon", "transformer.h", "query_key_value dense dense_h_to_4h dense_4h_to_h",
        hidden_size=40, ffn_hidden_size=67, num_hidden_layers=3, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, initializer_range=0.2,
    ),
    "falcon_alibi": _old(
        "falcon", "transformer.h", "query_key_value dense dense_h_to_4h dense_4h_to_h",
        hidden_size=40, ffn_hidden_size=67, num_hidden_layers=3, num_attention_heads=4, alibi=True,
        multi_query=False, parallel_attn=False, bias=True, initializer_range=0.2,
    ),
    "bloom": _old(
        "bloom", "transformer.h", "query_key_value dense dense_h_to_4h dense_4h_to_h",
        hidden_size=40, n_layer=3, n_head=4, initializer_range=0.2,
    ),
    "mpt": _old(
        "mpt", "transformer.blocks", "Wqkv out_proj up_proj down_proj",
        d_model=40, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=64, initializer_range=0.2,
    ),
    "mixtral": _mixture("mixtral", ATTENTION, "gate", num_local_experts=4, sliding_window=7),
    "qwen3_moe": _mixture("qwen3_moe", LLAMA_LIKE, "gate", num_experts=6, moe_intermediate_size=20,
                          mlp_only_layers=[1], norm_topk_prob=True),
    "olmoe": _mixture("olmoe", ATTENTION, "gate", num_experts=6),
    "gpt_oss": _mixture("gpt_oss", ATTENTION, "router", clamped_swiglu, True, num_local_experts=4, head_dim=12,
                        sliding_window=7, layer_types=MIXED_LAYERS, rope_parameters=PLAIN_ROPE),
    # Its last block uses the keys and values of the one before, which travel in an object of their own.
    "gemma4": _mixture(
        "gemma4_text", f"{LLAMA_LIKE} per_layer_input_gate per_layer_projection", "proj", gelu_gate,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=20, num_kv_shared_layers=1,
        head_dim=12, global_head_dim=12, sliding_window=7, layer_types=["full_attention"] * 3,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
    ),
    "ernie4_5_moe": _mixture("ernie4_5_moe", LLAMA_LIKE, "gate", moe_num_experts=4, moe_k=2, moe_intermediate_size=20,
                             moe_num_shared_experts=1, moe_layer_start_index=1),
    # As in the real one, keys, values and the shared expert have as many features as there are experts.
    "qwen3_next": _mixture(
        "qwen3_next", f"{LLAMA_LIKE} in_proj_qkvz in_proj_ba out_proj", "gate shared_expert_gate conv1d",
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=20, shared_expert_intermediate_size=16, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "full_attention"],
    ),
    "deepseek_v3": _mixture(
        "deepseek_v3", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj", "gate",
        num_key_value_heads=4, moe_intermediate_size=20, n_routed_experts=8, n_shared_experts=1, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12,
    ),
}  # fmt: skip
"""By name; each has three blocks and 97 tokens."""

MIXTURES = [name for name, family in FAMILIES.items() if family.gate is not None]


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])


def restored_state(model: PreTrainedModel) -> list[object]:
    """What a run may touch and must put back."""
    state: list[object] = [model.get_experts_implementation()]
    for module in model.modules():
        hooks = [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        state.append((module.training, module.__dict__.get("forward"), hooks))
    return state
