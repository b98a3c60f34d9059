"""Layers with packed weights against torch.nn.Linear with the same weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from llmprune_kernels import (
    FormatError,
    Packed24,
    PackedBitmap,
    SparseLinear24,
    SparseLinearBitmap,
    linear24,
    linear_bitmap,
    nm_linear,
    pack24,
    pack_bitmap,
)
from llmprune_kernels.layout import Layout
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.linear import MODULES, PackedLinear
from llmprune_kernels.placement import lay_out
from packing import DTYPES, bits, random24, random_sparse
from torch import Tensor, nn

KINDS = [SparseLinear24, SparseLinearBitmap]
SIZES = [(12, 6), (68, 5), (63, 7), (1, 3), (132, 1)]
CPU = torch.device("cpu")
BESIDE = {SparseLinear24: "positions", SparseLinearBitmap: "bitmap"}
"""The tensor beside the values."""

kinds = pytest.mark.parametrize("kind", KINDS)


def weight_for(kind: type[PackedLinear], out: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (random24 if kind is SparseLinear24 else random_sparse)(out, width, dtype, seed=out + width)


def pair(
    kind: type[PackedLinear], width: int = 12, out: int = 6, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer and torch's own with the same weight and bias."""
    dense = nn.Linear(width, out, bias=bias, dtype=dtype)
    dense.weight.data = weight_for(kind, out, width, dtype)
    return kind.from_dense(dense.weight, dense.bias), dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), SIZES)
@kinds
def test_a_packed_layer_computes_what_a_dense_one_does(
    kind: type[PackedLinear], width: int, out: int, bias: bool, dtype: torch.dtype
) -> None:
    packed, dense = pair(kind, width, out, dtype, bias)
    assert bits(packed.to_dense()) == bits(dense.weight.detach())
    for shape in [(width,), (3, width), (2, 5, width), (2, 1, 3, width), (0, width), (2, 0, width), (0, 5, width)]:
        x = torch.randn(shape, dtype=dtype)
        y = packed(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], out)
        torch.testing.assert_close(y, dense(x).detach())


@kinds
def test_a_sum_of_products_over_the_stored_weights(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind, 63, 5, torch.float64)
    x = torch.randn(4, 63, dtype=torch.float64)
    rows, y = dense.weight.tolist(), packed(x)
    for i, token in enumerate(x.tolist()):
        for j, row in enumerate(rows):
            total = sum(w * v for w, v in zip(row, token, strict=True) if w != 0) + float(dense.bias.detach()[j])
            assert float(y[i, j]) == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_are_linear_with_the_dense_weight(dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 3, 68, dtype=dtype), torch.randn(5, dtype=dtype)
    by_four, any_zeros = random24(5, 68, dtype), random_sparse(5, 68, dtype)
    torch.testing.assert_close(linear24(x, pack24(by_four), bias), nn.functional.linear(x, by_four, bias))
    torch.testing.assert_close(linear_bitmap(x, pack_bitmap(any_zeros)), nn.functional.linear(x, any_zeros))


@kinds
def test_layers_without_inputs_or_outputs(kind: type[PackedLinear]) -> None:
    bias = torch.randn(3)
    assert kind.from_dense(torch.zeros(3, 0), bias)(torch.zeros(2, 0)).equal(bias.expand(2, 3))
    assert kind.from_dense(torch.zeros(0, 8))(torch.randn(2, 8)).shape == (2, 0)


@kinds
def test_strided_inputs(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind)
    for x in (torch.randn(12, 5).T, torch.randn(4, 3, 24)[..., ::2], torch.randn(12).expand(7, 12)):
        torch.testing.assert_close(packed(x), dense(x).detach())


