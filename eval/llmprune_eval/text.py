"""Where text comes from, and how it becomes windows of tokens. Used to calibrate and to evaluate.

A dataset is named in one of three ways: FILE (.txt, .jsonl with a field "text", .parquet with a column
"text"), NAME (c4, wikitext2, or owner/name on the Hub), or NAME:FILE, which reads a local copy under the
named dataset's protocol. Windows are always full; no padding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune_eval.errors import InputError
from llmprune_eval.hashing import sha256_of_files
from llmprune_eval.hub import HubTexts

SUFFIXES = (".txt", ".jsonl", ".parquet")
CHARACTERS_PER_TOKEN = 40
"""Text is read until there are this many characters for each wanted token, and at least MINIMUM_CHARACTERS."""
MINIMUM_CHARACTERS = 16_000_000


@dataclass(frozen=True)
class Protocol:
    """How the papers use a dataset.

    Attributes:
        joiner: put between the texts before tokenising.
        cuts: True if every window is a random cut of one text longer than the window, instead of a piece of
            all texts joined.
        lines: True if every line of a local .txt is one text (WikiText's own layout).
        hub: arguments of datasets.load_dataset for "train" and "test", or None for a local file.
    """

    joiner: str = "\n"
    cuts: bool = False
    lines: bool = False
    hub: dict[str, dict[str, Any]] | None = None


NAMED = {
    "c4": Protocol(
        cuts=True,
        hub={
            "train": {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train",
            },
            "test": {
                "path": "allenai/c4",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
            },
        },
    ),
    "wikitext2": Protocol(
        joiner="\n\n",
        lines=True,
        hub={
            split: {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split}
            for split in ("train", "test")
        },
    ),
}


@dataclass(frozen=True)
class TextSource:
    """An opened dataset: its texts, lazily, and the protocol that they are used by; a file, or a split on the Hub."""

    name: str
    protocol: Protocol
    texts: Iterable[str]
    file: Path | None = None
    split: str | None = None

    def revision(self) -> str | None:
        """SHA-256 of the file, or the Hub's commit; None if a cache does not know of which commit it is."""
        return sha256_of_files([self.file]) if self.file is not None else getattr(self.texts, "commit", None)

    def read(self, tokens: int) -> list[str]:
        """Texts in order, enough for about `tokens` tokens; all of them where there are fewer."""
        limit = max(MINIMUM_CHARACTERS, CHARACTERS_PER_TOKEN * tokens)
        taken, characters = [], 0
        for text in self.texts:
            taken.append(text)
            characters += len(text)
            if characters >= limit:
                break
        if not any(text.strip() for text in taken):
            raise InputError(f"{self.name} holds no text: give a file with text in it")
        return taken

    def describe(self) -> dict[str, Any]:
        """For a result file."""
        how = "random cuts of single texts" if self.protocol.cuts else "texts joined, then cut"
        return {"dataset": self.name, "joiner": self.protocol.joiner, "windows": how}


def open_text(spec: str, split: str) -> TextSource:
    """Open FILE, NAME or NAME:FILE. `split` ("train" or "test") matters to Hub names only.

    Raises:
        InputError: it does not exist, cannot be read, or cannot be reached.
    """
    name, _, path = spec.partition(":")
    if name in NAMED and path:
        return TextSource(spec, NAMED[name], _read_file(Path(path), NAMED[name].lines), Path(path))
    if os.path.exists(spec) or spec.endswith((*SUFFIXES, ".npy", ".json", ".csv")):
        return TextSource(spec, Protocol(), _read_file(Path(spec), False), Path(spec))
    if spec in NAMED:
        hub = NAMED[spec].hub
        assert hub is not None
        return TextSource(spec, NAMED[spec], HubTexts(spec, hub[split]), split=hub[split]["split"])
    if "/" in spec and not spec.startswith((".", "/", "~")) and spec.count("/") == 1:
        return TextSource(spec, Protocol(), HubTexts(spec, {"path": spec, "split": split}), split=split)
    raise InputError(
        f"dataset '{spec}' does not exist: give a {', '.join(SUFFIXES)} or .npy file, or one of "
        f"{', '.join(NAMED)}, or owner/name on the Hub"
    )


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Token ids [n] int64 of a text, with the special tokens that the tokenizer adds by itself."""
    encoded = tokenizer(text, return_tensors="np", verbose=False)["input_ids"]
    return torch.from_numpy(encoded[0]).long()


def joined_windows(texts: Iterable[str], joiner: str, tokenizer: Any, length: int) -> Tensor:
    """Join, tokenise once, cut into consecutive windows [n, length]; the rest at the end is dropped."""
    ids = token_ids(tokenizer, joiner.join(texts))
    count = len(ids) // length
    return ids[: count * length].view(count, length)


def _read_file(path: Path, lines: bool) -> Iterator[str]:
    if not os.path.isfile(path):
        raise InputError(f"dataset '{path}' does not exist or is no file: give a path to a {', '.join(SUFFIXES)} file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is of an unknown kind: use {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: give a file with text in it")
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    return reader(path, lines)


def _read_txt(path: Path, lines: bool) -> Iterator[str]:
    try:
        if not lines:
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                # The Hub's WikiText rows: a line with its line feed, an empty string for a blank one.
                yield line if line.strip() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): convert it to UTF-8") from error


def _read_jsonl(path: Path, lines: bool) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): convert it to UTF-8") from error


def _text_of(line: str, where: str) -> str:
    """The field "text" of one line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise InputError(f'{where} is broken JSON ({reason}): every line must look like {{"text": "..."}}') from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no string field "text": every line must look like {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair: repair the line or drop it") from error
    return text


def _read_parquet(path: Path, lines: bool) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise InputError(f'{path} has no column "text" but {file.schema_arrow.names}: rename the column')
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise InputError(f'{path} holds {type(text).__name__} in its column "text": strings are wanted')
                if text is not None:
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}): write or download it again") from error
