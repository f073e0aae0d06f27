"""A measured scalar has a bound, and a coefficient answers the excess.

``Bound`` says what should hold, a coefficient (``Fixed``, ``Adaptive``, ``Dual``, ``Annealed``) moves once per update
in answer to what was measured, and ``Penalty`` puts the two into a loss. PPO's beta and its KL-driven learning rate are
both ``Adaptive``; a temperature held by an entropy at least so large is a ``Dual``.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, TypeVar

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
        self.value = _positive("value", _number(state, "value"), zero_allowed=True)


class Adaptive:
    """Times ``factor`` above ``limit * high``, times ``shrink`` (1 / factor) below ``limit * low``, within a range.

    The default is PPO's adaptive KL penalty (Schulman et al. 2017, section 4: factor 2 outside 1.5). With a factor
    below 1 the same rule drives a learning rate: smaller when the KL was too large.
    A measurement that is nan or infinite counts as too large; the value is kept as a logarithm, so it cannot reach 0.
    """

    def __init__(
        self,
        value: float = 1.0,
        *,
        factor: float = 2.0,
        shrink: float | None = None,
        low: float = 1 / 1.5,
        high: float = 1.5,
        minimum: float = 1e-4,
        maximum: float = 1e4,
    ) -> None:
        _positive("minimum", minimum)
        if not (minimum <= value <= maximum < math.inf):
            raise ValueError(f"value must lie within [{minimum}, {maximum}], got {value}")
        if not (0.0 < low <= high):
            raise ValueError(f"low and high must satisfy 0 < low <= high, got {low} and {high}")
        self.factor, self.low, self.high = _positive("factor", factor), low, high
        self.shrink = 1 / self.factor if shrink is None else _positive("shrink", shrink)
        self._range = (math.log(minimum), math.log(maximum))
        self._log_value = math.log(value)

    @classmethod
    def preset(cls, name: Literal["paper", "rllib"], value: float | None = None) -> "Adaptive":
        """The published rules: "paper" doubles or halves outside 1.5 (Schulman et al. 2017, section 4), from 1; "rllib"
        takes 1.5 times above 2 limits and half below half a limit (Ray RLlib's ``kl_coeff`` update), from 0.2.

        Raises ValueError for another name.
        """
        if name == "paper":
            return cls(1.0 if value is None else value)
        if name == "rllib":
            return cls(0.2 if value is None else value, factor=1.5, shrink=0.5, low=0.5, high=2.0)
        raise ValueError(f"name must be 'paper' or 'rllib', got {name!r}")

    @property
    def value(self) -> float:
        return math.exp(self._log_value)

    def adapt(self, measured: float, bound: Bound) -> None:
        """Answer one update's measurement. Raises ValueError for a bound from below, and for a limit below 0."""
        if bound.sign < 0 or bound.limit < 0:
            raise ValueError(f"Adaptive answers at_most a limit of 0 or more, not {bound}: take a Dual for at_least")
        step = math.log(self.factor)
        if measured < bound.limit * self.low:
            step = math.log(self.shrink)
        elif measured <= bound.limit * self.high:
            return
        self._log_value = _clamped(self._log_value + step, self._range)

    def state_dict(self) -> dict[str, float]:
        return {"log_value": self._log_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log_value = _clamped(_number(state, "log_value"), self._range)


class Dual:
    """Gradient ascent on the logarithm of a Lagrange multiplier: log value += rate * excess, within a range.

    The dual step of a bound, in log space so that the multiplier stays positive. With ``at_least(H)`` it is SAC's
    temperature (Haarnoja et al. 2018b, section 5). ``proportional`` above 0 adds a term in the excess's change, the
    velocity form of a PI controller, which keeps no integral beside the value itself and so cannot wind up; it damps
    the ringing of the plain step. ``rate`` is per unit of excess: for a KL bound, take it in units of 1 / limit.
    """

    def __init__(
        self,
        value: float = 1.0,
        *,
        rate: float = 0.1,
        proportional: float = 0.0,
        minimum: float = 1e-6,
        maximum: float = 1e6,
    ) -> None:
        _positive("minimum", minimum)
        if not (minimum <= value <= maximum < math.inf):
            raise ValueError(f"value must lie within [{minimum}, {maximum}], got {value}")
        self.rate = _positive("rate", rate)
        self.proportional = _positive("proportional", proportional, zero_allowed=True)
        self._range = (math.log(minimum), math.log(maximum))
        self._log_value = math.log(value)
        self._last_excess: float | None = None

    @property
    def value(self) -> float:
        return math.exp(self._log_value)

    def adapt(self, measured: float, bound: Bound) -> None:
        """Answer one update's measurement; nan counts as far too large. No step is larger than a factor e."""
        excess = bound.excess(measured) if not math.isnan(measured) else math.inf
        step = self.rate * excess
        if self.proportional and math.isfinite(excess):
            step += self.proportional * (excess - (excess if self._last_excess is None else self._last_excess))
            self._last_excess = excess
        self._log_value = _clamped(self._log_value + _clamped(step, (-1.0, 1.0)), self._range)

    def retrace(self, before: dict[str, float], kept: float) -> None:
        """Keep the fraction ``kept`` of the way in log value since ``before``, a state_dict; 0 goes back to it."""
        self._log_value = before["log_value"] + kept * (self._log_value - before["log_value"])
        self._last_excess = before.get("last_excess")

    def state_dict(self) -> dict[str, float]:
        last = {} if self._last_excess is None else {"last_excess": self._last_excess}
        return {"log_value": self._log_value, **last}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log_value = _clamped(_number(state, "log_value"), self._range)
        self._last_excess = _number(state, "last_excess") if "last_excess" in state else None


class Annealed:
    """A coefficient that follows a schedule over ``steps`` updates and answers nothing.

    ``shape``: "linear" or "cosine" from ``start`` to ``end``; "cyclical" repeats ``cycles`` ramps, each over its
    first half and resting at ``end`` over its second (Fu et al. 2019); "reciprocal" moves 1 / value linearly, as mirror
    descent's step that shrinks from 1 to 0 does (Tomar et al. 2022, MDPO). ``warmup`` updates at ``start`` come first.
    After the last step the value stays at ``end``; a schedule of one step is at ``end`` after its first update.
    """

    def __init__(
        self,
        start: float,
        end: float,
        steps: int,
        *,
        shape: Literal["linear", "cosine", "cyclical", "reciprocal"] = "linear",
        cycles: int = 4,
        warmup: int = 0,
    ) -> None:
        self.start, self.end = (_positive(n, x, zero_allowed=True) for n, x in (("start", start), ("end", end)))
        if steps < 1 or cycles < 1 or warmup < 0:
            raise ValueError(f"steps and cycles must be at least 1 and warmup at least 0: {steps}, {cycles}, {warmup}")
        if shape not in ("linear", "cosine", "cyclical", "reciprocal"):
            raise ValueError(f"shape must be 'linear', 'cosine', 'cyclical' or 'reciprocal', got {shape!r}")
        if shape == "reciprocal" and 0 in (start, end):
            raise ValueError(f"a reciprocal schedule needs start and end above 0, got {start} and {end}")
        self.steps, self.shape, self.cycles, self.warmup = steps, shape, cycles, warmup
        self.count = 0

    @property
    def value(self) -> float:
        done = min(max(self.count - self.warmup, 0) / self.steps, 1.0)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        elif self.shape == "cyclical" and done < 1.0:
            done = min(2 * (done * self.cycles % 1.0), 1.0)
        elif self.shape == "reciprocal":
            return 1 / ((1 - done) / self.start + done / self.end)
        return self.start * (1 - done) + self.end * done

    def adapt(self, measured: float, bound: Bound) -> None:
        """One update further along the schedule, whatever was measured."""
        self.count += 1

    def state_dict(self) -> dict[str, float]:
        return {"count": float(self.count)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = int(_number(state, "count"))


@dataclass
class Penalty:
    """A bound and the coefficient that enforces it in a loss: ``loss + penalty.term(kl.mean())``."""

    bound: Bound
    coefficient: Coefficient

    def __post_init__(self) -> None:
        if getattr(type(self.coefficient), "adapt", None) is None:
            raise ValueError(f"a penalty needs a Coefficient, such as Fixed(0.5), not {self.coefficient!r}")

    def term(self, x: Tensor) -> Tensor:
        """What to add to a loss that is minimised: the coefficient times x, or times -x for a lower bound."""
        return (self.coefficient.value * self.bound.sign) * x

    def adapt(self, measured: float) -> None:
        """Answer the measurement of a whole update. Call it once per update, never inside the loss."""
        self.coefficient.adapt(measured, self.bound)


def _number(state: dict[str, Any], name: str) -> float:
    """A finite number out of a saved state, whatever type it was saved in."""
    if name not in state:
        raise ValueError(f"the state has no {name!r}, but {', '.join(map(repr, state)) or 'nothing'}: of another rule")
    value = state[name].item() if isinstance(state[name], Tensor) and state[name].numel() == 1 else state[name]
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} of the state must be a finite number, got {value!r}")
    return float(value)


def _clamped(value: float, allowed: tuple[float, float]) -> float:
    return min(max(value, allowed[0]), allowed[1])


def _positive(name: str, value: float, zero_allowed: bool = False) -> float:
    if not (math.isfinite(value) and (value > 0 or (zero_allowed and value == 0))):
        raise ValueError(f"{name} must be finite and {'at least' if zero_allowed else 'above'} 0, got {value}")
    return value
