"""The two kinds of failure that klrl names itself."""


class UsageError(ValueError):
    """Bad input. The message is one line that names the option and what would do; the command exits with 2."""


class NonFiniteError(ArithmeticError):
    """A nan or infinity where training cannot go on. The message names where it was found."""
