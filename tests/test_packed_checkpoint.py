"""Packed checkpoints: every family opens and computes what the zeros did; damage is named; nothing dense is held."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from llmprune_kernels import FormatError, SparseLinear24, SparseLinearBitmap
from llmprune_kernels.huggingface import PackedConfig, expected_tensors, put_packed_layers, register
from llmprune_kernels.inventory import count_weights, packed_layers
from packed_folders import WEIGHTS, entries, make_24_, pair_up_, state, tensors
from tiny import make_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import llmprune
from llmprune.errors import InputError
from llmprune.pack import pack, unpack

Refused = Callable[..., str]
LINEAR = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
UP = "model.layers.1.mlp.up_proj"
GUARD = "model.layers.0.mlp.down_proj.weight"
TOKENS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 2:4 weights, some of them in rows of 67."""
    torch.manual_seed(0)
    model = make_llama(intermediate_size=67)
    make_24_(model, LINEAR)
    folder = tmp_path_factory.mktemp("zeros") / "zeros"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(zeros: Path) -> Path:
    folder = zeros.parent / "packed"
    pack(zeros, folder)
    return folder


def saved_24(name: str, folder: Path) -> PreTrainedModel:
    """A family's model whose sites are 2:4, saved."""
    model = FAMILIES[name].build()
    make_24_(model, FAMILIES[name].sites, transposed=name == "gpt2")
    model.save_pretrained(folder)
    return model


