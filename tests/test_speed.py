"""`llmprune bench`: on a clock of our own, so that every figure is known beforehand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from corpus import strict_json
from families import FAMILIES
from llmprune_eval import InputError, peaks, speed
from llmprune_eval.result import Part, Result, weights_sha256
from llmprune_eval.speed import Load, alternate, decode, greedy, measure_speed, prefill, spread
from llmprune_eval.surroundings import peak_memory
from tiny import make_llama
from transformers import PreTrainedModel

from llmprune import bench

Ok = Callable[..., str]
Refused = Callable[..., str]
LOAD = Load(batch_size=3, prompt=10, new_tokens=4)
PEAKS = [{"prefill": 100, "decode": 200}, {"prefill": 300, "decode": 400}]


class Clock:
    """Stands still but for what models do: reading takes `read` seconds, each written token one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.slow = 1.0  # what a disturbed machine multiplies all times by

    def __call__(self) -> float:
        return self.now

    def attend(self, name: str, model: PreTrainedModel, pace: float, read: float = 10.0) -> PreTrainedModel:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            reading = kwargs["input_ids"].shape[1] > 1
            self.calls.append(f"{name} reads" if reading else f"{name} writes")
            self.now += pace * self.slow * (read if reading else 1.0)

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model


def test_reading_and_writing_are_timed_apart(llama: PreTrainedModel) -> None:
    clock = Clock()
    clock.attend("a", llama, pace=0.5)
    assert prefill(llama, LOAD, clock) == 5.0
    assert decode(llama, LOAD, clock) == 4 * 0.5
    assert clock.calls == ["a reads"] * 2 + ["a writes"] * 4
    assert not llama.training


def test_turns_alternate_and_the_first_does_not_count(llama: PreTrainedModel) -> None:
    clock, order = Clock(), []
    ours, dense = clock.attend("ours", llama, 0.25), clock.attend("dense", copy.deepcopy(make_llama()), 1.0)

    def seconds(model: PreTrainedModel) -> Callable[[], float]:
        def measure() -> float:
            taken = prefill(model, LOAD, clock)
            if model is dense:
                clock.slow += 1  # the next turn is slower for both
            return taken

        return measure

    rows = alternate([seconds(ours), seconds(dense)], 3, lambda: order.append(clock.calls[-1]))
    assert order == ["ours reads", "dense reads"] * 4
    assert rows == [[2.5 * slow, 10.0 * slow] for slow in (2, 3, 4)]
    assert speed.speedups(rows) == [4.0, 4.0, 4.0]
    figures = speed.figures(rows, 30)
    assert figures["tokens_per_second"] == 30 / 7.5 and figures["dense_tokens_per_second"] == 1.0
    assert (figures["speedup"], figures["speedup_p10"], figures["speedup_p90"]) == (4.0, 4.0, 4.0)


def test_the_median_of_ratios_is_no_ratio_of_medians() -> None:
    figures = speed.figures([[1.0, 2.0], [2.0, 6.0], [3.0, 3.0]], 6)
    assert figures["speedup"] == 2.0
    assert (figures["tokens_per_second"], figures["dense_tokens_per_second"]) == (3.0, 2.0)


def test_percentiles_lie_between_values() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.0, 1.4, 4.6))
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_what_a_part_says(llama: PreTrainedModel) -> None:
    clock = Clock()
    models = [clock.attend("ours", llama, 0.5), clock.attend("dense", make_llama(), 1.0)]
    reading, writing = measure_speed(models, LOAD, 2, PEAKS, {"against": {"name": "dense"}}, clock=clock)
    assert (reading.kind, reading.name, writing.name) == ("speed", "prefill", "decode")
    assert reading.values == {
        "tokens_per_second": 3 * 10 / 5.0, "p10": 6.0, "p90": 6.0,
        "speedup": 2.0, "speedup_p10": 2.0, "speedup_p90": 2.0, "dense_tokens_per_second": 3.0,
        "peak_memory": 100, "dense_peak_memory": 300,
    }  # fmt: skip
    assert writing.values["tokens_per_second"] == 3 * 4 / (4 * 0.5) and writing.values["peak_memory"] == 200
    assert writing.samples == [{"turn": i, "seconds": 2.0, "dense_seconds": 4.0} for i in (1, 2)]
    wanted = {"batch_size": 3, "prompt": 10, "new_tokens": 4, "turns": 2, "device": "cpu", "dtype": "float32",
              "attention": "sdpa", "against": {"name": "dense"}}  # fmt: skip
    assert writing.answers("speed", "decode", wanted)
    (alone, _) = measure_speed(models[:1], LOAD, 2, PEAKS[:1], {"against": None}, clock=clock)
    assert set(alone.values) == {"tokens_per_second", "p10", "p90", "peak_memory"}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3", "mistral", "falcon_alibi", "bloom", "mixtral"])
