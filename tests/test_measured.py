"""What was measured is remembered, per device and shape; cuSPARSELt's layout with a stand-in for the library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llmprune_kernels import FormatError, pack24, prefill
from llmprune_kernels.both import both
from llmprune_kernels.launch import filled_up
from llmprune_kernels.layout import Layout
from llmprune_kernels.measured import Measured, Problem
from llmprune_kernels.pack24 import Packed24
from llmprune_kernels.reference import VALUES

GPU = {"device": "a GPU", "torch": "2.11"}
PROBLEM = Problem(64, 32, "bfloat16", 8)


class Clock:
    """A timer that reads times from a list and counts what it timed."""

    def __init__(self, *times: float):
        self.times, self.calls = list(times), 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.calls += 1
        call()
        return self.times.pop(0)


def table(file: Path, clock: Clock, capturing: bool = False, device: dict[str, str] = GPU) -> Measured:
    return Measured(file, device, clock, lambda: capturing)


def two(ran: list[str]) -> dict[str, Callable[[], object]]:
    return {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096), (9999, 4096)])
def test_rows_go_in_powers_of_two(rows: int, bucket: int) -> None:
    assert Problem.of(torch.empty(rows, 32, dtype=torch.bfloat16), 64) == Problem(64, 32, "bfloat16", bucket)


def test_the_fastest_is_timed_once_and_outlives_the_process(tmp_path: Path) -> None:
    ran: list[str] = []
    clock = Clock(3.0, 2.0)
    first = table(tmp_path / "deep" / "times.json", clock)
    assert first.fastest(PROBLEM, two(ran), "a") == "b" == first.fastest(PROBLEM, two(ran), "a")
    assert ran == ["a", "b"] and clock.calls == 2
    later = table(tmp_path / "deep" / "times.json", Clock())
    assert later.fastest(PROBLEM, two(ran), "a") == "b"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["times.json"]


def test_a_new_candidate_is_timed_with_the_others(tmp_path: Path) -> None:
    times = table(tmp_path / "t.json", Clock(1.0, 3.0, 2.0))
    times.fastest(PROBLEM, {"a": lambda: 0}, "a")
    assert times.fastest(PROBLEM, two([]), "a") == "b"


def test_while_a_graph_is_captured_the_rule_decides_and_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    times = table(tmp_path / "t.json", clock, capturing=True)
    assert times.fastest(PROBLEM, two([]), "b") == "b"
    assert times.remembered(PROBLEM, "algorithm", lambda: [7], [0]) == [0]
    assert clock.calls == 0 and not (tmp_path / "t.json").exists()
    table(tmp_path / "t.json", Clock(1.0, 2.0)).fastest(PROBLEM, two([]), "b")
    assert table(tmp_path / "t.json", clock, capturing=True).fastest(PROBLEM, two([]), "b") == "a"


def test_findings_and_times_live_side_by_side(tmp_path: Path) -> None:
    one, other = table(tmp_path / "t.json", Clock(1.0, 2.0)), table(tmp_path / "t.json", Clock())
    one.fastest(PROBLEM, two([]), "b")
    assert other.remembered(PROBLEM, "algorithm", lambda: [7, 1, -1], [0]) == [7, 1, -1]
    again = table(tmp_path / "t.json", Clock())
    assert again.fastest(PROBLEM, two([]), "b") == "a"
    assert again.remembered(PROBLEM, "algorithm", lambda: [8], [0]) == [7, 1, -1]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"device": {"device": "another"}, "found": {}}', json.dumps({"device": GPU, "found": {"x": 1}}),
     json.dumps({"device": GPU, "found": {str(PROBLEM): {"microseconds": {"a": None, "b": 1.0}}}})],
)  # fmt: skip
def test_a_damaged_file_is_said_once_and_measured_anew(content: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.warns(UserWarning, match="measured anew"):
        times = table(file, Clock(3.0, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert times.fastest(PROBLEM, two([]), "a") == "b"
        assert table(file, Clock()).fastest(PROBLEM, two([]), "a") == "b"


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be read"):
        times = table(tmp_path / "file" / "t.json", Clock(3.0, 2.0, 1.0, 5.0))
    with pytest.warns(UserWarning, match="cannot be kept"):
        times.fastest(PROBLEM, two([]), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert times.fastest(PROBLEM, two([]), "a") == "b"
        assert times.fastest(Problem(1, 1, "float16", 1), two([]), "b") == "a"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A stand-in for cuSPARSELt that keeps the dense weight; returns the shapes of x that it is given."""
    seen: list[tuple[int, int]] = []

    def mm(compressed: torch.Tensor, x_t: torch.Tensor, bias: torch.Tensor | None, alpha: None, out_dtype: None,
           transpose_result: bool, *algorithm: int) -> torch.Tensor:  # fmt: skip
        assert transpose_result and list(algorithm) == [0] and not x_t.is_contiguous()
        seen.append((x_t.shape[1], x_t.shape[0]))
        return F.linear(x_t.t(), compressed, bias)

    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)
    monkeypatch.setattr(prefill, "refusal", lambda packed: None)
    return seen


