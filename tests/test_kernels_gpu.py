"""The kernels on a CUDA device: every layout against float64, in graphs, compiled, moved about.

They need torch, Triton and transformers only. First the small ones, as after a wrong access nothing else can run; most
of the time is the compiler's, so with pytest-xdist `-n 8` shortens both:
    python -m pytest --noconftest tests/test_kernels_gpu.py -v -x -k small
    python -m pytest --noconftest tests/test_kernels_gpu.py -v -k "not small"
For compute-sanitizer, without torch's memory pool, so that every tensor has its own bounds. Torch captures no graph
that allocates without it, so layout "both", which times its two ways in graphs, is left out; it holds no kernel of its
own. What libraries ask of the driver in vain is no error of theirs:
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
        python -m pytest --noconftest tests/test_kernels_gpu.py -k "small and not both"
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llmprune_kernels import FormatError
from llmprune_kernels.benchmark import end_to_end
from llmprune_kernels.benchmark.contest import Error, half_of
from llmprune_kernels.benchmark.shapes import LAYERS
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.linear import MODULES
from llmprune_kernels.measured import measured
from llmprune_kernels.packed_linear import PackedLinear
from llmprune_kernels.selftest import mma_sp_works
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16]
ROWS = (1, 3, 8, 16, 33, 64, 100)
REAL = ["Llama-3-8B:o", "Llama-2-7B:down", "Llama-3-70B:o", "Qwen2.5-7B:qkv"]
SMALL = [(16, 256), (48, 512), (63, 68), (70, 1030), (132, 63)]
NOT_OURS = ("prefill", "both")  # cuSPARSELt's sums may come in another order


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times measured in a test stay in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured.cache_clear()
    yield
    measured.cache_clear()


def kind(layout: str) -> type[PackedLinear]:
    """The layer whose weight can lie so."""
    return next(one for one in MODULES.values() if LAYOUTS[one.CANONICAL].form is LAYOUTS[layout].form)


def make(layout: str, out: int, inputs: int, dtype: torch.dtype) -> tuple[PackedLinear, Tensor]:
    """A packed layer with a bias, and its dense weight."""
    module = kind(layout)
    full = torch.randn(out, -(-inputs // 4) * 4, device=DEVICE) / inputs**0.5
    dense = half_of(full, module.FORMAT)[:, :inputs].to(dtype)
    layer = module.from_dense(dense, torch.randn(out, device=DEVICE).to(dtype))
    layer.use_layout(layout)
    return layer, dense


def poison(rows: int, out: int, dtype: torch.dtype) -> None:
    """Leave NaN where the next output will be allocated."""
    blocks = [torch.full((rows, out), math.nan, dtype=dtype, device=DEVICE) for _ in range(4)]
    torch.cuda.synchronize()
    del blocks


def check(layer: PackedLinear, dense: Tensor, rows: int) -> None:
    """Against float64, no worse than twice the dense product."""
    assert layer.bias is not None
    x = torch.randn(rows, dense.shape[1], device=DEVICE).to(dense.dtype)
    truth = x.double() @ dense.double().t() + layer.bias.double()
    poison(rows, dense.shape[0], dense.dtype)
    error = Error.of(layer(x), truth)
    if dense.dtype == torch.float32:
        assert error.relative < 1e-5, (layer.layout, rows, error)
    else:
        usual = Error.of(F.linear(x, dense, layer.bias), truth)
        assert error.acceptable(usual, dense.dtype), (layer.layout, rows, error, usual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_the_self_test_passes(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability(DEVICE) < (8, 0):
        pytest.skip("this device has no sparse tensor core")
    assert mma_sp_works(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_small_weights_are_multiplied_or_refused(layout: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    try:
        layer, dense = make(layout, *shape, dtype)
    except FormatError:
        odd = any(side % 16 for side in shape)
        assert (dtype == torch.float32 and layout in ("decode", *NOT_OURS)) or (odd and layout in NOT_OURS)
        return
    for rows in (1, 5, 17, 40, 70):
        check(layer, dense, rows)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_small_nothing_is_multiplied_by_no_rows(layout: str) -> None:
    layer, _ = make(layout, 32, 256, torch.float16)
    assert layer(torch.empty(0, 256, dtype=torch.float16, device=DEVICE)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layers_of_real_models(layout: str, name: str, dtype: torch.dtype) -> None:
    layer, dense = make(layout, LAYERS[name].outputs, LAYERS[name].inputs, dtype)
    assert layer.weight_bytes <= 1.2 * dense.nbytes
    for rows in ROWS:
        check(layer, dense, rows)
    assert torch.equal(layer.to_dense(), dense)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - NOT_OURS))
def test_two_runs_give_the_same_bits(layout: str) -> None:
    layer, dense = make(layout, 4096, 11008, torch.bfloat16)
    for rows in ROWS:
        x = torch.randn(rows, dense.shape[1], device=DEVICE).bfloat16()
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(5))


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"values", "bitmap"}))
def test_a_cuda_graph_replays_what_runs_eagerly(layout: str, rows: int) -> None:
    layer, _ = make(layout, 512, 1024, torch.bfloat16)
    x = torch.randn(rows, 1024, device=DEVICE).bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(2):
        x.copy_(torch.randn(rows, 1024, device=DEVICE))
        y.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=0.01, atol=0.01)
        assert layout in NOT_OURS or torch.equal(y, layer(x))


@pytest.mark.parametrize("layout", ["prefill", "both"])
def test_a_shape_that_was_never_run_can_be_captured(layout: str) -> None:
    layer, dense = make(layout, 512, 1024, torch.bfloat16)
    x = torch.randn(128, 1024, device=DEVICE).bfloat16()
    other, _ = make("prefill", 64, 64, torch.bfloat16)
    other(torch.randn(8, 64, device=DEVICE).bfloat16())  # the library is loaded; only this shape is new
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    y.fill_(math.nan)
    graph.replay()
    truth = x.double() @ dense.double().t() + layer.bias.double()  # type: ignore[union-attr]
    assert Error.of(y, truth).relative < 0.01


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_compiled_in_one_graph_is_eager(layout: str) -> None:
    layer, _ = make(layout, 512, 1024, torch.bfloat16)
    x = torch.randn(3, 1024, device=DEVICE).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        eager = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), eager, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_there_and_back_again_every_bit_is_kept(layout: str, dtype: torch.dtype) -> None:
    layer, _ = make(layout, 64, 256, dtype)
    layer.cpu()
    weight = layer.to_dense()
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    here = type(layer).from_dense(weight)
    before = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    here.to(DEVICE).use_layout(layout)
    on_device = here.state_dict()
    home = here.cpu().state_dict()
    for name, tensor in before.items():
        for other in (on_device[name].cpu(), home[name]):
            assert torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_a_model_with_packed_layers_says_what_the_dense_one_says() -> None:
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 132, "vocab_size": 97, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    dense = end_to_end.build(sizes, DEVICE, torch.bfloat16)
    packed = copy.deepcopy(dense).cpu()
    end_to_end.pack(packed, "values")
    packed.to(DEVICE)
    layouts = {layer.layout for layer in packed.modules() if isinstance(layer, PackedLinear)}
    assert layouts <= {"decode", "portable"} and layouts
    tokens = torch.randint(0, 97, (2, 24), device=DEVICE)
    with torch.no_grad():
        truth = dense(tokens).logits.double()
        assert (packed(tokens).logits.double() - truth).norm() < 0.02 * truth.norm()


def test_the_benchmark_measures_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    out = tmp_path / "results.csv"
    layer = ["--layers", "Llama-3-8B:o", "--out", str(out)]
    parts = [["--only", "decode", "--tokens", "1"], ["--only", "prefill", "--tokens", "128"]]
    codes = [bench.main([*layer, *part]) for part in parts]
    with out.open(newline="") as stream:
        rows = {(row["kernel"], row["rows"]): row for row in csv.DictReader(stream)}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench.py:")]
    assert max(codes) == (1 if said else 0)
    assert {("cuBLAS", "1"), ("decode", "1"), ("both", "128"), ("Triton GEMV, dense", "1")} <= rows.keys(), said
    assert 0.2 < float(rows["cuBLAS", "1"]["share_of_copy"]) < 1.5
