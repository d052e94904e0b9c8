"""The one exception that is shown without a traceback. It stands alone, so that a worker need not import JAX."""


class UserError(Exception):
    """Something the user can put right; shown as its message alone."""
