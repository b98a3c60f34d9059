"""How figures are called and written, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PLAIN, SHARE, BYTES, TIMES = "plain", "share", "bytes", "times"


@dataclass(frozen=True)
class Figure:
    """One kind of figure.

    Attributes:
        label: how it is called.
        better: 1 if more is better, -1 if less is, 0 if there is no telling.
        form: how it is written.
        relative: True if it depends on the model that was measured beside.
    """

    label: str
    better: int = 0
    form: str = PLAIN
    relative: bool = False


FIGURES = {
    "perplexity": Figure("perplexity", -1),
    "word_perplexity": Figure("word perplexity", -1),
    "byte_perplexity": Figure("byte perplexity", -1),
    "bits_per_byte": Figure("bits per byte", -1),
    "kl": Figure("KL to dense", -1, relative=True),
    "top1_agreement": Figure("same top token as dense", 1, SHARE, relative=True),
    "acc": Figure("acc", 1),
    "acc_norm": Figure("acc_norm", 1),
    "exact_match": Figure("exact match", 1),
    "f1": Figure("F1", 1),
    "repetition": Figure("repeated 4-grams of greedy text", 0, SHARE),
    "tokens_per_second": Figure("tokens/s"),  # of runs apart, whose difference may be the machine's; see speedup
    "peak_memory": Figure("peak memory", -1, BYTES),
    "speedup": Figure("speed relative to dense", 1, TIMES, relative=True),
}


def number(value: float | None, digits: int = 4) -> str:
    """A figure, or a dash where nothing was measured; thousands in full."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def write(value: float | None, form: str) -> str:
    """A measured figure; one that was measured and is not finite says so."""
    if value is None:
        return "not finite"
    if form == SHARE:
        return f"{value:.1%}"
    return size(value) if form == BYTES else f"{value:.2f}x" if form == TIMES else number(value)


def words(key: str, value: Any) -> str:
    """A setting of a protocol, as one says it."""
    if value is None:
        return f"no {key}"
    return f"{key.replace('_', ' ')} {value}"
