"""The one exception that means "your input is wrong", and how memory ends.

It lives in this leaf package because both the evaluation and the pruner raise it, and a leaf must not
import the trunk. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input from the user: one line that says what was given, what is wanted and what to do."""


def memory_ran_out(error: BaseException) -> bool:
    """True for what Python and torch raise when a device has no memory left; on a CPU torch has no class for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
