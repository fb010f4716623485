"""The exceptions that are shown as one message, without a stack trace.

`UserError` is for mistakes a user can mend; commands exit with status 2. The message
says what is wrong, where, which rule it breaks, and how to mend it.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a flag, a config value, a file, a checkpoint."""


class RunError(Exception):
    """A run that cannot go on, for no mistake in its input: exit status 1.

    Shown like a `UserError`, without a stack trace.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest choice, or `""`."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
