"""The exception for errors of the user, and the suggestion in its message. Importing it does not import JAX."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct. The program prints its message without a traceback."""


def nearest(value: object, allowed: Iterable[str]) -> str:
    """The most similar of the allowed names, of which there must be at least one."""
    return difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.0)[0]
