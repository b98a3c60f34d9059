"""Bad input: one line that says what was given, what is wanted and what to do; exit code 2; nothing written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import BAD_DATA, OVERFLOWING, SPOILED, TOKENS, Change, words
from tiny import make_llama
from transformers import PreTrainedModel

from llmprune import InputError, PruneConfig, prune

Refused = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Enough text for ten windows."""
    file = tmp_path / "text.txt"
    file.write_text(words(640))
    return file


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_model(spoil: Change, message: str, dense: Path, text: Path, refused: Refused) -> None:
    spoil(dense)
    assert re.search(message, refused("prune", dense, "-o", "out", "--dataset", text))
    with pytest.raises(InputError, match=message):
        prune(dense, PruneConfig(dataset=str(text)))


@pytest.mark.parametrize(("spoil", "message"), OVERFLOWING.values(), ids=OVERFLOWING.keys())
def test_an_overflowing_model(spoil: Change, message: str, dense: Path, text: Path, refused: Refused) -> None:
    spoil(dense)
    said = refused("prune", dense, "-o", "out", "--dataset", text, "--nsamples", 2, progress=True)
    assert re.search(message, said)
    assert "NaN or infinity" in said
    with pytest.raises(InputError, match=message):
        prune(dense, PruneConfig(dataset=str(text), num_calibration_samples=2))


def test_overflow_without_data_or_held_out_text(dense: Path, text: Path, refused: Refused) -> None:
    OVERFLOWING["in the head"][0](dense)
    wanted = "logits are not finite"
    assert wanted in refused("prune", dense, "-o", "out", "--method", "magnitude", progress=True)
    assert wanted in refused("prune", dense, "-o", "out", "--dataset", "self")
    assert wanted in refused("eval", dense, "--dataset", text)


def test_weights_too_large_for_the_dtype_asked_for(dense: Path, refused: Refused) -> None:
    model = make_llama()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data.fill_(1e6)
    model.save_pretrained(dense)
    said = refused("prune", dense, "-o", "out", "--method", "magnitude", "--dtype", "float16")
    assert re.search("1.mlp.up_proj.weight holds NaN or infinity: .*overflows in torch.float16", said)


def test_an_overflow_in_float16_names_the_place(dense: Path, text: Path, refused: Refused) -> None:
    model = make_llama()
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data.fill_(6e4)
    model.save_pretrained(dense)
    said = refused("prune", dense, "-o", "out", "--dataset", text, "--nsamples", 2, "--dtype", "float16", progress=True)
    assert re.search(r"model.layers.1\b.* not finite .*try --dtype float32", said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "model './absent' does not exist: give a folder"),
        ("dense/absent", "model 'dense/absent' does not exist: give a folder"),
        ("dense/config.json", "is a file: give the folder with its config.json"),
        ("absent", "is no local folder and cannot be had from the Hub .*pass the path of a local folder"),
        ("owner/absent", "is no local folder and cannot be had from the Hub .*pass the path of a local folder"),
        ("two words", "is no local folder and cannot be had from the Hub .*pass the path of a local folder"),
        ("x" * 300, "is no local folder and cannot be had from the Hub .*pass the path of a local folder"),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str, dense: Path, text: Path, refused: Refused) -> None:
    for command in (("prune", name, "-o", "out", "--dataset", text), ("prune", name, "--dry-run"), ("inspect", name),
                    ("eval", name, "--dataset", text)):  # fmt: skip
        assert re.search(message, refused(*command))
    with pytest.raises(InputError, match=message):
        prune(name, PruneConfig(dataset=str(text)))


