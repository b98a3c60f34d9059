"""Formats of sparse weights. A leaf: it needs torch and knows nothing of how a model was pruned."""

from llmprune_kernels.format import obeys, violation

__all__ = ["obeys", "violation"]
