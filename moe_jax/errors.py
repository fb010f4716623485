"""The one exception for mistakes a user can mend.

Commands print its message without a stack trace and exit with status 2. The
message says what is wrong, where, which rule it breaks, and how to mend it.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a flag, a config value, a file, a checkpoint."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest choice, or `""`."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
