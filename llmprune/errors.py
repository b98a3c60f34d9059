"""The exception for bad input, under the name by which this package's users know it."""

from llmprune_eval.errors import InputError

__all__ = ["InputError"]
