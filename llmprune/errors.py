"""The exception for bad input, and how memory ends, under the names by which this package's users know them."""

from llmprune_eval.errors import InputError, memory_ran_out

__all__ = ["InputError", "memory_ran_out"]
