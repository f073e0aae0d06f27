"""What a buffer is to agents, the training loop and checkpoints, and which observation a step led to."""

from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AutoresetMode
from torch import Tensor

from klrl.errors import UsageError
from klrl.policies.encoder import replace_rows


class Buffer(Protocol):
    """Steps of ``n_envs`` environments: what they said, and nothing that an agent thinks of it."""

    n_envs: int
    size: int = 0
    """Rows that it holds and that a checkpoint keeps in files of their own, as they are many."""
    steps: int = 0
    """Environment steps that it has taken."""
    written: int = 0
    """Such rows that were ever written; the last ``size`` are held."""

    def add(
        self, obs: Any, action: Any, reward: Any, terminated: Any, truncated: Any, next_obs: Any, final_obs: Any = None
    ) -> None:
        """Take one step of all N environments: obs and next_obs [N, *shape] or dicts of such; action as the agent's
        ``act`` gave it; the others [N]. ``final_obs``: see ``led_to``."""

    def check_finite(self) -> None:
        """Raise NonFiniteError naming field, environment and step of what was added and is not finite."""

    def forget_unfinished(self) -> None:
        """Drop what was begun and cannot be ended, as the environments begin anew."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the rows."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s result."""

    def rows(self, start: int) -> dict[str, Tensor]:
        """The rows from the ``start``-th ever written, oldest first, for ``put_rows``."""
        return {}

    def put_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Store what ``rows`` gave. Raises ValueError where it is of other spaces."""
        if rows:
            raise ValueError("this buffer keeps no rows of its own")

    def take_over(self, rows: dict[str, Tensor], which: slice) -> None:
        """Append those rows of another buffer, as its ``rows`` gave them. Raises ValueError where it keeps none."""
        raise ValueError("this buffer keeps no rows of its own")


def numbers(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """``values`` as an array of numbers. Raises UsageError unless it has that shape, where NumPy would broadcast."""
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.shape != shape:
        raise UsageError(f"{name} has shape {array.shape}, expected {shape}: the buffer holds {shape[0]} environments")
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{name} is of type {array.dtype}, expected numbers")
    return array


def flags(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """``values`` as an array of truth values. Raises UsageError for what is neither these nor zeros and ones."""
    if type(values) is np.ndarray and values.dtype == np.bool_ and values.shape == shape:
        return values
    array = numbers(name, values, shape)
    if array.dtype.kind == "b":
        return array
    if not np.isin(array, (0, 1)).all():
        raise UsageError(f"{name} is {array.tolist()}, expected True or False for each environment")
    return array.astype(np.bool_)


def autoreset_mode(mode: Any) -> AutoresetMode:
    """The mode, or that of which ``mode`` is the value. Raises UsageError for anything else."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        known = ", ".join(repr(one.value) for one in AutoresetMode)
        raise UsageError(f"autoreset must be an AutoresetMode or one of {known}, got {mode!r}") from None


def check_continues(shown: Any, obs: Any, ended: Any) -> None:
    """Raise ValueError where the rows ``ended`` of ``obs`` [N, ...] are not what was ``shown`` last.

    Under NEXT_STEP they are; else these environments were reset, and a true step would be taken for one that resets.
    """
    if isinstance(shown, dict):
        for key, part in shown.items():
            check_continues(part, obs[key], ended)
        return
    before = np.asarray(shown)[ended]
    if not np.array_equal(before, np.asarray(obs)[ended].astype(before.dtype), equal_nan=before.dtype.kind == "f"):
        raise ValueError(
            "an episode ended, and the next step begins elsewhere, which autoreset 'NextStep' does not: make the "
            "buffer with autoreset='Disabled' where you reset by hand, with 'SameStep' where a step does; after a "
            "reset of all environments, call forget_unfinished()"
        )


def led_to(mode: AutoresetMode, next_obs: Any, ended: Any, final_obs: Any) -> Any:
    """The observations [N, ...] that a step led to, whatever its environments do at an episode's end.

    NEXT_STEP shows the final observation and resets in the next step; DISABLED shows it and is reset by hand; both are
    ``next_obs``. SAME_STEP has reset already, and gives the final ones apart, in ``info["final_obs"]``.
    Raises ValueError where ``final_obs`` is missing, or given where there is none.
    """
    if (mode is AutoresetMode.SAME_STEP) != (final_obs is not None) and np.any(ended):
        missing = "give final_obs=info['final_obs']" if final_obs is None else "no final_obs goes with it"
        raise ValueError(f"an episode ended, and the buffer was made with autoreset {mode.value!r}: {missing}")
    return next_obs if final_obs is None else replace_rows(next_obs, final_obs, np.flatnonzero(ended))
