"""By what a file is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256_of_files(files: Iterable[Path]) -> str:
    """Of their contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


PROBE = "Hello, wOrld!  The 3 cats\n\tsat on a mat: 3.14 / \u00e9t\u00e9 \u4f60\u597d."


def fingerprint(tokenizer: Any) -> str:
    """Of a tokenizer's vocabulary and special tokens, and of what it makes of a text; however its files are written."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, tokenizer(PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