@pytest.mark.parametrize(("file", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(file: tuple[str, Change], message: str, dense: Path, tmp_path: Path, refused: Refused) -> None:
    name, write = file
    write(tmp_path / name)
    assert re.search(message, refused("prune", dense, "-o", "out", "--dataset", tmp_path / name))
    with pytest.raises(InputError, match=message):
        prune(dense, PruneConfig(dataset=str(tmp_path / name)))
    if not name.endswith(".npy"):
        refused("eval", dense, "--dataset", tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.txt", "dataset 'absent.txt' does not exist or is no file: give a path to a .txt, .jsonl, .parquet"),
        ("absent.npy", "dataset 'absent.npy' does not exist: give a .npy file of token ids"),
        ("wikitext2:absent.txt", "dataset 'absent.txt' does not exist or is no file"),
        ("absent", "dataset 'absent' does not exist: give a .txt, .jsonl, .parquet or .npy file, or one of c4, "),
        ("dense", "does not exist or is no file: give a path"),
        ("x" * 300, "does not exist: give a .txt"),
    ],
)
def test_a_dataset_that_is_not_there_is_found_before_the_work(
    spec: str, message: str, dense: Path, refused: Refused
) -> None:
    assert re.search(message, refused("prune", dense, "-o", "out", "--dataset", spec))
    assert re.search(message, refused("prune", dense, "--dry-run", "--dataset", spec))


@pytest.mark.parametrize("name", ["c4", "wikitext2", "owner/absent"])
def test_a_dataset_of_the_hub_without_network(name: str, dense: Path, refused: Refused) -> None:
    message = f"cannot get the dataset '{name}' from the Hub .*pass a local .txt, .jsonl, .parquet or .npy"
    assert re.search(message, refused("prune", dense, "-o", "out", "--dataset", name))
    assert re.search(message, refused("eval", dense, "--dataset", name))


def test_every_text_is_shorter_than_a_random_cut(dense: Path, text: Path, refused: Refused) -> None:
    text.write_text(words(64))
    said = refused("prune", dense, "-o", "out", "--dataset", f"c4:{text}")
    assert "1 texts, none longer than 64 tokens: give more text, or a smaller --max-seq-length" in said


OUTSIDE = r"outside \(0, 1\): give the share"
OPTIONS = {
    "--method=nonesuch": "unknown method 'nonesuch': choose from magnitude, .*wanda",
    "--method=wandaa": "unknown method 'wandaa': did you mean wanda?",
    "--sparsity=0": OUTSIDE,
    "--sparsity=1": OUTSIDE,
    "--sparsity=-0.1": f"sparsity -0.1 is {OUTSIDE}",
    "--sparsity=1.5": OUTSIDE,
    "--sparsity=nan": f"sparsity nan is {OUTSIDE}",
    "--sparsity=half": "Invalid value for '--sparsity'",
    "--pattern=4:2": "4:2 keeps 4 of every 2 weights: n must be from 1 to m - 1",
    "--pattern=0:4": "0:4 keeps 0 of every 4 weights",
    "--pattern=2:0": "2:0 keeps 2 of every 0 weights",
    "--pattern=4:4": "4:4 keeps 4 of every 4 weights",
    "--pattern=a:b": "pattern 'a:b' is none: use unstructured, row, matrix, uniform, or n:m such as 2:4",
    "--pattern=4:8": r"model.layers.0.mlp.down_proj has 68 inputs, which 8 does not divide.*--ignore model.layers.0",
    "--pattern=2:4 --sparsity=0.6": "2:4 prunes 0.5 of the weights, but sparsity 0.6 was given: leave --sparsity out",
    "--max-seq-length=65": "windows of 65 tokens exceed the model's 64 positions: pass --max-seq-length 64 or less",
    "--refine=bogus": "refine 'bogus' is unknown: choose from none, swap",
    "--compensation=bogus": "compensation 'bogus' is unknown: choose from none, bias, least-squares",
    "--steps=50": "steps steers the learning of masks, and wanda learns none: leave it out",
    "--method=obs --lora-rank=4 --passes=3": "passes, lora_rank steers the learning of masks, and obs learns none",
    "--resume": "resume goes on with the learning of masks, and wanda learns none: leave it out",
    "--max-seq-length=1": "max_seq_length is 1: at least 2 tokens are needed",
    "--max-seq-length=-5": "max_seq_length is -5: at least 2 tokens are needed",
    "--batch-size=0": "batch_size is 0: at least 1 is needed",
    "--batch-size=1.5": "Invalid value for '--batch-size'",
    "--num-calibration-samples=0": "num_calibration_samples is 0: at least 1 is needed",
    "--num-holdout-samples=-1": "num_holdout_samples is -1: give 0 or more",
    "--seed=-1": "seed is -1: give a number from 0",
    "--dtype=float64": "dtype 'float64' is unknown: use one of auto, float32, float16, bfloat16",
    "--device=bogus": "device 'bogus' is unknown: use auto, cpu, cuda or cuda:N",
    "--device=cpu:x": "device 'cpu:x' is unknown: use auto, cpu, cuda or cuda:N",
    "--targets=nonesuch": "'nonesuch' matches no parameter of the blocks: give a name or a dotted part",
    "--ignore=nonesuch": "'nonesuch' matches no parameter of the blocks: give a name or a dotted part",
    "--ignore=re:(": r"'re:\(' is no regular expression",
    "--targets=re:(": r"'re:\(' is no regular expression",
    "--ignore=Linear": "nothing is left to prune",
    "--bogus": "No such option: --bogus .*see --help",
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.items(), ids=OPTIONS.keys())
def test_a_bad_option(options: str, message: str, dense: Path, text: Path, refused: Refused) -> None:
    assert re.search(message, refused("prune", dense, "-o", "out", "--dataset", text, *options.split()))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "nonesuch"}, {"sparsity": 0.0}, {"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 1.5},
        {"sparsity": float("nan")}, {"pattern": "4:2"}, {"pattern": "a:b"}, {"batch_size": 0}, {"seed": -1},
        {"num_calibration_samples": 0}, {"max_seq_length": 1}, {"dtype": "float64"}, {"device": "bogus"},
        {"ignore": "down_proj"},
    ],
)  # fmt: skip
def test_a_bad_setting_is_found_without_a_model(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PruneConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device(dense: Path, text: Path, refused: Refused) -> None:
    for command in (("prune", dense, "-o", "out"), ("eval", dense)):
        said = refused(*command, "--dataset", text, "--device", "cuda")
        assert "--device cuda: this machine or this torch has no cuda; use --device cpu" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "Missing command"),
        ("bogus", "No such command 'bogus'"),
        ("prune", "Missing argument"),
        ("prune dense", "no output folder: pass -o FOLDER, or --dry-run"),
        ("prune dense -o out", "method wanda needs calibration text: pass --dataset FILE, a Hub name such as c4, or"),
        ("prune dense extra -o out", "unexpected extra argument"),
        ("eval dense", "nothing to measure was asked for"),
        ("eval dense --dataset windows.npy", "dataset 'windows.npy' does not exist"),
        ("eval dense --dataset self", "evaluation needs text"),
        ("eval dense --dataset text.txt --max-seq-length 65", "windows of 65 tokens exceed the model's 64 positions"),
        ("eval dense --dataset text.txt --max-seq-length 1", "pass a --max-seq-length of at least 2"),
        ("eval dense --dataset text.txt --max-seq-length 0", "pass a --max-seq-length of at least 2"),
        ("eval dense --dataset text.txt --batch-size 0", "at least 1"),
        ("eval dense --dataset text.txt --num-samples 0", "at least 1"),
        ("eval dense --dataset text.txt --device bogus", "device 'bogus' is unknown: use auto, cpu"),
        ("eval dense --dataset text.txt --dtype bogus", "dtype 'bogus' is unknown: use one of auto"),
        ("inspect", "Missing argument"),
        ("methods --bogus", "No such option: --bogus"),
    ],
)
def test_a_bad_command(command: str, message: str, dense: Path, text: Path, refused: Refused) -> None:
    assert message in refused(*command.split())