OWN_WAY = ("falcon", "falcon_alibi")  # whose linear layers round between product and bias


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OWN_WAY])
def test_every_family_opens_packed_and_computes_the_same(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = saved_24(name, tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed")

    again = opened(tmp_path / "packed")
    layers = dict(packed_layers(again))
    blocks = model.get_submodule(family.blocks)
    matrices = {
        f"{family.blocks}.{key.removesuffix('.weight')}"
        for key, parameter in blocks.named_parameters()
        if key.split(".")[-2] in family.sites and key.endswith(".weight") and parameter.ndim == 2
    }
    assert set(done.modules) == set(layers) == matrices
    assert all(isinstance(layer, SparseLinear24) for layer in layers.values())
    assert not any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)

    again.save_pretrained(tmp_path / "saved")
    stored = state(tmp_path / "packed")
    saved = state(tmp_path / "saved")
    assert stored.keys() == saved.keys() and all(torch.equal(stored[key], saved[key]) for key in stored)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("packed", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    for folder in ("packed", "saved"):
        unpack(tmp_path / folder, tmp_path / f"un{folder}")
    for file in (tmp_path / "zeros").iterdir():
        assert (tmp_path / "unpacked" / file.name).read_bytes() == file.read_bytes(), file
    assert (tmp_path / "unsaved" / WEIGHTS).read_bytes() == (tmp_path / "zeros" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", OWN_WAY)
def test_layers_that_compute_in_their_own_way_stay_dense(name: str, tmp_path: Path, refused: Refused) -> None:
    model = FAMILIES[name].build()
    make_24_(model, FAMILIES[name].sites)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "zeros")
    for kind in ("auto", "2:4"):
        said = refused("pack", tmp_path / "zeros", "-o", "packed", "--format", kind)
        assert "query_key_value: FalconLinear computes in its own way; pruning does not change that" in said
        assert "no linear layers" not in said and "% of the weights" not in said and "llmprune prune" not in said
    with torch.device("meta"):
        empty = type(model)(model.config)
    config = PackedConfig(
        quant_method="llmprune", format="2:4", version=1, modules={"transformer.h.0.mlp.dense_h_to_4h": 67 * 20}
    )
    with pytest.raises(FormatError, match="dense_h_to_4h' is no linear layer"):
        put_packed_layers(empty, config)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_names_without_the_base_models_prefix(name: str, tmp_path: Path) -> None:
    model = saved_24(name, tmp_path / "zeros")
    prefix = f"{model.base_model_prefix}."
    tensors(lambda t: [t.update({key.removeprefix(prefix): t.pop(key)}) for key in list(t)])(tmp_path / "zeros")
    pack(tmp_path / "zeros", tmp_path / "packed")
    again, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto", output_loading_info=True)
    assert not any(facts[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), facts
    assert torch.equal(logits(again), logits(model))
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for file in (tmp_path / "zeros").iterdir():
        assert (tmp_path / "unpacked" / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_base_model_opens_and_saves_what_the_head_opens(name: str, tmp_path: Path) -> None:
    model = saved_24(name, tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed")
    base, facts = AutoModel.from_pretrained(tmp_path / "packed", dtype="auto", output_loading_info=True)
    assert len(dict(packed_layers(base))) == len(done.modules) and not facts["missing_keys"]
    assert set(facts["unexpected_keys"]) <= {"lm_head.weight"}
    base.save_pretrained(tmp_path / "saved")
    again, facts = AutoModel.from_pretrained(tmp_path / "saved", dtype="auto", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    with torch.no_grad():
        wanted = model.base_model(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, wanted)
        assert torch.equal(again(TOKENS).last_hidden_state, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_llama(intermediate_size=64)
    make_24_(model, LINEAR)
    model.to(dtype)
    model.save_pretrained(tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed")
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert done.weights == (weights * dtype.itemsize, weights * dtype.itemsize // 2 + weights // 8)
    if dtype != torch.float32:
        assert done.weights[1] / done.weights[0] == 0.5625
    before, after = state(tmp_path / "zeros"), state(tmp_path / "packed")
    assert all(torch.equal(before[key], after[key]) for key in before.keys() & after.keys() if after[key].numel())
    assert torch.equal(logits(opened(tmp_path / "packed")), logits(opened(tmp_path / "zeros")))
    for other in (torch.float32, torch.bfloat16):
        again = opened(tmp_path / "packed", dtype=other, device_map="auto")
        assert {p.dtype for p in again.parameters()} == {other}
        assert torch.equal(logits(again), logits(opened(tmp_path / "zeros", dtype=other)))
        assert count_weights(again) == count_weights(model.to(other))


def test_any_zeros_as_a_bitmap(tmp_path: Path) -> None:
    model = make_llama(intermediate_size=67)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in LINEAR and "layers.2" not in name:
                parameter[torch.rand(parameter.shape) < 0.6] = 0.0
        model.model.layers[0].mlp.up_proj.weight.zero_()  # stores nothing at all
    model.save_pretrained(tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed", "bitmap")
    again = opened(tmp_path / "packed")
    assert done.kind == "bitmap" and done.modules["model.layers.0.mlp.up_proj"] == 0
    assert all(isinstance(layer, SparseLinearBitmap) for _, layer in packed_layers(again))
    assert {name for name in done.dense if "layers.2" not in name} == set()
    assert torch.equal(logits(again), logits(model)) and count_weights(again) == count_weights(model)
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / WEIGHTS).read_bytes() == (tmp_path / "zeros" / WEIGHTS).read_bytes()


def test_several_files_and_a_biased_layer(tmp_path: Path) -> None:
    model = make_llama(attention_bias=True, tie_word_embeddings=True)
    make_24_(model, LINEAR)
    model.save_pretrained(tmp_path / "zeros", max_shard_size="20KB")
    pack(tmp_path / "zeros", tmp_path / "packed")
    files = sorted(file.name for file in (tmp_path / "packed").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "zeros").iterdir()) and len(files) > 5
    again = opened(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "saved", max_shard_size="3KB")  # a layer's tensors come to lie apart
    for folder in ("packed", "saved"):
        unpack(tmp_path / folder, tmp_path / f"un{folder}")
        assert torch.equal(logits(opened(tmp_path / f"un{folder}")), logits(model))
    for file in (tmp_path / "zeros").iterdir():
        assert (tmp_path / "unpacked" / file.name).read_bytes() == file.read_bytes(), file


def test_only_the_sign_of_negative_zeros_can_be_lost(tmp_path: Path) -> None:
    model = make_llama()
    make_24_(model, LINEAR)
    weight = model.get_submodule(UP).weight.data
    weight[weight == 0] = -0.0
    model.save_pretrained(tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed")
    assert done.proof["signs_of_zeros_lost"] == weight.numel() // 2
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = state(tmp_path / "zeros"), state(tmp_path / "unpacked")
    assert all(torch.equal(before[key], after[key]) for key in before)


class Allocations(TorchDispatchMode):
    """The largest tensor with storage that any operation has returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.nbytes)
        return found


def test_the_dense_weights_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread alone
    model = make_llama(intermediate_size=256)
    make_24_(model, LINEAR)
    model.save_pretrained(tmp_path / "zeros")
    pack(tmp_path / "zeros", tmp_path / "packed")
    with Allocations() as loading:
        opened(tmp_path / "packed")
    with Allocations() as dense:
        opened(tmp_path / "zeros")
    assert loading.largest == 4 * 32 * 128  # values of the largest layer
    assert dense.largest == 4 * 32 * 256


def _restart(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process that has not imported llmprune."""
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    load = f"from transformers import AutoModelForCausalLM as A\nprint(type(A.from_pretrained({str(folder)!r})))"
    return subprocess.run([sys.executable, "-c", path + code + load], capture_output=True, text=True)


def test_a_fresh_process_opens_it_after_one_import(packed: Path) -> None:
    done = _restart(packed, "import llmprune\n")
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stdout
    assert "REPORT" not in done.stderr, done.stderr


def test_transformers_alone_refuses_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "llmprune")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        opened(packed)


def test_importing_llmprune_registers(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "llmprune")
    importlib.reload(llmprune)
    assert dict(packed_layers(opened(packed)))


def test_registering_again_changes_nothing(packed: Path) -> None:
    register()
    register()
    assert dict(packed_layers(opened(packed)))


def test_a_dense_model_is_not_packed_while_it_is_loaded(zeros: Path) -> None:
    config = PackedConfig(quant_method="llmprune", format="2:4", version=1, modules={UP: 1})
    with pytest.raises(FormatError, match="not packed: run `llmprune pack"):
        opened(zeros, quantization_config=config)


def _halve(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def _damage(name: str, value: int) -> Callable[[Path], None]:
    return tensors(lambda found: found[name].view(-1).__setitem__(3, value))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown key": (entries(lambda e: e.update(backend="os.system")), "holds 'backend', which no packed model has"),
    "no version": (entries(lambda e: e.pop("version")), "lacks 'version'"),
    "another version": (entries(lambda e: e.update(version=2)), "version 2, and version 1 can be read"),
    "a version that is true": (entries(lambda e: e.update(version=True)), "is of version True"),
    "an unknown format": (entries(lambda e: e.update(format="1:4")), r"format '1:4' is unknown \(2:4, bitmap are"),
    "a format that is a list": (entries(lambda e: e.update(format=["2:4"])), "format .*2:4.* is unknown"),
    "the other format": (entries(lambda e: e.update(format="bitmap")), r"\.bitmap, which this model needs|has shape"),
    "no modules": (entries(lambda e: e.update(modules={})), "names no layers"),
    "modules in a list": (entries(lambda e: e.update(modules=[UP])), "names no layers"),
    "a count in words": (entries(lambda e: e["modules"].update({UP: "many"})), "'many', no count"),
    "a layer that is not there": (entries(lambda e: e["modules"].update({"layers.9": 4})), "'layers.9' is no linear"),
    "a layer that is a norm": (entries(lambda e: e["modules"].update({"model.norm": 4})), "'model.norm' is no linear"),
    "the output head": (entries(lambda e: e["modules"].update({"lm_head": 97 * 16})), "'lm_head' is no linear layer"),
    "an attribute for a layer": (entries(lambda e: e["modules"].update({"__class__": 4})), "'__class__' is no linear"),
    "another count": (entries(lambda e: e["modules"].update({UP: 7})), f"{UP}: a 2:4 weight 67 x 32 .* 1072, not 7"),
    "a negative count": (entries(lambda e: e["modules"].update({UP: -1})), f"{UP}: a 2:4 weight .* not -1"),
    "a layer left out": (entries(lambda e: e["modules"].pop(UP)), f"hold {UP}.positions, of which the config knows"),
    "no values": (tensors(lambda t: t.pop(f"{UP}.values")), f"lack {UP}.values"),
    "no positions": (tensors(lambda t: t.pop(f"{UP}.positions")), f"lack {UP}.positions"),
    "no norm": (tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "no embedding": (tensors(lambda t: t.pop("model.embed_tokens.weight")), "lack model.embed_tokens.weight"),
    "a norm of another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(5)})), r"model.norm.weight has shape \[5\] in"),
    "no guard": (tensors(lambda t: t.pop(GUARD)), f"lack {GUARD}, the empty mark"),
    "a guard with weights": (tensors(lambda t: t.update({GUARD: torch.ones(67, 32)})), f"{GUARD} dense beside its"),
    "a dense weight beside the packed": (
        tensors(lambda t: t.update({f"{UP}.weight": torch.ones(67, 32)})), f"hold {UP}.weight dense beside its"),
    "values of another shape": (
        tensors(lambda t: t.update({f"{UP}.values": t[f"{UP}.values"][:3].clone()})), r"values has shape \[3, 16\] in"),
    "positions as numbers": (
        tensors(lambda t: t.update({f"{UP}.positions": t[f"{UP}.positions"].int()})), "is stored as I32"),
    "values as numbers": (
        tensors(lambda t: t.update({f"{UP}.values": t[f"{UP}.values"].int()})), "is stored as I32"),
    "a position that is none": (_damage(f"{UP}.positions", 0xFF), f"{UP}: position byte 0xff at row 0, byte 3"),
    "half a file": (_halve, "model.safetensors is truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_folder_is_one_clear_error(what: str, packed: Path, tmp_path: Path, refused: Refused) -> None:
    change, message = TAMPERED[what]
    folder = Path(shutil.copytree(packed, tmp_path / "bad"))
    change(folder)
    with pytest.raises(FormatError, match=message) as error:
        opened(folder)
    assert len(str(error.value).splitlines()) == 1
    # The command line finds some of it by itself, before transformers does.
    said = refused("inspect", folder)
    assert str(tmp_path / "bad") in said and "whole Hugging Face" not in said
    if what != "a position that is none":  # which no header tells
        assert re.search(message, refused("unpack", folder, "-o", "out"))
    with pytest.raises(InputError):
        unpack(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_marks_that_are_not_as_many_as_the_values(tmp_path: Path) -> None:
    model = make_llama()
    make_24_(model, LINEAR)
    model.save_pretrained(tmp_path / "zeros")
    pack(tmp_path / "zeros", tmp_path / "packed", "bitmap")
    _damage(f"{UP}.bitmap", 0)(tmp_path / "packed")
    with pytest.raises(FormatError, match=f"{UP}: bitmap marks"):
        opened(tmp_path / "packed")


def test_a_model_spread_over_disk_and_memory(zeros: Path, packed: Path, tmp_path: Path) -> None:
    places: dict[str, str] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1", "model.layers.2"), "cpu"
    )
    spread = opened(packed, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(spread), logits(opened(zeros)))
    with pytest.warns(UserWarning, match="offloaded modules"):
        spread.save_pretrained(tmp_path / "saved")
    before, after = state(packed), state(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("options", [{"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 0}}])
def test_a_model_that_is_all_on_disk(options: dict[str, Any], zeros: Path, packed: Path, tmp_path: Path) -> None:
    spread = opened(packed, **options, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(spread), logits(opened(zeros)))


def test_a_model_without_weights(packed: Path) -> None:
    empty = opened(packed, device_map="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"])
def test_a_lost_tensor_is_refused_on_any_device_map(lost: str, packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "bad"))
    tensors(lambda t: t.pop(lost))(folder)
    places: dict[str, str] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i == 0 else "cpu" for i in range(3)}
    with pytest.raises(FormatError, match=f"the files lack {lost}"):
        opened(folder, device_map=places, offload_folder=tmp_path / "offloaded")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_neox", "gpt2", "gemma4"])
def test_what_is_asked_of_the_files(name: str, tmp_path: Path) -> None:
    """All that a family saves, but for what transformers converts: a norm is always asked for."""
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path)
    expected, saved = expected_tensors(model), state(tmp_path)
    assert set(expected.others) <= saved.keys() and not expected.packed
    assert any("norm" in key or "ln_" in key for key in expected.others)
    assert {key for key in saved if "norm" in key or "attn" in key} <= set(expected.others)
    assert not any(".experts." in key for key in expected.others if name in ("mixtral", "qwen3_moe", "deepseek_v3"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kind", ["2:4", "bitmap"])
def test_on_a_gpu_it_is_laid_out_and_saves_the_same(kind: str, tmp_path: Path) -> None:
    model = make_llama(intermediate_size=67)
    make_24_(model, LINEAR)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "zeros")
    pack(tmp_path / "zeros", tmp_path / "packed", kind)
    wanted = logits(opened(tmp_path / "packed")).float()
    again = opened(tmp_path / "packed", device_map="cuda")
    assert not any(layer.layout == layer.CANONICAL for _, layer in packed_layers(again))
    with torch.no_grad():
        found = again(input_ids=TOKENS.cuda()).logits.float().cpu()
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    again.save_pretrained(tmp_path / "saved")
    before, after = state(tmp_path / "packed"), state(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_oracle_makes_what_it_says() -> None:
    weight = torch.ones(5, 67)
    pair_up_(weight)
    groups = torch.nn.functional.pad(weight, (0, 1)).view(5, 17, 4).sum(2)
    assert (groups == 2).all()
