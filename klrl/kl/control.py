"""A measured scalar has a bound, and a coefficient answers the excess.

``Bound`` says what should hold, a coefficient (``Fixed`` or ``Banded``) moves once per update in answer to what was
measured, and ``Penalty`` puts the two into a loss. PPO's beta and its KL-driven learning rate are both ``Banded``.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

Scalar = TypeVar("Scalar", float, Tensor)


@dataclass(frozen=True)
class Bound:
    """``sign * (x - limit) <= 0``: at most ``limit`` for sign +1, at least ``limit`` for sign -1."""

    limit: float
    sign: int = 1

    def __post_init__(self) -> None:
        if math.isnan(self.limit):
            raise ValueError("limit must be a number, got nan")
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be +1 (at most) or -1 (at least), got {self.sign}")

    def excess(self, x: Scalar) -> Scalar:
        """By how much ``x`` breaks the bound; negative while it holds."""
        return self.sign * (x - self.limit)

    def holds(self, x: float) -> bool:
        """Whether ``x`` is within the bound. False for nan."""
        return self.excess(x) <= 0.0

    def scaled(self, factor: float) -> "Bound":
        """The same bound with its limit times ``factor``: "stop" is the KL bound scaled by 1.5, say."""
        return Bound(self.limit * factor, self.sign)


def at_most(limit: float) -> Bound:
    """The bound x <= limit, as for KL(old || new)."""
    return Bound(limit, 1)


def at_least(limit: float) -> Bound:
    """The bound x >= limit, as for an entropy."""
    return Bound(limit, -1)


class Coefficient(Protocol):
    """A positive number that answers a measurement once per update and resumes from its state."""

    @property
    def value(self) -> float: ...
    def adapt(self, measured: float, bound: Bound) -> None: ...
    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: dict[str, float]) -> None: ...


class Fixed:
    """A coefficient that never moves."""

    def __init__(self, value: float) -> None:
        self.value = _positive("value", value, zero_allowed=True)

    def adapt(self, measured: float, bound: Bound) -> None:
        """Nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class Banded:
    """Times ``factor`` above ``limit * high``, divided by it below ``limit * low``, always within ``[least, most]``.

    The default is PPO's adaptive KL penalty (Schulman et al. 2017, section 4: factor 2 outside 1.5). With a factor
    below 1 the same rule drives a learning rate: smaller when the KL was too large.
    A measurement that is nan or infinite counts as too large; the value is kept as a logarithm, so it cannot reach 0.
    """

    def __init__(
        self,
        value: float = 1.0,
        *,
        factor: float = 2.0,
        low: float = 1 / 1.5,
        high: float = 1.5,
        least: float = 1e-4,
        most: float = 1e4,
    ) -> None:
        _positive("least", least)
        if not (least <= value <= most < math.inf):
            raise ValueError(f"value must lie within [{least}, {most}], got {value}")
        if not (0.0 < low <= high):
            raise ValueError(f"low and high must satisfy 0 < low <= high, got {low} and {high}")
        self.factor, self.low, self.high = _positive("factor", factor), low, high
        self._range = (math.log(least), math.log(most))
        self._log_value = math.log(value)

    @property
    def value(self) -> float:
        return math.exp(self._log_value)

    def adapt(self, measured: float, bound: Bound) -> None:
        """Answer one update's measurement. ``bound`` is an upper bound above zero, as every KL bound is."""
        step = math.log(self.factor)
        if measured < bound.limit * self.low:
            step = -step
        elif measured <= bound.limit * self.high:
            return
        lowest, highest = self._range
        self._log_value = min(max(self._log_value + step, lowest), highest)

    def state_dict(self) -> dict[str, float]:
        return {"log_value": self._log_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log_value = state["log_value"]


@dataclass
class Penalty:
    """A bound and the coefficient that enforces it in a loss: ``loss + penalty.term(kl.mean())``."""

    bound: Bound
    coefficient: Coefficient

    def term(self, x: Tensor) -> Tensor:
        """What to add to a loss that is minimised: the coefficient times x, or times -x for a lower bound."""
        return (self.coefficient.value * self.bound.sign) * x

    def adapt(self, measured: float) -> None:
        """Answer the measurement of a whole update. Call it once per update, never inside the loss."""
        self.coefficient.adapt(measured, self.bound)


def _positive(name: str, value: float, zero_allowed: bool = False) -> float:
    if not (math.isfinite(value) and (value > 0 or (zero_allowed and value == 0))):
        raise ValueError(f"{name} must be finite and {'at least' if zero_allowed else 'above'} 0, got {value}")
    return value