@kinds
def test_an_input_that_does_not_fit(kind: type[PackedLinear]) -> None:
    packed, _ = pair(kind)
    takes = r": a packed layer 12 -> 6 takes \[\.\.\., 12\] of torch\.float32$"
    for width in (11, 10, 9, 13, 1, 0):  # 9 to 11 lie in the same last group
        with pytest.raises(ValueError, match=rf"^x is \[2, {width}\] of torch\.float32{takes}"):
            packed(torch.randn(2, width))
    with pytest.raises(ValueError, match=rf"^x is \[\] of torch\.float32{takes}"):
        packed(torch.tensor(1.0))
    for dtype in (torch.float16, torch.float64, torch.int64):
        with pytest.raises(ValueError, match=rf"^x is \[2, 12\] of {dtype}{takes}"):
            packed(torch.ones(2, 12, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_autocast_casts_the_input_to_the_weights_dtype(kind: type[PackedLinear], dtype: torch.dtype) -> None:
    packed, dense = pair(kind, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(3, 12), torch.randn(3, 12).bfloat16()):
            y = packed(x)
            assert y.dtype == dtype
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(y, dense(x.to(dtype)).detach())
        with pytest.raises(ValueError, match="int64"):
            packed(torch.ones(2, 12, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own
@kinds
def test_no_gradients_and_never_silently(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    x = torch.randn(2, 12, requires_grad=True)
    y = packed(x)
    assert y.requires_grad  # so that a backward pass reaches the line below
    for loss in (y.sum(), y.sum() + x.sum()):
        with pytest.raises(RuntimeError, match=r"^a packed layer has no gradients: train with its dense weight"):
            loss.backward()
    assert x.grad is None
    unfrozen = copy.deepcopy(packed).requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradients"):
        unfrozen(torch.randn(2, 12)).sum().backward()
    for derive in (torch.func.jacfwd, lambda layer: lambda x: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(RuntimeError, match="no gradients"):
            derive(packed)(x.detach())
    with torch.no_grad():
        assert not packed(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), dense(x))


@kinds
def test_the_state_dict_loads_into_an_empty_layer(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind, 68, 5, torch.bfloat16)
    state = packed.state_dict(prefix="up.")
    assert sorted(state) == sorted(["up.values", f"up.{BESIDE[kind]}", "up.bias"])
    stored = state["up.values"].numel()
    empty = kind.empty(68, 5, stored, True, torch.bfloat16, CPU)
    empty.load_state_dict(packed.state_dict())
    empty.check()
    assert bits(empty.to_dense()) == bits(dense.weight.detach())
    x = torch.randn(2, 68, dtype=torch.bfloat16)
    assert empty(x).equal(packed(x))
    on_meta = kind.empty(68, 5, stored, True, torch.bfloat16, torch.device("meta"))
    assert on_meta(x.to("meta")).shape == (2, 5)
    on_meta.load_state_dict(packed.state_dict(), assign=True)
    assert on_meta(x).equal(packed(x)) and not on_meta.values.requires_grad
    assert "bias" not in kind.empty(68, 5, stored, False, torch.float32, CPU).state_dict()


@kinds
def test_an_empty_layer_of_the_wrong_size(kind: type[PackedLinear]) -> None:
    for stored in (-1, 68 * 5 + 1):
        with pytest.raises(FormatError, match=rf"5 x 68 .*{stored}"):
            kind.empty(68, 5, stored, True, torch.float32, CPU)
    empty = kind.empty(68, 5, 170, True, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="size mismatch"):
        empty.load_state_dict(pair(kind, 64, 5)[0].state_dict())


def test_a_2_to_4_layer_stores_two_of_four() -> None:
    with pytest.raises(FormatError, match="a 2:4 weight 5 x 67 stores 170, not 168"):
        SparseLinear24.empty(67, 5, 168, False, torch.float32, CPU)
    with pytest.raises(FormatError, match="not 2:4 at row 0, column 0"):
        SparseLinear24.from_dense(torch.ones(5, 68))


@kinds
def test_damage_is_found(kind: type[PackedLinear]) -> None:
    packed, _ = pair(kind)
    packed.check()
    getattr(packed, BESIDE[kind])[4, 1] ^= 0x01
    with pytest.raises(FormatError):
        packed.check()
    with pytest.raises(FormatError):
        packed(torch.randn(2, 12))


@kinds
def test_copies_share_nothing(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind)
    x = torch.randn(2, 12)
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    loaded = kind.empty(12, 6, packed.values.numel(), True, torch.float32, CPU)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
        assert twin(x).equal(packed(x)) and repr(twin) == repr(packed)
        twin.values.data.zero_()
        assert not twin.to_dense().any() and bits(packed.to_dense()) == bits(dense.weight.detach())


@kinds
def test_casting_casts_the_values_alone(kind: type[PackedLinear]) -> None:
    packed, dense = pair(kind)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        other, expected = cast(copy.deepcopy(packed)), cast(copy.deepcopy(dense))
        dtype = expected.weight.dtype
        assert other.dtype == other.values.dtype == other.bias.dtype == dtype
        assert getattr(other, BESIDE[kind]).equal(getattr(packed, BESIDE[kind]))
        assert bits(other.to_dense()) == bits(expected.weight.detach())
        x = torch.randn(3, 12, dtype=dtype)
        torch.testing.assert_close(other(x), expected(x).detach())


@kinds
def test_bytes_and_what_print_shows(kind: type[PackedLinear]) -> None:
    weight = torch.zeros(6, 16, dtype=torch.float16)
    weight[:, ::2] = 1
    packed = kind.from_dense(weight)
    assert packed.weight_bytes * 16 == 6 * 16 * 2 * 9
    assert repr(packed) == f"{kind.__name__}(in_features=16, out_features=6, bias=False, layout={packed.layout})"
    assert MODULES[packed.FORMAT] is kind


@kinds
def test_compiled_as_one_graph(kind: type[PackedLinear]) -> None:
    packed, _ = pair(kind)
    x = torch.randn(2, 3, 12)
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend="eager")
    assert compiled(x).equal(packed(x).relu())
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).equal(packed(x).relu())


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (0, 12)])
@kinds
def test_the_operator_keeps_torchs_rules(kind: type[PackedLinear], shape: tuple[int, ...]) -> None:
    packed, _ = pair(kind)
    for bias in (packed.bias, None):
        arguments = (torch.randn(shape), packed._tensors(), bias, 6, packed.layout)
        results = torch.library.opcheck(nm_linear, arguments)
        assert set(results.values()) == {"SUCCESS"}


def rows_last(form: type[Any], name: str) -> Layout[Any]:
    """A layout for tests: everything backwards, the values as integers."""

    def prepare(packed: Any) -> list[Tensor]:
        return [packed.values.flip(0).view(torch.int16), getattr(packed, name).flip(0)]

    def restore(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Any:
        return form(tensors[0].view(torch.bfloat16).flip(0), tensors[1].flip(0), in_features)

    def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        reference = linear24 if form is Packed24 else linear_bitmap
        return reference(x, restore(tensors, out_features, x.shape[1]), bias)

    return Layout(form, prepare, restore, multiply, "0.5625")


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> dict[type[PackedLinear], str]:
    """The name of a second layout for each kind of layer."""
    monkeypatch.setitem(LAYOUTS, "backwards24", rows_last(Packed24, "positions"))
    monkeypatch.setitem(LAYOUTS, "backwards bitmap", rows_last(PackedBitmap, "bitmap"))
    return {SparseLinear24: "backwards24", SparseLinearBitmap: "backwards bitmap"}


@kinds
def test_another_layout_computes_the_same_and_goes_back(
    kind: type[PackedLinear], backwards: dict[type[PackedLinear], str]
) -> None:
    packed, dense = pair(kind, 68, 5, torch.bfloat16)
    x = torch.randn(3, 68, dtype=torch.bfloat16)
    y, before = packed(x), packed.weight_bytes
    packed.use_layout(backwards[kind])
    assert packed.values is None and getattr(packed, BESIDE[kind]) is None  # one copy of the weight, not two
    assert [tensor.dtype for tensor in packed._tensors()] == [torch.int16, torch.uint8]
    assert packed.dtype == torch.bfloat16 and packed.weight_bytes == before
    assert packed(x).equal(y) and f"layout={backwards[kind]}" in repr(packed)
    with pytest.raises(ValueError, match=r"takes .* of torch\.bfloat16"):
        packed(x.float())
    assert bits(packed.to_dense()) == bits(dense.weight.detach())
    packed.check()
    twin = copy.deepcopy(packed)
    assert twin(x).equal(y) and twin.layout == packed.layout
    for layer in (packed, twin):
        layer.use_layout(layer.CANONICAL)
        assert sorted(layer.state_dict()) == sorted(["values", BESIDE[kind], "bias"])
        assert not any(name.startswith("laid_out") for name, _ in layer.named_buffers())
        assert layer(x).equal(y) and not layer.values.requires_grad


@kinds
def test_state_dicts_are_canonical_in_every_layout(
    kind: type[PackedLinear], backwards: dict[type[PackedLinear], str]
) -> None:
    model = nn.Sequential(pair(kind, 68, 5, torch.bfloat16)[0], nn.ReLU(), pair(kind, 5, 4, torch.bfloat16)[0])
    x = torch.randn(3, 68, dtype=torch.bfloat16)
    y = model(x)
    canonical = {key: value.clone() for key, value in model.state_dict().items()}
    lay_out(model, backwards[kind])
    assert {layer.layout for layer in model if isinstance(layer, PackedLinear)} == {backwards[kind]}
    state = model.state_dict()
    assert state.keys() == canonical.keys()
    assert all(state[key].equal(canonical[key]) and state[key].dtype == canonical[key].dtype for key in state)
    assert model(x).equal(y)

    for key in ("0.values", "2.values"):
        canonical[key] = canonical[key] * 2
    model.load_state_dict(canonical)
    assert {layer.layout for layer in model if isinstance(layer, PackedLinear)} == {backwards[kind]}
    assert bits(model.state_dict()["0.values"]) == bits(canonical["0.values"])
    lay_out(model)
    assert {layer.layout for layer in model if isinstance(layer, PackedLinear)} == {kind.CANONICAL}


@kinds
def test_moving_goes_through_the_canonical_form(
    kind: type[PackedLinear], backwards: dict[type[PackedLinear], str]
) -> None:
    packed, dense = pair(kind, 68, 5, torch.bfloat16)
    packed.use_layout(backwards[kind])
    packed.to(torch.float16)  # the bits in the layout are bfloat16's: cast as they lie, they would be other weights
    assert packed.layout == kind.CANONICAL and packed.dtype == torch.float16
    assert bits(packed.to_dense()) == bits(dense.weight.detach().half())
    packed.to("meta")
    assert packed.values.is_meta and getattr(packed, BESIDE[kind]).is_meta


@kinds
def test_a_layout_of_the_other_format_or_none(
    kind: type[PackedLinear], backwards: dict[type[PackedLinear], str]
) -> None:
    packed, _ = pair(kind)
    (other,) = (name for of, name in backwards.items() if of is not kind)
    for name in (other, "no such"):
        with pytest.raises(ValueError, match=f"a {packed.FORMAT} weight has no layout '{name}'"):
            packed.use_layout(name)
    assert packed.layout == kind.CANONICAL
    packed(torch.randn(2, 12))


@pytest.mark.parametrize("bias", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(6, dtype=torch.bfloat16)])
@kinds
def test_a_bias_that_does_not_fit_is_refused_at_once(kind: type[PackedLinear], bias: Tensor) -> None:
    with pytest.raises(
        FormatError, match=r"a bias .* does not go with a weight \[6, 12\] .* give \[6\] of torch.float32"
    ):
        kind.from_dense(weight_for(kind, 6, 12), bias)


@pytest.mark.parametrize("pack", [pack24, pack_bitmap])
def test_a_weight_without_numbers_is_refused(pack: Any) -> None:
    with pytest.raises(FormatError, match=r"\[6, 12\] on the meta device holds no numbers: load it"):
        pack(torch.empty(6, 12, device="meta"))


@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_the_decode_layout_says_that_it_needs_a_gpu(tokens: int) -> None:
    pytest.importorskip("triton")
    layer, _ = pair(SparseLinear24, dtype=torch.bfloat16)
    layer.use_layout("decode")
    with pytest.raises(ValueError, match=r"layout 'decode' runs on a GPU, .* take the canonical layout"):
        layer(torch.ones(tokens, 12, dtype=torch.bfloat16))
