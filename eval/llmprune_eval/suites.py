"""Named sets of measurements, as papers report them."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune_eval.errors import InputError


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval, and the text that perplexity is computed on."""

    tasks: tuple[str, ...]
    dataset: str


SUITES = {
    # Sun et al., arXiv 2306.11695: zero-shot accuracy is the mean of acc over these seven
    "wanda": Suite(("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), "wikitext2"),
}


def suite(name: str) -> Suite:
    """Raise InputError for a name of none."""
    if name not in SUITES:
        raise InputError(f"suite '{name}' is unknown: use one of {', '.join(SUITES)}")
    return SUITES[name]
