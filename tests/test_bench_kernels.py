"""The benchmark's arithmetic, its refusals and its table, on a CPU: what needs no GPU to be wrong."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llmprune_kernels import obeys
from llmprune_kernels.benchmark import end_to_end, rows, shapes, timing
from llmprune_kernels.benchmark.contest import Error, Machine, Refusal, contest, half_of
from llmprune_kernels.benchmark.contestants import CUBLAS, Contestant, layout
from llmprune_kernels.benchmark.machine import commit
from llmprune_kernels.benchmark.roof import Roof
from llmprune_kernels.benchmark.shapes import LAYERS, Layer
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.reference import BITMAP
from tiny import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = Layer("tiny:layer", 24, 32)
CPU = Machine(timing.Eager, None, l2=0, memory=5000, graph_bytes=0)
H100 = Roof(3.0e12, 2.5)


@pytest.mark.parametrize(
    ("name", "sides"),
    [("Llama-2-7B:qkv", (12288, 4096)), ("Llama-2-7B:gate_up", (22016, 4096)), ("Llama-2-7B:down", (4096, 11008)),
     ("Llama-3-8B:qkv", (6144, 4096)), ("Llama-3-8B:gate_up", (28672, 4096)), ("Llama-3-8B:o", (4096, 4096)),
     ("Llama-3-70B:qkv", (10240, 8192)), ("Llama-3-70B:gate_up", (57344, 8192)), ("Llama-3-70B:down", (8192, 28672)),
     ("Qwen2.5-7B:qkv", (4608, 3584)), ("Qwen2.5-7B:gate_up", (37888, 3584))],
)  # fmt: skip
def test_the_layers_are_those_of_the_models(name: str, sides: tuple[int, int]) -> None:
    assert (LAYERS[name].outputs, LAYERS[name].inputs) == sides


def test_each_shape_is_measured_once_and_a_model_names_all_of_its_layers() -> None:
    names = [layer.name for layer in shapes.chosen(None)]
    assert len(names) == 15 and "Llama-2-7B:o" not in names and names[0] == "Llama-3-8B:qkv"
    assert [layer.name for layer in shapes.chosen(["Llama-2-7B"])][1] == "Llama-2-7B:o"
    assert [layer.name for layer in shapes.chosen(["Qwen2.5-7B:o", "Llama-3-8B:down"])] == [
        "Qwen2.5-7B:o", "Llama-3-8B:down",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no layer or model 'gpt'"):
        shapes.chosen(["Llama-3-8B", "gpt"])


def test_the_roof_by_hand() -> None:
    layer = LAYERS["Llama-3-8B:o"]
    # 4096 x 4096 x 2 = 33554432 bytes, x and y 2 x 4096 x 2 = 16384: 33570816 / 3e12 s = 11.190272 us
    assert H100.microseconds(layer, "dense", 1) == pytest.approx(13.690272)
    # 9/16 of 33554432 = 18874368, with x and y 18890752: 6.296917 us
    assert H100.microseconds(layer, "2:4", 1) == pytest.approx(8.796917, abs=1e-6)
    assert H100.ceiling(layer, "2:4", 1) == pytest.approx(1.5563, abs=1e-4)
    assert H100.ceiling(layer, "dense", 16) == 1
    assert Roof(3.0e12, 0.0).ceiling(LAYERS["Llama-3-70B:gate_up"], "2:4", 1) == pytest.approx(16 / 9, rel=1e-3)


@pytest.mark.parametrize(
    ("nbytes", "l2", "free", "count"),
    [(18874368, 50 << 20, 10**10, 16), (18874368, 200 << 20, 10**10, 34), (939524096, 50 << 20, 10**10, 2),
     (18874368, 50 << 20, 5 * 10**7, 2), (150_000_000, 50 << 20, 10**10, 2)],
)  # fmt: skip
def test_copies_exceed_the_cache_three_times(nbytes: int, l2: int, free: int, count: int) -> None:
    assert timing.copies(nbytes, l2, free) == count


def test_a_graph_is_long_beside_its_launch() -> None:
    assert timing.rounds(18874368, 16) == 10 and timing.rounds(939524096, 2) == 2 and timing.rounds(1e10, 2) == 1
    assert timing.rounds(10, 3) == 134  # 402 calls, not 10 ** 8


def test_half_of_a_weight() -> None:
    weight = torch.randn(24, 64)
    for form in ("2:4", "bitmap"):
        half = half_of(weight, form)
        assert ((half == 0) | (half == weight)).all() and 0.45 < (half == 0).float().mean() <= 0.5
        assert half.abs()[half != 0].mean() > weight.abs().mean()
    assert obeys(half_of(weight, "2:4"), 2, 4) and not obeys(half_of(weight, "bitmap"), 2, 4)


def good(name: str) -> Contestant:
    return replace(layout("values"), name=name)


def wrong(name: str, spoil: Any) -> Contestant:
    """A kernel that changes a right answer."""
    right = layout("values")

    def multiply(x: Tensor, tensors: Any, out: int) -> Tensor:
        y = right.multiply(x, tensors, out)
        spoil(y)
        return y

    return replace(right, name=name, multiply=multiply)


def crash(y: Tensor) -> None:
    raise RuntimeError("no kernel image\nsecond line")


SPOILED = {
    "one number": lambda y: y[0, 3].add_(1.0),
    "one NaN": lambda y: y[-1, -1].fill_(math.nan),
    "a row left out": lambda y: y[-1].zero_(),
    "all a little": lambda y: y.mul_(1.01),
    "does not run": crash,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_answer_gets_no_figure(dtype: torch.dtype) -> None:
    weight = half_of(torch.randn(24, 32), "2:4").to(dtype)
    contestants = [CUBLAS, good("right"), *(wrong(name, spoil) for name, spoil in SPOILED.items()), good("few")]
    contestants[-1] = replace(contestants[-1], rows=(1, 3))
    found = list(contest(SMALL, weight, [1, 5], contestants, CPU))
    figures = [(row["kernel"], row["rows"]) for row in found if not isinstance(row, Refusal)]
    assert figures == [("cuBLAS", 1), ("cuBLAS", 5), ("right", 1), ("right", 5), ("few", 1)]
    refused = [(item.kernel, item.rows) for item in found if isinstance(item, Refusal)]
    assert refused == [(name, count) for name in SPOILED for count in (1, 5)]
    reasons = {item.kernel: item.reason for item in found if isinstance(item, Refusal)}
    assert reasons["does not run"] == "did not run: no kernel image" and "wrong" in reasons["one NaN"]


def test_a_kernel_that_cannot_hold_the_weight_is_named() -> None:
    weight = torch.ones(24, 32)
    (cublas, refusal) = contest(SMALL, weight, [1], [CUBLAS, good("2:4 only")], CPU)
    assert isinstance(cublas, dict) and cublas["speedup"] == 1
    assert isinstance(refusal, Refusal) and "cannot hold the weight: not 2:4 at row 0" in refusal.reason


def test_rows_with_a_roof_say_how_near_they_come() -> None:
    weight = half_of(torch.randn(24, 32), "2:4")
    found = list(contest(SMALL, weight, [1, 128], [CUBLAS, good("ours")], replace(CPU, roof=H100)))
    few, many = (row for row in found if isinstance(row, dict) and row["kernel"] == "ours")
    assert few["share_of_roof"] == pytest.approx(H100.microseconds(SMALL, "2:4", 1) / few["microseconds"])
    assert few["gigabytes_per_second"] == pytest.approx(24 * 32 * 2 * 9 / 16 / few["microseconds"] / 1e3)
    assert few["share_of_copy"] == pytest.approx(few["gigabytes_per_second"] / 3000)
    assert "ceiling" not in many and few["p10"] <= few["microseconds"] <= few["p90"]
    assert few.keys() <= set(rows.COLUMNS)
    assert "ours" in rows.show([few, many], "tiny")


def test_an_error_of_nothing_and_of_everything() -> None:
    truth = torch.randn(3, 4, dtype=torch.float64)
    assert Error.of(truth.clone(), truth) == Error(0, 0)
    assert Error.of(2 * truth, truth).relative == pytest.approx(1)
    assert not Error(math.nan, 0.0).acceptable(Error(1.0, 1.0), torch.bfloat16)
    assert not Error(0.0, math.nan).acceptable(Error(1.0, 1.0), torch.bfloat16)


def row(**given: Any) -> dict[str, Any]:
    return {"gpu": "G", "layer": "l", "dtype": "bfloat16", "rows": 1, "kernel": "k", "microseconds": 2.0} | given


def test_rows_are_added_or_replaced(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    rows.merge(file, [row(), row(kernel="other", microseconds=1 / 3)])
    rows.merge(file, [row(microseconds=5.0), row(gpu="another")])
    table = rows.read(file)
    assert [(r["gpu"], r["kernel"], r["microseconds"]) for r in table] == [
        ("G", "k", "5"), ("G", "other", "0.333333"), ("another", "k", "2"),
    ]  # fmt: skip
    assert table[0]["speedup"] == "" and [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    with pytest.raises(ValueError, match="no column 'speed'"):
        rows.merge(file, [row(speed=1)])
    assert rows.read(file) == table


def test_a_table_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.merge(file, [row()])
    assert file.read_text() == "a,b\n1,2\n"


def bench(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "kernels" / "bench.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_one_line_says_what_is_wanted(tmp_path: Path) -> None:
    done = bench("--quick", "--out", tmp_path / "out.csv")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "found torch" in done.stderr and "wanted: a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--layers", "gpt"), "no layer or model 'gpt'"), (("--tokens", "0"), "at least 1"),
     (("--out", "nowhere/t.csv"), "no folder nowhere"), (("--only", "all"), "invalid choice: 'all'")],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_one_line(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench as script

    with pytest.raises(SystemExit, match="2"):
        script.main(list(arguments))
    assert reason in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_run_writes_as_it_goes_and_names_what_it_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench as script

    found = iter([row(p10=1.0, p90=3.0), Refusal("l", 4, "bad", "wrong"), row(layer="m", p10=1.0, p90=3.0)])
    common = {"gpu": "H", "commit": commit(ROOT)}
    assert script.keep(found, tmp_path / "t.csv", common) == [Refusal("l", 4, "bad", "wrong")]
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert [(r["gpu"], r["layer"]) for r in csv.DictReader(stream)] == [("H", "l"), ("H", "m")]
    said = capsys.readouterr()
    assert said.out.count("kernel") == 2 and said.err == "bench.py: l, 4 rows, bad: wrong\n"


def test_what_was_refused_is_known_where_nothing_runs_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench as script

    def fail() -> Iterator[dict[str, Any] | Refusal]:
        yield row(p10=1.0, p90=3.0)
        yield Refusal("l", 4, "bad", "an illegal memory access")
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError):
        script.keep(fail(), tmp_path / "t.csv", {"gpu": "H"})
    assert "bad: an illegal" in capsys.readouterr().err
    assert len(rows.read(tmp_path / "t.csv")) == 1


def test_all_that_is_asked_for_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script from its options to its exit code, on a CPU, with small layers and the reference as kernels."""
    import bench as script

    monkeypatch.setitem(LAYERS, "tiny:layer", SMALL)
    monkeypatch.setattr(script, "of_24", lambda: [CUBLAS, good("ours"), wrong("bad", SPOILED["one NaN"])])
    monkeypatch.setattr(script, "of_bitmap", lambda: [CUBLAS, layout("bitmap")])
    monkeypatch.setattr(end_to_end, "LLAMA_3_8B", TINY)
    monkeypatch.setattr(end_to_end, "REPEATS", 2)
    compare = end_to_end.compare
    monkeypatch.setattr(
        end_to_end, "compare", lambda model, name, layout, batches, record: compare(model, name, "values", (2,), record)
    )
    out, common = tmp_path / "t.csv", {"gpu": "none"}
    options = script.parse(["--layers", "tiny:layer", "--tokens", "1", "65", "--out", str(out)])
    assert script.measure(options, torch.device("cpu"), CPU, common) == 1
    assert {(r["layer"].split(",")[0], r["kernel"], r["rows"]) for r in rows.read(out)} == {
        ("tiny:layer", "cuBLAS", "1"), ("tiny:layer", "cuBLAS", "65"), ("tiny:layer", "ours", "1"),
        ("tiny:layer", "ours", "65"), ("tiny:layer", "bitmap", "1"),
        ("Llama-3-8B", "cuBLAS", "2"), ("Llama-3-8B", "values", "2"),
    }  # fmt: skip
    assert capsys.readouterr().err.count("bad: wrong") == 2
    late = script.parse(["--layers", "tiny:layer", "--minutes", "-1", "--only", "decode", "--out", str(out)])
    assert script.measure(late, torch.device("cpu"), CPU, common) == 0
    assert "no time left; go on with --layers tiny:layer" in capsys.readouterr().err


