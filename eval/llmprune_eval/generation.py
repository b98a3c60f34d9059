"""A smoke test that reads like one: what a model writes after a few prompts, and how much it repeats itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from llmprune_eval.errors import InputError
from llmprune_eval.evaluate import evaluating
from llmprune_eval.result import Part
from llmprune_eval.wanted import Opened, Reference, Wanted
from llmprune_eval.windows import model_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROMPTS = (
    "Once upon a time, there was a little girl who",
    "The most important thing about a good friend is",
    "One day, the old man opened the door and",
    "In the morning, the first thing we did was",
)
"""What is continued where the user names no prompt."""
NGRAM = 4
NEW_TOKENS = 64


def repetition(tokens: list[int], n: int = NGRAM) -> float | None:
    """Share of a text's n-grams that it has seen before: 1 - distinct / all, "seq-rep-n" of arXiv 1908.04319.

    Returns:
        In [0, 1), or None for a text of fewer than n tokens, which has no n-gram.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@dataclass(frozen=True)
class Generation:
    """Greedy continuations of some prompts."""

    opened: Opened
    wanted: Wanted
    reference: Reference
    kind = "generation"
    name = "greedy continuations"

    @property
    def asked(self) -> dict[str, Any]:
        """The whole protocol."""
        return {
            "prompts": list(self.wanted.prompts),
            "max_new_tokens": self._new_tokens(max(len(self._encode(p)) for p in self.wanted.prompts)),
            "decoding": "greedy",
            "repetition": f"1 - distinct / all {NGRAM}-grams of tokens, mean over continuations",
            "dtype": self.opened.dtype,
            "tokenizer_sha256": self.opened.tokenizer_sha256,
            "against": self.wanted.against,
            "against_sha256": self.reference.sha256,
        }

    def measure(self) -> list[Part]:
        """The part on the first process, nothing on the others.

        Raises:
            InputError: no tokenizer, an empty prompt, or no room behind it.
        """
        asked = self.asked
        if not PartialState().is_main_process:
            return []
        start = time.perf_counter()
        values, samples = self._all(self.opened.model, asked["max_new_tokens"])
        if self.reference.model is not None:
            dense, texts = self._all(self.reference.model, asked["max_new_tokens"])
            values |= {f"dense_{name}": value for name, value in dense.items()}
            samples = [{**own, "dense_text": their["text"]} for own, their in zip(samples, texts, strict=True)]
        seconds = time.perf_counter() - start
        return [Part(self.kind, self.name, asked, values, samples=samples, seconds=seconds)]

    def _all(self, model: PreTrainedModel, new_tokens: int) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        """What a model writes after every prompt, with the means over all."""
        with evaluating(model):
            samples = [
                self._continued(model, prompt, new_tokens)
                for prompt in tqdm(self.wanted.prompts, desc="generating", disable=None, leave=False)
            ]
        rates = [sample["repetition"] for sample in samples if sample["repetition"] is not None]
        values = {
            "repetition": fmean(rates) if rates else None,
            "tokens": fmean(sample["tokens"] for sample in samples),
        }
        return values, samples

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self.opened.required_tokenizer()(prompt)["input_ids"]
        if not ids:
            raise InputError(f"the prompt {prompt!r} has no tokens: give one with text in it")
        return ids

    def _new_tokens(self, longest: int) -> int:
        """How many tokens are written at most after prompts of up to `longest` tokens."""
        positions, asked = model_positions(self.opened.model), self.wanted.max_new_tokens
        room = asked or NEW_TOKENS if positions is None else positions - longest
        if room < (asked or 1):
            raise InputError(
                f"a prompt of {longest} tokens and {asked or 1} new ones exceed the model's {positions} positions: "
                "give shorter prompts or a smaller --max-new-tokens"
            )
        return asked or min(NEW_TOKENS, room)

    @torch.no_grad()
    def _continued(self, model: PreTrainedModel, prompt: str, new_tokens: int) -> dict[str, Any]:
        tokenizer = self.opened.required_tokenizer()
        ids = torch.tensor([self._encode(prompt)], device=next(model.get_input_embeddings().parameters()).device)
        generate: Any = model.generate
        written = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,  # this and the next three: whatever the checkpoint's own generation config says
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=tokenizer.pad_token_id or 0,
        )[0, ids.shape[1] :].tolist()
        text: str = tokenizer.decode(written, skip_special_tokens=True)
        return {"prompt": prompt, "text": text, "tokens": len(written), "repetition": repetition(written)}
