"""Models, texts and token files with one thing wrong each, and what must be said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Change = Callable[[Path], None]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: "w1" is 1, ..., "w96" is 96, anything else 0."""
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words(count: int, seed: int = 0) -> str:
    """Random text for `word_tokenizer`."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, count)
    return " ".join(f"w{i}" for i in ids)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything under a folder: the bytes of files, where links lead, and that a folder is there."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def _config(**changes: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _weight(name: str, edit: Callable[[torch.Tensor], Any]) -> Change:
    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        edit(state[name])
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def _entry(value: float) -> Callable[[torch.Tensor], None]:
    def edit(weight: torch.Tensor) -> None:
        weight.view(-1)[3] = value

    return edit


def _write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def _delete(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _halve(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _drop_tensor(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _shard(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / WEIGHTS).unlink()
    assert (folder / INDEX).is_file()


def _drop_shard(folder: Path) -> None:
    _shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _drop_index(folder: Path) -> None:
    _shard(folder)
    (folder / INDEX).unlink()


def _spoil_index(folder: Path) -> None:
    _shard(folder)
    (folder / INDEX).write_text("[]")


def _bert(folder: Path) -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)


def _t5(folder: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


SPOILED: dict[str, tuple[Change, str]] = {
    "without config": (_delete("config.json"), "has no config.json: give a folder"),
    "with a config that is no JSON": (_write("config.json", '{"model_type": '), "cannot be opened .*JSON"),
    "with a config that is a list": (_write("config.json", "[1]"), "cannot be opened .*config.json"),
    "with a quantization_config that is a word": (
        _config(quantization_config="llmprune"), "quantization_config is 'llmprune', not a table"),
    "with a quantization_config that is a list": (
        _config(quantization_config=["llmprune"]), r"quantization_config is \['llmprune'\], not a table"),
    "of unknown type": (_config(model_type="nonesuch"), "cannot be opened .*nonesuch"),
    "whose code would have to run": (
        _config(model_type="nonesuch", auto_map={"AutoConfig": "configuration_x.X"}), "cannot be opened .*custom code",
    ),
    "of impossible sizes": (_config(num_attention_heads=5), "cannot be opened .*not a multiple"),
    "of a size in words": (_config(hidden_size="wide"), "cannot be opened .*hidden_size.*wide"),
    "of unknown activation": (_config(hidden_act="nonesuch"), "cannot be opened .*nonesuch"),
    "quantised": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised: prune the original"),
    "that is an encoder": (_bert, "is a BertForMaskedLM, no causal language model"),
    "that is an encoder-decoder": (_t5, r"is an encoder-decoder model \(t5\)"),
    "without weights": (_delete(WEIGHTS), "holds no weights: model.safetensors is missing"),
    "with truncated weights": (_halve, "truncated or damaged .*download it again"),
    "with empty weights": (_write(WEIGHTS, ""), "truncated or damaged .*download it again"),
    "as a pickle": (_pickle, r"holds its weights as a pickle \(pytorch_model.bin\).*convert it to safetensors"),
    "without a tensor": (_drop_tensor, r"does not hold model.layers.1.mlp.up_proj.weight .*\(1 such"),
    "with too few layers": (_config(num_hidden_layers=4), r"does not hold model.layers.3.*\(9 such"),
    "of other shapes": (_config(intermediate_size=72), r"does not hold model.layers.0.mlp.down_proj.weight .*\(9 such"),
    "without a shard": (_drop_shard, r"lacks model-00002-of-\d+.safetensors \(1 of \d+ shards\)"),
    "without the index": (_drop_index, "neither model.safetensors nor model.safetensors.index.json"),
    "with a damaged index": (_spoil_index, "index.json is damaged .*download it again"),
    "with NaN": (_weight("model.layers.1.mlp.up_proj.weight", _entry(torch.nan)), "1.mlp.up_proj.weight holds NaN"),
    "with infinity": (_weight("model.norm.weight", _entry(torch.inf)), "model.norm.weight holds NaN or infinity"),
    "with a damaged tokenizer": (_write("tokenizer.json", '{"a"'), "the tokenizer of .* cannot be opened .*copy"),
    "with a tokenizer of another schema": (
        _write("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}'), "tokenizer of .* cannot be opened",
    ),
    "with half a tokenizer": (_delete("tokenizer.json"), "the tokenizer of .* cannot be opened .*copy"),
}  # fmt: skip
"""What is done to a good model folder with a tokenizer, and a pattern for the message."""

OVERFLOWING: dict[str, tuple[Change, str]] = {
    "in a norm": (
        _weight("model.layers.1.input_layernorm.weight", lambda w: w.fill_(3e38)),
        "activations that enter model.layers.1.self_attn.q_proj are not finite",
    ),
    "in a block": (
        _weight("model.layers.1.mlp.down_proj.weight", lambda w: w.fill_(3e38)),
        "the output of model.layers.1 is not finite",
    ),
    "in the last block": (
        _weight("model.layers.2.mlp.down_proj.weight", lambda w: w.fill_(3e38)),
        "the output of model.layers.2 is not finite",
    ),
    "in the head": (_weight("lm_head.weight", lambda w: w.mul_(1e38)), "loss on the held-out windows is not finite"),
}
"""Models whose weights are finite and whose activations are not."""


def _text(name: str, content: str | bytes) -> tuple[str, Change]:
    raw = content.encode() if isinstance(content, str) else content
    return name, lambda path: path.write_bytes(raw) and None


def _parquet(column: str, values: list[Any], damage: Callable[[bytes], bytes] = bytes) -> tuple[str, Change]:
    def write(path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
        path.write_bytes(damage(path.read_bytes()))

    return "text.parquet", write


def _array(values: Any, damage: Callable[[bytes], bytes] = bytes) -> tuple[str, Change]:
    def write(path: Path) -> None:
        np.save(path, values, allow_pickle=True)
        path.write_bytes(damage(path.read_bytes()))

    return "windows.npy", write


def _zip(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, windows=TOKENS)


def _with(value: int) -> Any:
    tokens = TOKENS.copy()
    tokens[2, 3] = value
    return tokens


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 24))

BAD_DATA: dict[str, tuple[tuple[str, Change], str]] = {
    "empty": (_text("a.txt", ""), "a.txt is empty: give a file with text"),
    "empty lines of JSON": (_text("a.jsonl", ""), "a.jsonl is empty"),
    "white space": (_text("a.txt", " \n\n \t"), "a.txt holds no text"),
    "short": (_text("a.txt", words(63)), "less than one window of 64 tokens: give more text, or a smaller"),
    "of unknown kind": (_text("a.csv", words(99)), "a.csv is of an unknown kind: use .txt, .jsonl, .parquet"),
    "no UTF-8": (_text("a.txt", b"caf\xe9"), "a.txt cannot be read as UTF-8 text .*0xe9.*convert it"),
    "lines of no UTF-8": (_text("a.jsonl", b'{"text": "caf\xe9"}'), "a.jsonl cannot be read as UTF-8 .*convert it"),
    "without text": (_text("a.jsonl", '{"text": "w1"}\n{"body": "w1"}\n'), r'line 2 has no string field "text"'),
    "no objects": (_text("a.jsonl", '{"text": "w1"}\n\n[1]\n'), r'a.jsonl, line 3 has no string field "text"'),
    "a broken line": (_text("a.jsonl", '{"text": "w1"}\n{"text": "w'), r"line 2 is broken JSON \(Unterminated"),
    "a bottomless line": (_text("a.jsonl", "[" * 100_000), "a.jsonl, line 1 is broken JSON"),
    "half a character": (_text("a.jsonl", r'{"text": "w1 \ud83d"}'), "a.jsonl, line 1 holds half of a surrogate pair"),
    "truncated parquet": (_parquet("text", [words(99)], lambda b: b[:-20]), "text.parquet cannot be read as parquet"),
    "spoiled parquet": (
        _parquet("text", [words(999)], lambda b: b[:50] + b"\xff" * 400 + b[450:]), "cannot be read as parquet",
    ),
    "another column": (_parquet("body", ["w1"]), r"""has no column "text" but \['body'\]: rename"""),
    "numbers for text": (_parquet("text", [1, 2]), 'holds int in its column "text": strings are wanted'),
    "no rows": (_parquet("text", []), "holds no text"),
    "floats": (_array(TOKENS / 2), r"float64 \(5, 24\) was given, integer token ids \[n, seqlen\] are wanted"),
    "one dimension": (_array(TOKENS[0]), r"int64 \(24,\) was given, integer token ids \[n, seqlen\] are wanted"),
    "pickled objects": (_array(np.array([[1, "a"]], dtype=object)), "cannot be read as .npy .*objects.*numpy.save"),
    "truncated array": (_array(TOKENS, lambda b: b[:-100]), "cannot be read as .npy .*numpy.save"),
    "truncated header": (_array(TOKENS, lambda b: b[:40]), "cannot be read as .npy .*numpy.save"),
    "spoiled header": (_array(TOKENS, lambda b: b[:10] + b'{"""' + b[14:]), "cannot be read as .npy .*numpy.save"),
    "no array": (_text("a.npy", words(99)), "cannot be read as .npy .*numpy.save"),
    "a zip of arrays": (("a.npy", _zip), "cannot be read as .npy .*numpy.save"),
    "no windows": (_array(TOKENS[:0]), r"windows of shape \(0, 24\)"),
    "windows of one token": (_array(TOKENS[:, :1]), r"windows of shape \(5, 1\)"),
    "long windows": (_array(np.ones((2, 65), int)), "windows of 65 tokens exceed the model's 64 positions"),
    "ids too large": (_array(_with(97)), "token ids from 0 to 97, but the model's vocabulary ends at 96"),
    "negative ids": (_array(_with(-1)), "token ids from -1 to 96, but the model's vocabulary ends at 96"),
}  # fmt: skip
"""File name with what writes it, and a pattern for the message."""
