"""Prefill and decode of models beside each other, in turns: what disturbs the machine disturbs all of them.

Prefill reads a prompt and fills the key/value cache; decode writes tokens one by one on that cache, greedily and
without an early end. Whoever compares two models takes the ratio within a turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmprune_eval.captured import captured
from llmprune_eval.errors import InputError
from llmprune_eval.result import Part
from llmprune_eval.windows import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Clock = Callable[[], float]
Peaks = dict[str, int]
"""Peak memory in bytes, by name of ACTIONS."""


@dataclass(frozen=True)
class Load:
    """What every model has to do: read `prompt` tokens at once, then write `new_tokens`, of `batch_size` sequences.

    With `graph` each token is written by replaying one CUDA graph.
    """

    batch_size: int
    prompt: int
    new_tokens: int
    graph: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for numbers below 1."""
        for name in ("batch_size", "prompt", "new_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name.replace('_', ' ')} is {value}: at least 1 is needed")

    def protocol(self) -> dict[str, Any]:
        """What the protocol says of it."""
        facts = asdict(self)
        return facts | {"graph": "one CUDA graph per step, static cache"} if facts.pop("graph") else facts

    def check(self, positions: int | None) -> None:
        """Raise InputError for more tokens than a model has positions for; None is no end."""
        if positions is not None and self.prompt + self.new_tokens > positions:
            raise InputError(
                f"{self.prompt} tokens of prompt and {self.new_tokens} new ones exceed the model's {positions} "
                "positions: pass a smaller --prompt or --new-tokens"
            )

    def work(self, name: str) -> int:
        """Tokens that an action reads or writes, of all sequences."""
        return self.batch_size * {"prefill": self.prompt, "decode": self.new_tokens}[name]

    def tokens(self, model: PreTrainedModel) -> Tensor:
        """Random token ids [batch_size, prompt] on the model's device, the same for all models of a vocabulary."""
        shape, generator = (self.batch_size, self.prompt), torch.Generator().manual_seed(0)
        return torch.randint(vocabulary_size(model), shape, generator=generator).to(model.device)


@torch.no_grad()
def prefill(model: PreTrainedModel, load: Load, clock: Clock = time.perf_counter) -> float:
    """Seconds to read the prompts; the model must be in eval mode."""
    tokens = load.tokens(model)
    start = _now(model, clock)
    model(input_ids=tokens, use_cache=True)
    return _now(model, clock) - start


@torch.no_grad()
def decode(model: PreTrainedModel, load: Load, clock: Clock = time.perf_counter) -> float:
    """Seconds to write the new tokens, once the prompts have been read; the model must be in eval mode.

    Raises:
        InputError: the model keeps no key/value cache, or its step cannot be captured.
    """
    tokens = load.tokens(model)
    steps = captured(model, tokens, load.new_tokens) if load.graph else greedy(model, tokens)
    with torch.cuda.device_of(tokens):
        next(steps)
        start = _now(model, clock)
        for _ in range(load.new_tokens):
            next(steps)
        return _now(model, clock) - start


ACTIONS = {"prefill": prefill, "decode": decode}
"""What is timed, by the name of its Part."""


def greedy(model: PreTrainedModel, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the likeliest next tokens [batch, 1] for ever, the first after reading token ids [batch, prompt]."""
    given = tokens
    cache, seen = None, torch.ones_like(given)
    while True:
        output = model(input_ids=given, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise InputError(f"{type(model).__name__} keeps no key/value cache, so that its decoding cannot be timed")
        given = output.logits[:, -1:].argmax(-1)
        seen = torch.cat([seen, torch.ones_like(given)], dim=1)
        yield given


def _now(model: PreTrainedModel, clock: Clock) -> float:
    """The time, once the model's device has done all that it was given."""
    if model.device.type != "cpu":
        getattr(torch, model.device.type).synchronize(model.device)
    return clock()


def alternate(
    measures: Sequence[Callable[[], float]], turns: int, done: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Seconds [turns][measures], every turn one of each in order, after one of each to warm up.

    Args:
        done: called after each of them.
    """
    rows = []
    for _ in range(turns + 1):
        row = []
        for measure in measures:
            row.append(measure())
            done()
        rows.append(row)
    return rows[1:]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile, between values where they fall there."""
    median, low, high = np.percentile(values, [50, 10, 90])
    return float(median), float(low), float(high)


def speedups(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of seconds [turns][ours, dense]: how many times as fast ours is, turn by turn."""
    return [dense / ours for ours, dense in rows]


def figures(rows: Sequence[Sequence[float]], work: int) -> dict[str, float | None]:
    """The values of a Part from seconds [turns][ours] or [turns][ours, dense] for so many tokens each."""
    rate, low, high = spread([work / row[0] for row in rows])
    values: dict[str, float | None] = {"tokens_per_second": rate, "p10": low, "p90": high}
    if len(rows[0]) > 1:
        ratio, low, high = spread(speedups(rows))
        dense, *_ = spread([work / row[1] for row in rows])
        values |= {"speedup": ratio, "speedup_p10": low, "speedup_p90": high, "dense_tokens_per_second": dense}
    return values


def measure_speed(
    models: Sequence[PreTrainedModel],
    load: Load,
    turns: int,
    peaks: Sequence[Peaks],
    facts: dict[str, Any],
    *,
    clock: Clock = time.perf_counter,
) -> Iterator[Part]:
    """Prefill and decode of one model, or of one and the dense one that it is compared with.

    Args:
        models: one or two, in eval mode, on the same device.
        peaks: memory of each under this load, as `llmprune_eval.peaks` finds it.
        facts: what the protocol says besides: against what, and how memory was measured.

    Raises:
        InputError: as `decode`.
    """
    protocol = {
        **load.protocol(),
        "turns": turns,
        "tokens": "random, the same for all",
        "measure": "tokens of all sequences over seconds, one turn to warm up, models in turn; median, 10th and 90th "
        "percentile; speed-up: of the ratios within a turn",
        "device": str(models[0].device),
        "dtype": str(models[0].dtype).removeprefix("torch."),
        "attention": models[0].config._attn_implementation,
        **facts,
    }
    for name, action in ACTIONS.items():
        begun = time.perf_counter()
        measures = [partial(action, model, load, clock) for model in models]
        with tqdm(total=(turns + 1) * len(models), desc=f"{name}, batch {load.batch_size}", disable=None,
                  leave=False) as bar:  # fmt: skip
            rows = alternate(measures, turns, bar.update)
        held = dict(zip(("peak_memory", "dense_peak_memory"), (peak[name] for peak in peaks), strict=False))
        values = {**figures(rows, load.work(name)), **held}
        columns = ("seconds", "dense_seconds")
        samples = [{"turn": i, **dict(zip(columns, row, strict=False))} for i, row in enumerate(rows, start=1)]
        yield Part("speed", name, protocol, values, samples=samples, seconds=time.perf_counter() - begun)
