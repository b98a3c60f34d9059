"""Units of whole models: what belongs to each, how many stay, and the smaller model against the masked one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import assert_same, bits, block_sizes, cut
from families import COMMON, FAMILIES, MIXED_LAYERS, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from unit_tables import BLOCK_SIZES, HEADS_FROM_WIDTH, TIED, UNITS, unit_of_entries

from llmprune import InputError
from llmprune.structured.layout import find_layout
from llmprune.structured.surgery import shrunk
from llmprune.structured.widths import choose_widths

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", UNITS)


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    found: Tensor = model(input_ids=windows, use_cache=False).logits
    return found


def clear_(block: Any, site: str, columns: list[int]) -> None:
    """Zero some inputs of an output projection."""
    module = block.get_submodule(site)
    weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
    weight[columns] = 0.0


def masked_and_kept(name: str) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A model with random units cleared, and those that stay: one group of two where heads can go, 41 channels."""
    model, generator = FAMILIES[name].build(), torch.Generator().manual_seed(5)
    kept: list[dict[str, Tensor]] = []
    for block in model.get_submodule(FAMILIES[name].blocks).children():
        kept.append({})
        for site, units, columns, _ in UNITS[name]:
            if units < 67 and name in HEADS_FROM_WIDTH:
                continue
            stay = torch.randperm(units, generator=generator)[: 41 if units == 67 else 1].sort().values
            kept[-1][site] = stay
            gone = [u for u in range(units) if u not in stay.tolist()]
            clear_(block, site, [u * columns + i for u in gone for i in range(columns)])
    return model, kept


def test_the_units_of_a_decoder_beside_a_vision_tower_that_is_longer() -> None:
    text = {**COMMON, "vocab_size": VOCABULARY, "head_dim": 10, "layer_types": MIXED_LAYERS}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    layout = find_layout(model.eval())
    assert [(kind.site, kind.units) for kind in layout.kinds] == [("self_attn.o_proj", 2), ("mlp.down_proj", 67)]
    small = cut(model, 0.3).model
    assert len(small.model.language_model.layers) == 3
    assert small.config.text_config.intermediate_size < 67
    assert small.config.vision_config.intermediate_size == 24


def test_the_units_of_a_model_of_few_positions() -> None:
    layout = find_layout(FAMILIES["opt"].build(max_position_embeddings=8))
    assert [(kind.site, kind.units) for kind in layout.kinds] == [row[:2] for row in UNITS["opt"]]


@every_family
def test_the_units_are_those_of_the_table(name: str) -> None:
    layout = find_layout(FAMILIES[name].build())
    assert layout.tied == TIED.get(name, ())
    assert [(kind.site, kind.units, kind.columns) for kind in layout.kinds] == [row[:3] for row in UNITS[name]]
    for kind, (*_, entries) in zip(layout.kinds, UNITS[name], strict=True):
        found = {cut.name: (cut.axis, cut.unit.tolist()) for cut in kind.cuts}
        assert found == {path: (axis, unit_of_entries(runs)) for path, (axis, runs) in entries.items()}


@every_family
def test_the_layout_needs_no_weights(name: str) -> None:
    model = FAMILIES[name].build()
    with torch.device("meta"):
        empty: PreTrainedModel = type(model)(model.config)
    assert [kind.parameters for kind in find_layout(empty).kinds] == [k.parameters for k in find_layout(model).kinds]


@every_family
def test_freed_parameters_are_those_of_the_formula(name: str) -> None:
    size, layout = BLOCK_SIZES[name], find_layout(FAMILIES[name].build())
    groups = layout.kinds[0].units if name not in TIED else 2
    expected = [] if name in TIED else [size(groups, 67) - size(groups - 1, 67)]
    assert [kind.parameters for kind in layout.kinds] == [*expected, size(groups, 67) - size(groups, 66)]


@every_family
def test_surgery_equals_masking(name: str, windows: Tensor, tmp_path: Path) -> None:
    masked, kept = masked_and_kept(name)
    wanted = logits(masked, windows)
    dense = block_sizes(masked, FAMILIES[name].blocks)
    whole = sum(p.numel() for p in masked.parameters())
    smaller = shrunk(masked, find_layout(masked), kept)
    found = logits(smaller, windows)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    groups = next((units for _, units, _, _ in UNITS[name] if units < 67), 2)
    groups = groups if name in HEADS_FROM_WIDTH or name in TIED else 1
    now = block_sizes(smaller, FAMILIES[name].blocks)
    assert now == [BLOCK_SIZES[name](groups, 41)] * 3
    assert whole - sum(p.numel() for p in smaller.parameters()) == sum(dense) - sum(now)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(masked)
    assert torch.equal(logits(again, windows), found)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    result = cut(FAMILIES["qwen2"].build(), 0.5).model
    assert result.lm_head.weight is result.model.embed_tokens.weight
    result.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same(again, bits(result))


def test_a_bfloat16_model_computes_what_its_file_does(windows: Tensor, tmp_path: Path) -> None:
    FAMILIES["llama"].build().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    smaller = cut(masked, 0.4).model
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    smaller.save_pretrained(tmp_path / "small")
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), windows)
    assert (again - logits(masked, windows)).norm() < 0.01 * again.norm()
    assert torch.equal(logits(smaller, windows), again)


@pytest.mark.parametrize("name", sorted(HEADS_FROM_WIDTH))
def test_families_that_cannot_say_fewer_heads_keep_them(name: str) -> None:
    model = FAMILIES[name].build()
    (attention, *_), (ffn, *_) = UNITS[name]
    widths = choose_widths(model, find_layout(model), 0.8 * BLOCK_SIZES[name](4 if UNITS[name][0][1] == 4 else 2, 67))
    assert widths.kept.keys() == {ffn}
    assert widths.fixed.keys() == {attention}
    assert "cannot say that there are fewer" in widths.fixed[attention]


def test_attention_under_a_norm_of_all_heads_stays() -> None:
    result = cut(FAMILIES["olmo2"].build(), 0.3)
    assert result.report.widths is not None
    assert result.report.widths["fixed"] == {"self_attn.o_proj": "its inputs hang together"}
    assert result.model.config.num_attention_heads == 4
    assert result.model.config.intermediate_size == result.report.widths["kept"]["mlp.down_proj"] < 67


@pytest.mark.parametrize(("name", "message"), [
    ("bloom", "cannot be cut to smaller widths"),
    ("mpt", "cannot be cut to smaller widths"),
    ("qwen3_moe", r"model\.layers\.1\.mlp.* is not as in model\.layers\.0"),
])  # fmt: skip
def test_a_refusal_is_one_line_and_changes_nothing(name: str, message: str) -> None:
    model = FAMILIES[name].build()
    before = bits(model)
    with pytest.raises(InputError, match=message) as error:
        cut(model, 0.2)
    assert "\n" not in str(error.value)
    assert_same(model, before)
