"""`llmprune plan`: what is counted is counted anew here, and what is recommended is what was measured best."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import strict_json
from families import FAMILIES
from tiny import ROOT, make_llama
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmprune import PruneConfig, prune
from llmprune.advice import Advice, make_advice
from llmprune.advice_text import advice_text
from llmprune.outlook import BEST_UNITS, BEST_ZEROS, PROBED, Machine, Needs
from llmprune.structured import layout

Ok = Callable[..., str]
Refused = Callable[..., str]

PLENTY = Machine(memory=10**15)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


def advise(model: PreTrainedModel, machine: Machine = PLENTY, **settings: Any) -> Advice:
    return make_advice(model, "folder/model", PruneConfig(**settings), machine)


def needs(advice: Advice) -> dict[tuple[str, str], Needs]:
    return {(one.pattern, one.method): one for one in advice.methods}


def commands(advice: Advice) -> dict[str, str | None]:
    return {one.goal: one.command for one in advice.recommendations}


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block may be run."""

    def never(model: PreTrainedModel) -> None:
        raise AssertionError("a block was built and run")

    monkeypatch.setattr(layout, "_shallow", never)


@pytest.mark.usefixtures("unprobed")
def test_a_model_of_70b_from_its_config(tmp_path: Path, ok: Ok) -> None:
    LLAMA_70B.save_pretrained(tmp_path / "70b")
    facts = strict_json(ok("plan", "70b", "--json"))
    block = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672  # the matrices
    decoder, outside = 80 * (block + 2 * 8192), 2 * 128256 * 8192 + 8192
    assert (facts["decoder_parameters"], facts["model_parameters"]) == (decoder, decoder + outside)
    assert facts["size"] == 2 * (decoder + outside)
    zeros, pairs, units = facts["patterns"]
    for one in (zeros, pairs):
        assert one["removed"] == pytest.approx(40 * block / decoder)
        assert (one["size"], one["speedup"]) == (facts["size"], 1.0)
    # Of four values of 16 bits two stay, with two bits of place each: 36 bits in place of 64.
    assert pairs["packed"] == facts["size"] - 80 * block * 2 * 28 / 64
    read = decoder + 8192 + 128256 * 8192  # not the rows of the embedding that no token asks for
    assert pairs["packed_speedup"] == pytest.approx(read / (read - 80 * block * 28 / 64))
    assert units["removed"] == 0.2 and not units["exact"] and units["widths"] is None
    assert units["size"] == pytest.approx(facts["size"] - 2 * 0.2 * decoder)
    assert units["speedup"] == pytest.approx(read / (read - 0.2 * decoder))
    table = ok("plan", "70b", "--goal", "smaller")
    assert "about 20.00% of the decoder" in table and "--dry-run" in table
    assert [line.split()[0] for line in table.splitlines() if line.startswith(("smaller ", "faster ", "quality "))] == [
        "smaller"
    ]
    assert [file.name for file in (tmp_path / "70b").iterdir()] == ["config.json"]


def test_the_widths_of_a_small_model_are_those_of_the_run(llama: PreTrainedModel) -> None:
    advice = advise(llama, sparsity=0.3)
    units = advice.patterns[2]
    dense = sum(p.numel() for p in llama.parameters())
    config = PruneConfig(method="obs", compensation="least-squares", target="dense", sequential="site", sparsity=0.3)
    result = prune(llama, config, tokens=torch.randint(0, 97, (4, 16)))
    left = sum(p.numel() for p in result.model.parameters())
    assert units.exact and units.size == 4 * left < 4 * dense
    assert units.widths is not None and result.report.widths is not None
    assert units.widths["kept"] == result.report.widths["kept"]
    assert units.removed == pytest.approx(result.report.decoder_share)


