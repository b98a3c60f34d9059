"""A tokenizer that anyone can check by eye: one token per character."""

from __future__ import annotations

import numpy as np

ALPHABET = "\0\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.=ö"


class Letters:
    """Token ids are places in ALPHABET; 0 starts a text if `bos`."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 0 if bos else None

    def __call__(self, text: str, return_tensors: str, verbose: bool) -> dict[str, np.ndarray]:
        assert return_tensors == "np" and not verbose
        return {"input_ids": np.array([([0] if self.bos_token_id == 0 else []) + self.ids(text)])}

    def ids(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def text(self, ids: list[int]) -> str:
        return "".join(ALPHABET[i] for i in ids)
