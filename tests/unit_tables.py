"""What a reader of seventeen models' code knows about their units: the rows of each and the size of a block.

Written down by hand for the sizes of `families.FAMILIES`: 40 features, 67 channels, 4 heads. "0*20 1*20" says that
the first twenty entries belong to unit 0 and the next twenty to unit 1.
"""

from __future__ import annotations

from collections.abc import Callable

Entries = dict[str, tuple[int, str]]
"""Parameter -> (axis that is cut, unit of every entry along it)."""
Units = tuple[str, int, int, Entries]
"""Output projection, number of units, columns of each, what is cut."""

CHANNELS = " ".join(f"{i}*1" for i in range(67))
HEADS = "0*10 1*10 2*10 3*10"


def unit_of_entries(runs: str) -> list[int]:
    """ "0*2 1*1" -> [0, 0, 1]."""
    return [int(unit) for run in runs.split() for unit, times in [run.split("*")] for _ in range(int(times))]


GROUPED: Units = ("self_attn.o_proj", 2, 20, {
    "self_attn.q_proj.weight": (0, "0*20 1*20"),
    "self_attn.k_proj.weight": (0, "0*10 1*10"),
    "self_attn.v_proj.weight": (0, "0*10 1*10"),
    "self_attn.o_proj.weight": (1, "0*20 1*20"),
})  # fmt: skip
GROUPED_BIASED: Units = (*GROUPED[:3], GROUPED[3] | {
    "self_attn.q_proj.bias": (0, "0*20 1*20"),
    "self_attn.k_proj.bias": (0, "0*10 1*10"),
    "self_attn.v_proj.bias": (0, "0*10 1*10"),
})  # fmt: skip
GROUPED_WIDE: Units = ("self_attn.o_proj", 2, 24, {
    "self_attn.q_proj.weight": (0, "0*24 1*24"),
    "self_attn.k_proj.weight": (0, "0*12 1*12"),
    "self_attn.v_proj.weight": (0, "0*12 1*12"),
    "self_attn.o_proj.weight": (1, "0*24 1*24"),
})  # fmt: skip
SWIGLU: Units = ("mlp.down_proj", 67, 1, {
    "mlp.gate_proj.weight": (0, CHANNELS),
    "mlp.up_proj.weight": (0, CHANNELS),
    "mlp.down_proj.weight": (1, CHANNELS),
})  # fmt: skip


def heads(parent: str, out: str, biased: bool) -> Units:
    """Separate projections of four heads that share nothing."""
    inner = [f"{parent}.{letter}_proj" for letter in "qkv"]
    entries: Entries = {f"{name}.{kind}": (0, HEADS) for name in inner for kind in ["weight"] + ["bias"] * biased}
    return f"{parent}.{out}", 4, 10, {**entries, f"{parent}.{out}.weight": (1, HEADS)}


def two_layers(inner: str, outer: str, biased: bool = True, transposed: bool = False) -> Units:
    """An FFN without a gate; transposed weights are [in, out]."""
    entries: Entries = {f"{inner}.weight": (int(transposed), CHANNELS), f"{outer}.weight": (1 - transposed, CHANNELS)}
    return outer, 67, 1, entries | ({f"{inner}.bias": (0, CHANNELS)} if biased else {})


PHI3: list[Units] = [
    ("self_attn.o_proj", 2, 20, {
        "self_attn.qkv_proj.weight": (0, "0*20 1*20 0*10 1*10 0*10 1*10"),  # all q, all k, all v
        "self_attn.o_proj.weight": (1, "0*20 1*20"),
    }),
    ("mlp.down_proj", 67, 1, {
        "mlp.gate_up_proj.weight": (0, f"{CHANNELS} {CHANNELS}"),
        "mlp.down_proj.weight": (1, CHANNELS),
    }),
]  # fmt: skip
GPT2: list[Units] = [
    ("attn.c_proj", 4, 10, {
        "attn.c_attn.weight": (1, f"{HEADS} {HEADS} {HEADS}"),  # Conv1D: [in, out]
        "attn.c_attn.bias": (0, f"{HEADS} {HEADS} {HEADS}"),
        "attn.c_proj.weight": (0, HEADS),
    }),
    two_layers("mlp.c_fc", "mlp.c_proj", transposed=True),
]  # fmt: skip
GPT_NEOX: list[Units] = [
    ("attention.dense", 4, 10, {
        "attention.query_key_value.weight": (0, "0*30 1*30 2*30 3*30"),  # q, k, v of a head, then the next head
        "attention.query_key_value.bias": (0, "0*30 1*30 2*30 3*30"),
        "attention.dense.weight": (1, HEADS),
    }),
    two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
]  # fmt: skip
FALCON: list[Units] = [
    ("self_attention.dense", 2, 20, {
        "self_attention.query_key_value.weight": (0, "0*40 1*40"),  # two q, k and v of a group, then the next group
        "self_attention.dense.weight": (1, "0*20 1*20"),
    }),
    two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", biased=False),
]  # fmt: skip

