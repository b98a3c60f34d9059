"""The exception for bad input, under the name by which this package's users know it, and how memory ends."""

from llmprune_eval.errors import InputError

__all__ = ["InputError", "memory_ran_out"]


def memory_ran_out(error: BaseException) -> bool:
    """True for what Python and torch raise when a device has no memory left; on a CPU torch has no class for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