def test_every_part_has_its_kernels_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench as script

    monkeypatch.setitem(LAYOUTS, "bitmap-rows", BITMAP)  # what it multiplies is not asked here

    def names(*arguments: str) -> set[tuple[str, str, int, int]]:
        found = script.parts(script.parse(arguments))
        return {(form, one.name, counts[0], counts[-1]) for form, contestants, counts in found for one in contestants}

    assert {("2:4", "decode", 1, 4096), ("2:4", "both", 1, 4096), ("bitmap", "bitmap-rows", 1, 8)} <= names()
    assert {name for _, name, _, _ in names("--only", "prefill")} == {
        "cuBLAS", "cuSPARSELt, default algorithm", "cuSPARSELt, searched algorithm (prefill)", "CUTLASS through torch",
        "both",
    }  # fmt: skip
    assert {least for _, _, least, _ in names("--only", "prefill")} == {64}
    tuned = names("--tune")
    assert ("2:4", "cuBLAS", 1, 64) in tuned and len({name for _, name, _, _ in tuned if "mma.sp" in name}) >= 12


def test_the_picture_takes_the_roof_that_was_measured(tmp_path: Path) -> None:
    import draw_roof

    table = tmp_path / "t.csv"
    assert draw_roof.roof_of(rows.read(table))[0] == H100
    measured = row(layer="Llama-3-8B:o", kernel="decode", megabytes=33.6, speedup=1.5)
    rows.merge(table, [measured | {"copy_gigabytes_per_second": 2000.0, "launch_microseconds": 1.5}])
    assert draw_roof.roof_of(rows.read(table))[0] == Roof(2.0e12, 1.5)
    draw_roof.draw(table, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000


def test_a_folder_without_a_repository_has_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"


TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    return end_to_end.build(TINY, torch.device("cpu"), torch.bfloat16)


def test_a_whole_model_decodes_packed_as_it_did_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "REPEATS", 3)
    assert all(obeys(layer.weight, 2, 4) for _, layer in end_to_end.linears(model))
    found = list(end_to_end.compare(model, "tiny", "values", (1, 3), timing.Eager))
    assert [(r["kernel"], r["rows"]) for r in found if isinstance(r, dict)] == [
        ("cuBLAS", 1), ("values", 1), ("cuBLAS", 3), ("values", 3),
    ]  # fmt: skip
    assert all(isinstance(r, dict) and r["tokens_per_second"] > 0 and r.keys() <= set(rows.COLUMNS) for r in found)
    assert not end_to_end.linears(model)  # all 8 are packed


