"""The one exception that means "your input is wrong".

It lives in this leaf package because both the evaluation and the pruner raise it, and a leaf must not
import the trunk. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input from the user: one line that says what was given, what is wanted and what to do."""