def test_decoding_writes_what_generate_writes(name: str) -> None:
    model = FAMILIES[name].build()
    tokens = Load(2, 9, 1).tokens(model)
    steps = greedy(model, tokens)
    with torch.no_grad():
        own = torch.cat([next(steps) for _ in range(7)], dim=1)
    wanted = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=7, min_new_tokens=7,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(own, wanted[:, 9:])


def test_a_model_without_a_cache_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "forward", lambda **given: SimpleNamespace(logits=torch.zeros(1, 1, 97)))
    with pytest.raises(InputError, match="LlamaForCausalLM keeps no key/value cache"):
        decode(llama, LOAD)


def test_the_prompt_is_the_same_for_models_of_one_vocabulary(llama: PreTrainedModel) -> None:
    tokens = LOAD.tokens(llama)
    assert tokens.shape == (3, 10) and tokens.min() >= 0 and tokens.max() < 97 and len(tokens.unique()) > 10
    assert torch.equal(tokens, LOAD.tokens(make_llama(num_hidden_layers=1)))


def test_peak_memory_of_this_process() -> None:
    before = psutil.Process().memory_info().rss
    block = torch.ones(50_000_000)
    del block
    assert peak_memory() >= before + 200_000_000 * 0.95
    assert peak_memory() > psutil.Process().memory_info().rss


def test_resident_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    make_llama(vocab_size=20_000).save_pretrained(tmp_path / "model")
    here = torch.ones(300_000_000)  # 1.2 GB that are none of the model's
    small, large = peaks.resident_peaks(str(tmp_path / "model"), [Load(1, 8, 2), Load(64, 32, 2)])
    assert here.numel() and large["decode"] < 1_200_000_000
    logits = 64 * 32 * 20_000 * 4
    assert large["prefill"] - small["decode"] > 0.8 * (logits - 8 * 20_000 * 4)
    assert small["prefill"] <= small["decode"] <= large["prefill"] <= large["decode"]


def test_the_other_model_on_the_accelerator_does_not_count(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(True), raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000_000)  # both models
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10_000_000 + max(peak))
    peak: list[int] = []
    llama.register_forward_pre_hook(lambda *given: peak.append(700 if peak else 500))
    weights = 4 * sum(tensor.numel() for tensor in (*llama.parameters(), *llama.buffers()))
    assert peaks.allocated_peaks(llama, LOAD) == {"prefill": weights + 500, "decode": weights + 700}
    assert len(cleared) == 2  # what one model has left behind would be in the next one's figures, or not


