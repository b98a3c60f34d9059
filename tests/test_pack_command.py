"""`llmprune pack` and `unpack`: what they say, what they refuse, and the other commands on a packed folder."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import SPOILED, TOKENS, tree
from families import FAMILIES
from llmprune_eval import peaks
from llmprune_eval.loading import load_model
from llmprune_eval.speed import Load
from llmprune_kernels.packed_linear import PackedLinear
from packed_folders import WEIGHTS, make_24_, state, tensors
from tiny import make_llama
from transformers import PreTrainedModel
from transformers.quantizers import auto

from llmprune import packed_files
from llmprune.advice import make_advice
from llmprune.config import PruneConfig
from llmprune.outlook import Machine
from llmprune.pack import pack
from llmprune.shards import Shard

Ok = Callable[..., str]
Refused = Callable[..., str]
LINEAR = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
ATTENTION = frozenset("q_proj k_proj v_proj o_proj".split())

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def zeros(dense: Path) -> Path:
    """A Llama with a tokenizer whose attention is 2:4 and whose FFN is dense."""
    model = load_model(str(dense))
    make_24_(model, ATTENTION)
    model.save_pretrained(dense)
    return dense


@pytest.fixture
def pruned(dense: Path, tmp_path: Path, ok: Ok, unproved: None) -> Path:
    """What `llmprune prune` makes."""
    np.save(tmp_path / "windows.npy", TOKENS)
    ok("prune", dense, "-o", "pruned", "--pattern", "2:4", "--dataset", "windows.npy", "--nsamples", 4)
    return tmp_path / "pruned"


def test_the_table_and_what_stays_dense(zeros: Path, tmp_path: Path, ok: Ok) -> None:
    text = ok("pack", zeros, "-o", "packed")
    before, after = 3 * 4 * (2 * 32 * 32 + 2 * 32 * 16), 3 * (2 * 32 * 32 + 2 * 32 * 16) * 17 // 8
    assert re.search(rf"packed weights +{before:,} +{after:,} +0\.5312", text)
    whole = [(folder / WEIGHTS).stat().st_size for folder in (zeros, tmp_path / "packed")]
    assert re.search(rf"all weight files +{whole[0]:,} +{whole[1]:,}", text)
    assert (
        "12 linear layers" in text
        and "3 x up_proj: not 2:4, first at row 0, column 0 of model.layers.0.mlp.up_proj" in text
    )
    assert "identical bit by bit" in text and "exactly" in text and "import llmprune; AutoModel" in text
    facts = json.loads(ok("pack", zeros, "-o", "again", "--json"))
    assert facts["weights"] == [before, after] and len(facts["modules"]) == 12 and len(facts["dense"]) == 9
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == (zeros / "tokenizer.json").read_bytes()
    assert not (tmp_path / "packed" / "llmprune.json").exists()  # llmprune has not pruned it


def test_plan_says_how_large_it_becomes(tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        model = FAMILIES[name].build() if name == "mixtral" else make_llama()
        make_24_(model, LINEAR)
        model.save_pretrained(tmp_path / name)
        done = pack(tmp_path / name, tmp_path / f"{name}-packed")
        (pairs,) = [
            one for one in make_advice(model, name, PruneConfig(), Machine(10**10)).patterns if one.pattern == "2:4"
        ]
        assert pairs.packed is not None
        assert pairs.size - pairs.packed == done.weights[0] - done.weights[1]
        assert done.share == pytest.approx(done.weights[0] / 4 / sum(
            p.numel() for p in model.model.layers.parameters()))  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_every_command_on_a_packed_folder(pruned: Path, dense: Path, tmp_path: Path, ok: Ok, refused: Refused) -> None:
    ok("pack", "pruned", "-o", "packed")
    manifest = json.loads((tmp_path / "packed" / "llmprune.json").read_text())
    plain = json.loads((pruned / "llmprune.json").read_text())
    assert manifest["packed"]["command"] == "llmprune pack pruned -o packed --format 2:4"
    assert manifest["saved"].pop("bytes") == (tmp_path / "packed" / WEIGHTS).stat().st_size
    assert {**manifest, "packed": None, "saved": None} == {**plain, "packed": None, "saved": None}
    card, before = ((tmp_path / folder / "README.md").read_text() for folder in ("packed", "pruned"))
    assert "import llmprune" in card and "pruned -o packed --format 2:4" in card and "0.53" in card
    assert "plain checkpoint: transformers" not in card and "plain checkpoint: transformers" in before
    assert "the file does not shrink" not in card and "import llmprune" not in before

    text = ok("inspect", "packed")
    assert re.search(r"packed +21 layers as 2:4: .*\(0\.53", text)
    site = re.compile(r"model\.layers.*")
    assert site.findall(text) == site.findall(ok("inspect", "pruned"))
    scored = [
        json.loads(ok("eval", folder, "--dataset", "windows.npy", "--output", f"{folder}.json", "--json"))
        for folder in ("packed", "pruned")
    ]
    assert scored[0]["parts"][0]["values"] == scored[1]["parts"][0]["values"]
    assert [scored[0]["model"][k] for k in ("parameters", "nonzero")] == [
        scored[1]["model"][k] for k in ("parameters", "nonzero")
    ]
    ok("compare", "packed", "pruned", "--html", "page.html")
    assert "packed, which cannot be pruned" in refused("prune", "packed", "-o", "x", "--method", "magnitude")
    assert "packed, which cannot be pruned" in refused("plan", "packed")
    assert "is packed already" in refused("pack", "packed", "-o", "x")

    ok("unpack", "packed", "-o", "unpacked")
    for file in ("config.json", WEIGHTS, "llmprune.json", "tokenizer.json"):
        assert (tmp_path / "unpacked" / file).read_bytes() == (pruned / file).read_bytes(), file
    assert (tmp_path / "unpacked" / "README.md").read_text().replace("unpacked", "pruned") == before


def test_a_config_of_another_model(zeros: Path, refused: Refused) -> None:
    SPOILED["of other shapes"][0](zeros)
    assert "gate_proj.weight does not have the shape that the config asks for" in refused("pack", zeros, "-o", "x")


def test_what_measures_memory_in_a_fresh_process_opens_it(zeros: Path, ok: Ok, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("pack", zeros, "-o", "packed")
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "llmprune")  # as in a process that has imported nothing of ours yet
    (found,) = peaks._work("packed", [Load(1, 8, 2)], "auto", False, 1)
    assert found["prefill"] > 0 and found["decode"] > 0


def test_what_cannot_be_packed(dense: Path, tmp_path: Path, refused: Refused) -> None:
    nothing = refused("pack", dense, "-o", "x")
    assert "nothing can be packed: model.layers.0.self_attn.q_proj: not 2:4, first at row 0, column 0" in nothing
    assert "`llmprune prune MODEL -o OUT --pattern 2:4`" in nothing and "0.00% of the weights are zeros" in nothing
    assert "no weight can be packed as 2:4: model.layers.0.self_attn.q_proj: not 2:4" in refused(
        "pack", dense, "-o", "x", "--format", "2:4"
    )
    assert "0% zeros: would not be smaller" in refused("pack", dense, "-o", "x", "--format", "bitmap")
    assert "format '4:8' is unknown: use one of auto, 2:4, bitmap" in refused(
        "pack", dense, "-o", "x", "--format", "4:8"
    )
    assert "none is no folder" in refused("pack", "none", "-o", "x")
    assert "is not packed: there is nothing" in refused("unpack", dense, "-o", "x")
    assert "is or contains the input model" in refused("pack", dense, "-o", dense, "--overwrite")
    (tmp_path / "there").mkdir()
    assert "exists: choose another folder" in refused("pack", dense, "-o", "there")


def test_an_output_inside_the_input(zeros: Path, tmp_path: Path, ok: Ok, refused: Refused) -> None:
    ok("pack", zeros, "-o", "packed")
    before = tree(tmp_path)
    assert "new/one lies inside the input model" in refused("pack", zeros, "-o", zeros / "new" / "one")
    assert "new lies inside the input model packed" in refused("unpack", "packed", "-o", "packed/new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["quantised", "without weights", "with truncated weights", "as a pickle",
                                  "without a shard", "with a config that is no JSON"])  # fmt: skip
def test_a_spoiled_folder(what: str, dense: Path, tmp_path: Path, refused: Refused) -> None:
    model = load_model(str(dense))
    make_24_(model, LINEAR)
    model.save_pretrained(dense)
    change, message = SPOILED[what]
    change(dense)
    assert re.search(message, refused("pack", dense, "-o", "x"))


def test_one_row_that_breaks_the_format_is_named(dense: Path, tmp_path: Path, ok: Ok) -> None:
    model = load_model(str(dense))
    make_24_(model, LINEAR)
    broken = model.get_submodule("model.layers.1.mlp.gate_proj").weight
    with torch.no_grad():
        broken[5, 12:16] = 1.0
    model.save_pretrained(dense)
    facts = json.loads(ok("pack", dense, "-o", "packed", "--json"))
    assert facts["dense"] == {"model.layers.1.mlp.gate_proj": "not 2:4, first at row 5, column 12"}
    assert f"{'model.layers.1.mlp.gate_proj'}.weight" in state(tmp_path / "packed")


def test_a_bitmap_where_there_are_no_pairs(dense: Path, tmp_path: Path, ok: Ok) -> None:
    model = load_model(str(dense))
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            weight[torch.rand(weight.shape) < 0.5] = 0.0
    model.save_pretrained(dense)
    text = ok("pack", dense, "-o", "packed")
    assert "packed as bitmap" in text and "3 linear layers" in text and "0% zeros: would not be smaller" in text


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_cut_short_leaves_nothing(
    trouble: BaseException, zeros: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    shutil.copytree(zeros, tmp_path / "good")
    before = tree(tmp_path)
    put = Shard.put

    def fail(self: Shard, name: str, tensor: torch.Tensor) -> None:
        if "layers.1" in name:
            raise trouble
        put(self, name, tensor)

    monkeypatch.setattr(Shard, "put", fail)
    code, out, err = cli("pack", zeros, "-o", tmp_path / "good", "--overwrite")
    assert (code, out, len(err.splitlines())) == (130 if isinstance(trouble, KeyboardInterrupt) else 2, "", 1), err
    assert "disk is full" in err or "interrupted" in err
    assert tree(tmp_path) == before


def test_a_disk_that_lies_is_found_out(zeros: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = packed_files.write_packed

    def spoil(weights: object, choice: object, building: Path) -> None:
        write(weights, choice, building)  # type: ignore[arg-type]
        tensors(lambda t: t["model.layers.1.self_attn.q_proj.values"].view(-1)[:1].mul_(2))(building)

    monkeypatch.setattr("llmprune.pack.write_packed", spoil)
    with pytest.raises(RuntimeError, match=r"model.layers.1.self_attn.q_proj is not what was packed"):
        pack(zeros, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("trouble", "message"), [
    (AttributeError("no 'weight'\nat all"), r"LlamaForCausalLM does not run with packed layers \(no 'weight'\)"),
    (TypeError("not this"), r"LlamaForCausalLM does not run with packed layers \(not this\)"),
    (RuntimeError("shapes"), r"LlamaForCausalLM does not run with packed layers \(shapes\)"),
    (None, "LlamaForCausalLM computes otherwise with packed layers .*differ"),
])  # fmt: skip
def test_a_model_that_does_not_take_packed_layers(
    trouble: Exception | None, message: str, zeros: Path, tmp_path: Path, refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = PackedLinear.forward

    def forward(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        if trouble is not None:
            raise trouble
        return 2 * own(self, x)

    monkeypatch.setattr(PackedLinear, "forward", forward)
    said = refused("pack", zeros, "-o", "packed")
    assert re.search(message, said) and "nothing was written" in said
    assert not (tmp_path / "packed").exists()


def test_without_room_for_the_dense_model_the_logits_are_not_compared(
    zeros: Path, tmp_path: Path, ok: Ok, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.pack.ROOM", 1e12)
    assert re.search(
        r"logits +finite on 32 tokens, and not compared: the dense model needs", ok("pack", zeros, "-o", "p")
    )


def test_what_lies_beside_the_weights_comes_along(zeros: Path, tmp_path: Path, ok: Ok) -> None:
    (zeros / "additional_chat_templates").mkdir()
    (zeros / "additional_chat_templates" / "tools.jinja").write_text("x")
    (zeros / "pytorch_model.bin").write_bytes(b"not to be carried along")
    (zeros / ".cache").mkdir()
    ok("pack", zeros, "-o", "packed")
    assert (tmp_path / "packed" / "additional_chat_templates" / "tools.jinja").read_text() == "x"
    assert not (tmp_path / "packed" / "pytorch_model.bin").exists() and not (tmp_path / "packed" / ".cache").exists()


def test_auto_takes_the_bitmap_where_few_matrices_are_24(dense: Path, tmp_path: Path, ok: Ok) -> None:
    """One zero matrix, which is 2:4 as well, does not leave all others dense."""
    model = load_model(str(dense))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".weight")[0].rpartition(".")[2] in LINEAR:
                parameter[torch.rand_like(parameter) < 0.6] = 0.0
        model.get_parameter("model.layers.1.self_attn.k_proj.weight").zero_()
    model.save_pretrained(dense)
    assert "packed as bitmap" in ok("pack", dense, "-o", "one")
    make_24_(model, LINEAR - {"up_proj"})
    model.save_pretrained(dense)
    assert "packed as 2:4" in ok("pack", dense, "-o", "most")


@pytest.mark.parametrize("place", ["notes.txt", "extra/notes.txt"])
def test_a_file_that_cannot_be_copied_is_found_first(place: str, zeros: Path, tmp_path: Path, refused: Refused) -> None:
    (zeros / "extra" / ".cache").mkdir(parents=True)
    (zeros / "extra" / ".cache" / "none").symlink_to("nowhere")  # hidden: it is left behind
    assert pack(zeros, tmp_path / "packed").modules
    (zeros / place).symlink_to("nowhere")
    assert f"{zeros / place}, which would be copied, cannot be read" in refused("pack", zeros, "-o", "x")
    (tmp_path / "packed" / place).unlink(missing_ok=True)
    (tmp_path / "packed" / place).symlink_to("nowhere")
    assert "cannot be read: mend it" in refused("unpack", tmp_path / "packed", "-o", "x")


def test_a_model_whose_names_lack_the_prefix(tmp_path: Path) -> None:
    model: PreTrainedModel = FAMILIES["gpt2"].build()
    make_24_(model, FAMILIES["gpt2"].sites, transposed=True)
    model.save_pretrained(tmp_path / "zeros")
    tensors(lambda t: [t.update({key.removeprefix("transformer."): t.pop(key)}) for key in list(t)])(tmp_path / "zeros")
    done = pack(tmp_path / "zeros", tmp_path / "packed")
    assert len(done.modules) == 12 and "h.0.attn.c_attn.values" in state(tmp_path / "packed")


def test_weights_under_other_names_are_named_and_no_zeros_are_advised(
    zeros: Path, tmp_path: Path, refused: Refused
) -> None:
    tensors(lambda t: [t.update({f"other.{key}": t.pop(key)}) for key in list(t)])(zeros)
    for kind in ("auto", "2:4", "bitmap"):
        said = refused("pack", zeros, "-o", "x", "--format", kind)
        assert ": stored under another name; pruning does not change that" in said
        assert "no linear layers" not in said and "% of the weights" not in said and "llmprune prune" not in said
