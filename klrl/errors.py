"""The exceptions that klrl raises, and those of others as one line that says what would do."""

import contextlib
import signal
from collections.abc import Iterator

# Those that end a run once it is saved. A closing terminal sends SIGHUP, which Windows does not have.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


LOST = 75
"""The exit code of a rank that ends because another one did."""


class UsageError(ValueError):
    """Bad input. The message is one line that names the option and what would do; the command exits with 2."""


class NonFiniteError(ArithmeticError):
    """A nan or infinity where training cannot go on. The message names where it was found."""


class SkippedUpdateError(NonFiniteError):
    """An update that met a nan or infinity: the agent is what it was before it, and may go on with other data."""


class EnvironmentFailedError(RuntimeError):
    """An environment, or the process it runs in, failed. The message names which and when."""


class RankLostError(RuntimeError):
    """What was to be reduced over all ranks could not be: another one ended, or did not come in time."""


class RanksDifferError(RuntimeError):
    """Ranks that should have the same weights do not."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP, after the run was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@contextlib.contextmanager
def needs(extra: str, module: str) -> Iterator[None]:
    """Raise UsageError, which says how to get ``extra``, where an import inside finds no ``module``."""
    try:
        yield
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != module:
            raise
        raise UsageError(f'this needs {module}: pip install "klrl[{extra}]"') from None


@contextlib.contextmanager
def refusals(what: str, advice: str = "") -> Iterator[None]:
    """Raise UsageError, which begins with ``what``, where the system refuses what the block asks of it."""
    try:
        yield
    except OSError as problem:
        raise UsageError(f"{what}: {problem.strerror or problem}{advice}") from None


def one_line(problem: BaseException) -> str:
    """The exception's type and message."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())