def test_a_block_is_run_only_if_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        small, large = make_llama(), make_llama(intermediate_size=PROBED // 64)
    assert advise(small).patterns[2].exact
    monkeypatch.setattr(layout, "_shallow", lambda model: pytest.fail("a large block was run"))
    assert not advise(large).patterns[2].exact


def test_memory_is_compared_with_the_machine(llama: PreTrainedModel) -> None:
    needed = needs(advise(llama))["unstructured", "regress"]
    assert needed.gpu_memory == 0 and needed.memory > 0
    for memory, verdict in ((needed.memory * 2, "fits"), (needed.memory * 2 - 2, "close"),
                            (needed.memory, "close"), (needed.memory - 1, "does not fit")):  # fmt: skip
        assert needs(advise(llama, Machine(memory)))["unstructured", "regress"].verdict == verdict
    gpu = needs(advise(llama, Machine(10**15, "a GPU", 10**15)))["unstructured", "regress"]
    assert gpu.memory < needed.memory and gpu.gpu_memory > 0
    for memory, verdict in ((gpu.gpu_memory * 2, "fits"), (gpu.gpu_memory - 1, "does not fit")):
        machine = Machine(10**15, "a GPU", memory)
        assert needs(advise(llama, machine))["unstructured", "regress"].verdict == verdict


def test_masks_are_learned_on_the_whole_model_on_the_gpu(llama: PreTrainedModel) -> None:
    found = needs(advise(llama, Machine(10**15, "a GPU", 10**15)))["uniform", "maskprune"]
    assert found.gpu_memory > 4 * sum(p.numel() for p in llama.parameters())


def test_what_does_not_fit_gives_way_to_the_next_best(llama: PreTrainedModel) -> None:
    rows = needs(advise(llama))
    between = (rows["unstructured", "regress"].memory + rows["unstructured", "sparsegpt"].memory) // 2
    advice = advise(llama, Machine(between))
    assert "--method sparsegpt" in str(commands(advice)["quality"])
    assert "of what fits into memory here" in advice.recommendations[2].why
    tiny = advise(llama, Machine(1))
    assert "--method regress" in str(commands(tiny)["quality"])
    assert tiny.recommendations[2].why.endswith("does not fit into memory here: take a larger machine")
    weights = advise(llama, Machine(rows["unstructured", "magnitude"].memory))
    assert weights.recommendations[2].why.endswith("give fewer windows or take a larger machine")


@pytest.mark.parametrize(("file", "column", "order", "patterns"), [
    ("quality.csv", "pattern", BEST_ZEROS, 2), ("structured.csv", "sparsity", BEST_UNITS, 3),
])  # fmt: skip
def test_the_order_of_the_methods_is_the_measured_one(
    file: str, column: str, order: tuple[str, ...], patterns: int
) -> None:
    with (ROOT / "eval" / "results" / file).open(encoding="utf-8") as rows:
        measured: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        for row in csv.DictReader(rows):
            if row[column] and row["method"] in order:
                lost = math.log(float(row["perplexity"]) / float(row["dense_perplexity"]))
                measured[row["method"]][row["model"], row[column]] = lost
    common = set.intersection(*(set(cells) for cells in measured.values()))
    assert set(measured) == set(order) and len({pattern for _, pattern in common}) >= patterns
    mean = {name: sum(cells[cell] for cell in common) / len(common) for name, cells in measured.items()}
    assert sorted(order, key=mean.__getitem__) == list(order)


def test_a_pattern_that_is_impossible_says_why_and_the_others_stay() -> None:
    advice = advise(make_llama(intermediate_size=67))
    zeros, pairs, units = advice.patterns
    assert "has 67 inputs, which 4 does not divide" in pairs.problem and not zeros.problem and not units.problem
    assert "packed" not in advice.recommendations[1].why
    bloom = advise(FAMILIES["bloom"].build())
    assert "cannot be cut to smaller widths" in bloom.patterns[2].problem
    assert [one.command is None for one in bloom.recommendations] == [True, True, False]
    assert not [one for one in bloom.methods if one.pattern == "uniform"]
    assert "`llmprune pack`" in bloom.recommendations[0].why and "at most" in bloom.recommendations[1].why
    assert "pack" not in bloom.recommendations[2].why


@pytest.mark.parametrize(("name", "possible"), [
    ("llama", True), ("phi3", True), ("gpt2", True), ("opt", True), ("falcon", True), ("bloom", False), ("mpt", False),
])  # fmt: skip
def test_a_config_that_cannot_say_narrower_is_known_without_running_a_block(
    name: str, possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.advice.PROBED", 0)
    units = advise(FAMILIES[name].build()).patterns[2]
    assert units.removed == (0.2 if possible else 0.0)
    assert ("says that there are fewer channels" in units.problem) is not possible


def test_experts_are_known_to_stay_without_running_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.advice.PROBED", 0)
    advice = advise(FAMILIES["mixtral"].build(), sparsity=0.5)
    assert "lie outside its experts, which are left alone" in advice.patterns[2].problem
    assert {one.reason for one in advice.skipped} == {"a router or gate"}
    pairs = advice.patterns[1]
    attention = 3 * (2 * 32 * 32 + 2 * 32 * 16)  # of float32: 16 bytes of four weights become 8, and one half of place
    assert pairs.packed == pairs.size - attention * (4 - 2 - 1 / 8)


def test_layers_that_are_never_packed_promise_no_smaller_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.advice.PROBED", 0)
    own, plain = advise(FAMILIES["falcon"].build(ffn_hidden_size=64)), advise(make_llama())
    pairs = own.patterns[1]
    assert not pairs.problem and pairs.removed > 0.4 and pairs.packed is None and pairs.packed_speedup is None
    assert not any("`llmprune pack`" in one.why for one in own.recommendations)
    assert "(packed" in advice_text(plain) and "(packed" not in advice_text(own)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("goal", ["smaller", "faster", "quality"])
def test_the_command_does_what_was_planned(goal: str, dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    common = ["--sparsity", 0.25, "--max-seq-length", 16, "--num-calibration-samples", 6]
    common += ["--ignore", "k_proj", "v_proj"] if goal == "quality" else []
    facts = strict_json(ok("plan", dense, "--goal", goal, *common, "--json"))
    (one,) = facts["recommendations"]
    words = shlex.split(one["command"])
    assert words[:3] == ["llmprune", "prune", str(dense)] and one["goal"] == goal
    words[words.index("c4")] = str(data / "a.txt")
    ok(*words[1:])
    folder = tmp_path / words[words.index("-o") + 1]
    manifest = json.loads((folder / "llmprune.json").read_text())
    assert manifest["config"]["num_calibration_samples"] == 6
    assert manifest["config"]["ignore"] == common[7:]
    pattern = facts["patterns"][2 if goal != "quality" else 0]
    assert manifest["decoder_share"] == pytest.approx(pattern["removed"], abs=1e-9)
    parameters = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    added = sum(p.numel() for name, p in parameters.items() if name.endswith("bias")) if goal == "quality" else 0
    assert sum(p.numel() for p in parameters.values()) * 4 == pattern["size"] + 4 * added


@pytest.mark.parametrize(("change", "message"), [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
    ({"num_hidden_layers": 0}, "no list of decoder blocks"),
])  # fmt: skip
def test_configs_that_cannot_be_planned(change: dict[str, Any], message: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "model").mkdir()
    config = {**make_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"], **change}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert message in refused("plan", "model")


def test_what_is_no_config(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    assert "gguf has no config.json" in refused("plan", "gguf")
    assert "is a file" in refused("plan", "gguf/model.gguf")
    assert "does not exist" in refused("plan", "./absent")


@pytest.mark.parametrize(("options", "message"), [
    (("--goal", "cheaper"), "goal 'cheaper' is unknown: choose from smaller, faster, quality"),
    (("--sparsity", 1.5), "sparsity 1.5 is outside"),
    (("--max-seq-length", 100), "exceed the model's 64 positions"),
    (("--ignore", "absent"), "'absent' matches no parameter"),
])  # fmt: skip
def test_bad_options(options: tuple[object, ...], message: str, dense: Path, refused: Refused) -> None:
    assert message in refused("plan", dense, *options)