def weight(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """2:4, with groups that hold less, and with -0.0 of both kinds: those that have room and those that have not."""
    dense = torch.randn(outputs, inputs)
    groups = dense.view(outputs, -1, 4)
    groups.scatter_(2, groups.abs().argsort(2)[..., :2], 0.0)
    dense[0, :4] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    dense[1, :4] = torch.tensor([1.0, -0.0, -0.0, -0.0])
    dense[2, :4] = torch.tensor([1.0, -0.0, 2.0, -0.0])
    return dense.to(dtype)


def test_the_identity_brings_the_weights_back_bit_by_bit(
    library: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "COLUMNS_AT_ONCE", 24)  # does not divide the 64 inputs
    packed = pack24(weight(32, 64))
    again = prefill.restore(prefill.prepare(packed), 32, 64)
    assert torch.equal(again.values.view(torch.int16), packed.values.view(torch.int16))
    assert torch.equal(again.positions, packed.positions)
    assert all(rows % 8 == 0 for rows, _ in library)


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_rows_are_padded_and_cut_again(rows: int, library: list[tuple[int, int]]) -> None:
    dense, bias = weight(32, 64), torch.randn(32).bfloat16()
    x = torch.randn(64, rows).bfloat16().t()  # not contiguous
    y = prefill.product(x, prefill.prepare(pack24(dense))[0], bias, prefill.DEFAULT)
    assert library[-1] == (-(-rows // 8) * 8, 64)
    torch.testing.assert_close(y.double(), x.double() @ dense.double().t() + bias.double(), rtol=0.01, atol=0.05)


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (7, 64), (8, 63), (1, 1), (0, 64)])
def test_x_is_copied_only_to_be_filled_up(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    y = filled_up(x, rows=8, columns=4)
    assert y.shape[0] % 8 == 0 and y.shape[1] % 4 == 0 and y.numel() < (rows + 8) * (columns + 4)
    assert torch.equal(y[:rows, :columns], x) and not y[rows:].any() and not y[:, columns:].any()
    assert (y is x) == (rows % 8 == 0 and columns % 4 == 0)


def test_the_algorithm_is_searched_once_for_rows_up_to_a_power_of_two(
    library: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    searched: list[tuple[int, ...]] = []

    def search(x: torch.Tensor, compressed: torch.Tensor, bias: torch.Tensor | None) -> list[int]:
        assert bias is added
        searched.append((*x.shape, int(x.isfinite().all())))
        return prefill.DEFAULT

    times = table(tmp_path / "t.json", Clock())
    monkeypatch.setattr(prefill, "measured", lambda device: times)
    monkeypatch.setattr(prefill, "search", search)
    dense, added = weight(32, 64), torch.randn(32).bfloat16()
    tensors, state = prefill.prepare(pack24(dense)), torch.get_rng_state()
    for rows in (5, 8, 7, 9):
        x = torch.ones(rows, 64).bfloat16()
        y = prefill.multiply(x, tensors, added, 32)
        torch.testing.assert_close(y.double(), x.double() @ dense.double().t() + added.double(), rtol=0.01, atol=0.05)
    assert searched == [(8, 64, 1), (16, 64, 1)] and library[-1] == (16, 64)
    assert prefill.multiply(x[:0], tensors, None, 32).shape == (0, 32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("library")
def test_a_library_that_gives_back_other_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.roll(1, 0))
    with pytest.raises(RuntimeError, match="32 x 64"):
        prefill.prepare(pack24(weight(32, 64)))


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "reason"),
    [(32, 64, torch.float32, "not float32"), (63, 64, torch.float16, "not 63 x 64"), (32, 68, torch.float16, "32 x 68"),
     (32, 64, torch.float16, "the weight is on cpu")],
)  # fmt: skip
def test_what_cusparselt_does_not_take_is_refused(outputs: int, inputs: int, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        prefill.prepare(pack24(weight(outputs, inputs, dtype)))


def test_both_runs_the_way_that_was_faster_for_so_many_rows(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    def spy(name: str) -> Layout[Packed24]:
        def multiply(x: torch.Tensor, *rest: object) -> torch.Tensor:
            ran.append((name, len(x)))
            return VALUES.multiply(x, *rest)  # type: ignore[arg-type]

        return Layout(Packed24, VALUES.prepare, VALUES.restore, multiply, "0.5625")

    times = table(tmp_path / "t.json", Clock(1.0, 2.0, 2.0, 1.0))
    layout = both(spy("decode"), spy("prefill"), times)
    dense = weight(32, 64, torch.float32)
    tensors = layout.prepare(pack24(dense))
    assert len(tensors) == 4
    for rows, fast in ((3, "decode"), (100, "prefill"), (4, "decode"), (128, "prefill")):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(layout.multiply(x, tensors, None, 32), x @ dense.t())
        assert ran[-1] == (fast, rows)
    assert sorted(ran[:3]) == [("decode", 3), ("decode", 4), ("prefill", 4)] and len(ran) == 8
    assert torch.equal(layout.restore(tensors, 32, 64).values, tensors[0])

    captured = both(spy("decode"), spy("prefill"), table(tmp_path / "none.json", Clock(), capturing=True))
    for rows, fast in ((64, "decode"), (65, "prefill")):
        captured.multiply(torch.randn(rows, 64), tensors, None, 32)
        assert ran[-1] == (fast, rows)