def test_a_model_without_tokenizer(saved_llama: Path, text: Path, refused: Refused) -> None:
    assert "no tokenizer to read" in refused("prune", saved_llama, "-o", "out", "--dataset", text)
    assert "copy the dense model's tokenizer files" in refused("eval", saved_llama, "--dataset", text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 50}, "vocabularies of 97 and 50: --against must be the model that the other was pruned from"),
        ({"vocab_size": 150}, "vocabularies of 97 and 150"),
        ({"max_position_embeddings": 16}, "exceed the model's 16 positions"),
    ],
)
def test_a_dense_model_of_another_kind(
    settings: dict[str, int], message: str, dense: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    make_llama(**settings).save_pretrained(tmp_path / "other")
    assert message in refused("eval", dense, "--dataset", text, "--against", tmp_path / "other")


@pytest.mark.parametrize("content", ['{"schema"', "[1]", '"x"', "{}", '{"config": 3, "versions": {}}', "\xff"])
def test_a_damaged_manifest(content: str, dense: Path, refused: Refused) -> None:
    (dense / "llmprune.json").write_text(content, encoding="latin-1")
    said = refused("inspect", dense)
    assert str(dense / "llmprune.json") in said
    assert "delete it to inspect the weights alone" in said


def test_bad_tensors_for_the_api(llama: PreTrainedModel) -> None:
    good = torch.from_numpy(TOKENS)
    bad: list[Any] = [good[0], good.float(), good[:0], good[:, :1], good + 97, good - 97, torch.ones(2, 65).long()]
    bad += [TOKENS[0], TOKENS / 2, [1, 2], [[1, 2], [3]], "text", [["a", "b"]], good > 3]
    for tokens in bad:
        with pytest.raises(InputError, match="tokens"):
            prune(llama, PruneConfig(), tokens=tokens)
        if len(tokens):
            with pytest.raises(InputError, match=r"tokens|holdout"):
                prune(llama, PruneConfig(), tokens=good, holdout=tokens)
    with pytest.raises(InputError, match="no calibration data"):
        prune(llama)
    assert all((p != 0).any() for p in llama.parameters())


def test_weights_that_cannot_be_pruned_for_the_api(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    attention = llama.model.layers[1].self_attn
    kept, attention.k_proj.weight = attention.k_proj.weight, attention.v_proj.weight
    with pytest.raises(InputError, match=r"v_proj shares its weights with .*k_proj: leave both out"):
        prune(llama, PruneConfig(device="cpu"), tokens=windows)
    attention.k_proj.weight = kept
    with torch.inference_mode():
        frozen = copy.deepcopy(llama)
    with pytest.raises(InputError, match=r"was made under torch\.inference_mode"):
        prune(frozen, PruneConfig(device="cpu"), tokens=windows)


def test_debug_shows_where_it_happened(dense: Path, cli: Cli) -> None:
    code, out, err = cli("prune", dense, "-o", "out", "--method", "nonesuch", "--debug")
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert "criteria/__init__.py" in err
    assert err.splitlines()[-1].startswith("llmprune: unknown method 'nonesuch'")


@pytest.mark.parametrize("length", [23, 25])
def test_ready_windows_of_another_length_than_asked_for(
    length: int, dense: Path, tmp_path: Path, refused: Refused
) -> None:
    np.save(tmp_path / "windows.npy", TOKENS)
    for command in (("prune", dense, "-o", "out"), ("eval", dense)):
        said = refused(*command, "--dataset", tmp_path / "windows.npy", "--max-seq-length", length)
        assert f"holds windows of 24 tokens, which are used as they are: leave out --max-seq-length {length}" in said


def test_weights_without_a_place_are_named(dense: Path, text: Path, cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    """Not refused: checkpoints carry heads for training along. But never dropped without a word."""
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert cli("inspect", dense)[0] == 0
    assert re.search(r"no place for 9 of its weights \(model.layers.2", caplog.text)


def no_room_on_the_cpu(*_: object, **__: object) -> None:
    torch.empty(2**60)


def no_room_on_a_gpu(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has none.")


@pytest.mark.parametrize("fail", [no_room_on_the_cpu, no_room_on_a_gpu])
def test_no_memory_is_left(
    fail: Callable[..., None], dense: Path, text: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.structured.learning.gradients", fail)
    line = refused("prune", dense, "-o", "out", "--method", "maskprune", "--sparsity", 0.3, "--dataset", text,
                   "--nsamples", 9)  # fmt: skip
    assert "no memory is left" in line and "--checkpointing" in line


def test_other_trouble_is_not_taken_for_memory(
    dense: Path, text: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("llmprune.commands.prune", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli("prune", dense, "-o", "out", "--method", "magnitude", "--dataset", text)
