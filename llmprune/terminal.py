"""Printing, under the names by which this package's commands know it."""

from llmprune_eval.terminal import is_first, say

__all__ = ["is_first", "say"]