def test_a_whole_model_that_decodes_otherwise_gets_no_figure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "REPEATS", 2)
    pack = end_to_end.pack

    def spoil(model: Any, name: str) -> None:
        model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
        pack(model, name)

    monkeypatch.setattr(end_to_end, "pack", spoil)
    dense, refusal = end_to_end.compare(model, "tiny", "values", (1,), timing.Eager)
    assert isinstance(dense, dict) and isinstance(refusal, Refusal) and "logits differ" in refusal.reason


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_step_never_waits_for_the_device(model: Any) -> None:
    """What a CUDA graph cannot hold: values read back, sizes that depend on values, new tensors from Python numbers."""
    decoder = end_to_end.Decoder(model, 2)
    decoder.rewind()
    with Operators() as operators:
        first = decoder.step()
    waits = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique", "is_nonzero", "equal")
    assert not [name for name in operators.seen if any(wait in name.split(".")[1] for wait in waits)]
    assert len(operators.seen) > 10
    decoder.rewind()
    for _ in range(end_to_end.REPEATS + 5):  # as in a timed run: the same step, never past the end
        assert torch.equal(decoder.step(), first)


@torch.no_grad()
def test_the_step_is_what_the_model_says_after_the_prompt(model: Any) -> None:
    decoder = end_to_end.Decoder(model, 2)
    logits = decoder.step()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (2, end_to_end.PROMPT + 1), generator=generator)
    torch.testing.assert_close(logits[:, 0], model(input_ids=tokens).logits[:, -1], rtol=0.02, atol=0.02)