UNITS: dict[str, list[Units]] = {
    "llama": [GROUPED, SWIGLU],
    "mistral": [GROUPED, SWIGLU],
    "qwen2": [GROUPED_BIASED, SWIGLU],
    "qwen3": [GROUPED_WIDE, SWIGLU],
    "gemma2": [GROUPED_WIDE, SWIGLU],
    "gemma3": [GROUPED_WIDE, SWIGLU],
    "phi3": PHI3,
    "opt": [heads("self_attn", "out_proj", True), two_layers("fc1", "fc2")],
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "falcon": FALCON,
    "olmo2": [SWIGLU],
    "stablelm": [GROUPED, SWIGLU],
    "starcoder2": [GROUPED_BIASED, two_layers("mlp.c_fc", "mlp.c_proj")],
    "granite": [GROUPED_BIASED, SWIGLU],
    "cohere": [GROUPED, SWIGLU],
    "gptj": [heads("attn", "out_proj", False), two_layers("mlp.fc_in", "mlp.fc_out")],
}
TIED = {"olmo2": ("self_attn.o_proj",)}
"""Where a norm goes over all heads together."""
HEADS_FROM_WIDTH = {"opt", "gpt2", "gpt_neox", "gptj", "falcon", "stablelm"}
"""Their head width is the model's divided by the heads: fewer heads would be wider ones."""

BLOCK_SIZES: dict[str, Callable[[int, int], int]] = {
    "llama": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 3 * 40 * c + 2 * 40,
    "mistral": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 3 * 40 * c + 2 * 40,
    "qwen2": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + (20 + 10 + 10) * g + 3 * 40 * c + 2 * 40,
    "qwen3": lambda g, c: 40 * (24 + 12 + 12 + 24) * g + 2 * 12 + 3 * 40 * c + 2 * 40,
    "gemma2": lambda g, c: 40 * (24 + 12 + 12 + 24) * g + 3 * 40 * c + 4 * 40,
    "gemma3": lambda g, c: 40 * (24 + 12 + 12 + 24) * g + 2 * 12 + 3 * 40 * c + 4 * 40,
    "phi3": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 3 * 40 * c + 2 * 40,
    "opt": lambda g, c: (4 * 40 * 10 + 3 * 10) * g + 40 + (2 * 40 + 1) * c + 40 + 2 * 80,
    "gpt2": lambda g, c: (4 * 40 * 10 + 3 * 10) * g + 40 + (2 * 40 + 1) * c + 40 + 2 * 80,
    "gpt_neox": lambda g, c: (4 * 40 * 10 + 3 * 10) * g + 40 + (2 * 40 + 1) * c + 40 + 2 * 80,
    "falcon": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 2 * 40 * c + 2 * 80,
    "olmo2": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 40 + 20 + 3 * 40 * c + 2 * 40,
    "stablelm": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 3 * 40 * c + 2 * 80,
    "starcoder2": lambda g, c: 40 * 60 * g + (20 + 10 + 10) * g + 40 + (2 * 40 + 1) * c + 40 + 2 * 80,
    "granite": lambda g, c: 40 * 60 * g + (20 + 10 + 10) * g + 40 + 3 * 40 * c + 2 * 40,
    "cohere": lambda g, c: 40 * (20 + 10 + 10 + 20) * g + 3 * 40 * c + 40,
    "gptj": lambda g, c: 4 * 40 * 10 * g + (2 * 40 + 1) * c + 40 + 80,
}
"""Parameters of a block with g key/value groups and c channels."""