def test_a_process_that_the_system_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(peaks.ProcessPoolExecutor, "submit", broken)
    with pytest.raises(InputError, match=r"memory of model was ended by the system.*smaller --batch-sizes"):
        peaks.resident_peaks("model", [LOAD])


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is given, not measured."""

    def given(name: str, loads: list[Load], **options: Any) -> list[dict[str, int]]:
        return [{"prefill": 1000 * load.batch_size, "decode": 2000 * load.batch_size} for load in loads]

    monkeypatch.setattr(bench, "resident_peaks", given)


SHORT = ("--prompt", 12, "--new-tokens", 3, "--turns", 2)


@pytest.mark.usefixtures("no_process", "unproved")
def test_the_result_lies_in_a_folder_of_ours(dense: Path, tmp_path: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "magnitude", "--pattern", "uniform")
    table = ok("bench", "out", "--against", dense, *SHORT, "--batch-sizes", "4,1,4")
    parts = Result.read(tmp_path / "out" / "evaluation.json").parts
    assert [(part.name, part.protocol["batch_size"]) for part in parts] == [
        ("prefill", 1), ("decode", 1), ("prefill", 4), ("decode", 4),
    ]  # fmt: skip
    for part in parts:
        assert part.protocol["against"] == {"name": str(dense), "weights_sha256": weights_sha256(dense),
                                            "dtype": "float32"}  # fmt: skip
        assert part.values["peak_memory"] == part.protocol["batch_size"] * (1000 if part.name == "prefill" else 2000)
        work = part.protocol["batch_size"] * (12 if part.name == "prefill" else 3)
        rates = sorted(work / sample["seconds"] for sample in part.samples)
        assert part.values["tokens_per_second"] == pytest.approx(sum(rates) / 2) and len(rates) == 2
        ratio = sum(sample["dense_seconds"] / sample["seconds"] for sample in part.samples) / 2
        assert part.values["speedup"] == pytest.approx(ratio)
        assert f"{ratio:.2f}" in table
    assert "evaluation.json" in table and "medians of 2 turns" in table and "fresh process" in table
    ok("bench", "out", "--against", dense, *SHORT, "--batch-sizes", 1)
    again = Result.read(tmp_path / "out" / "evaluation.json").parts
    assert sorted((part.name, part.protocol["batch_size"]) for part in again) == sorted(
        (part.name, part.protocol["batch_size"]) for part in parts
    )


@pytest.mark.usefixtures("no_process")
def test_nothing_is_kept_in_a_folder_of_others(dense: Path, tmp_path: Path, ok: Ok) -> None:
    before = sorted(dense.iterdir())
    facts = strict_json(ok("bench", dense, *SHORT, "--batch-sizes", 2, "--json"))
    assert [part["name"] for part in facts["parts"]] == ["prefill", "decode"] and facts["model"]["name"] == str(dense)
    assert "speedup" not in facts["parts"][0]["values"] and facts["parts"][0]["protocol"]["against"] is None
    table = ok("bench", dense, *SHORT, "--output", "kept/speed.json")
    assert "saved       kept/speed.json" in table and "dense" not in table.splitlines()[2]
    assert len(json.loads((tmp_path / "kept" / "speed.json").read_text())["parts"]) == 4
    assert sorted(dense.iterdir()) == before


@pytest.mark.usefixtures("no_process")
def test_what_was_finished_is_kept_when_memory_ends(
    dense: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(models: Any, load: Load, *given: Any) -> Any:
        if load.batch_size > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return measure_speed(models, load, *given)

    monkeypatch.setattr(bench, "measure_speed", ends)
    code, _, error = cli("bench", dense, *SHORT, "--output", tmp_path / "speed.json")
    assert code == 2 and len(error.splitlines()) == 1 and "no memory is left" in error and "--batch-sizes" in error
    assert [part.protocol["batch_size"] for part in Result.read(tmp_path / "speed.json").parts] == [1, 1]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("options", "message"), [
    (("--batch-sizes", "0"), "batch size is 0: at least 1 is needed"),
    (("--batch-sizes", "1,-4"), "batch size is -4: at least 1"),
    (("--batch-sizes", "1,x"), "batch sizes '1,x' are none: give numbers with commas"),
    (("--batch-sizes", ""), "batch sizes '' are none"),
    (("--prompt", 0), "prompt is 0: at least 1"),
    (("--new-tokens", 0), "new tokens is 0: at least 1"),
    (("--turns", 0), "turns is 0: at least 1"),
    (("--prompt", 33), "33 tokens of prompt and 32 new ones exceed the model's 64 positions"),
    (("--prompt", 8, "--output", "dense"), "--output dense is a folder: name a file"),
    (("--prompt", 8, "--device", "cuda:99"), "--device cuda:99"),
    (("--prompt", 8, "--dtype", "int8"), "dtype 'int8' is unknown"),
    (("--prompt", 8, "--against", "./absent"), "'./absent' does not exist"),
])  # fmt: skip
def test_bad_options(options: tuple[object, ...], message: str, dense: Path, refused: Refused) -> None:
    assert message in refused("bench", dense, *options)


@pytest.mark.usefixtures("no_process")
def test_models_that_cannot_be_timed(dense: Path, tmp_path: Path, refused: Refused) -> None:
    Result(model={"name": "other", "weights_sha256": "0"}, path=tmp_path / "other.json").add(
        Part("speed", "decode", {}, {})
    )
    assert "measurements of another model (other)" in refused("bench", dense, *SHORT, "--output", "other.json")
    (dense / "model.safetensors").unlink()
    assert "holds no weights" in refused("bench", dense)
    assert "does not exist" in refused("bench", "./absent")
