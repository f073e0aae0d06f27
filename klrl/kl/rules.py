"""The rules by name: coefficients that answer a measured KL, and weights that answer each state's own.

A row in ``PENALTIES``, ``STATE_RULES`` or ``RATIO_RULES`` is all that a rule needs besides its class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Adaptive, Annealed, Bound, Coefficient, Dual, Fixed
from klrl.kl.divergence import kl
from klrl.kl.measure import Direction
from klrl.kl.parameters import freeze
from klrl.kl.projection import project_states

PenaltyRule = Literal["adaptive", "lagrange", "fixed", "annealed", "cyclical", "reciprocal", "none"]
StateRuleName = Literal["none", "gate", "reverse", "project"]
RatioRuleName = Literal["clip", "spo"]
D = TypeVar("D", bound=td.Distribution)


@dataclass(frozen=True)
class Start:
    """What a penalty's coefficient is made from."""

    value: float
    """At the first update."""
    bound: Bound
    """What it answers."""
    kept: bool = True
    """Whether overshoots are kept. Where they are taken back, no update ends above the limit."""
    end: float = 0.0
    """An annealed one's value after ``updates`` updates."""
    updates: int = 1000


def _adaptive(start: Start) -> Coefficient:
    if math.isinf(start.bound.limit):  # no limit, nothing to answer
        return Fixed(0.0)
    value = max(start.value, 1e-4)
    return Adaptive(value, high=1.5 if start.kept else 1.0, minimum=1e-4, maximum=max(value, 1e4))


def _lagrange(start: Start) -> Coefficient:
    if math.isinf(start.bound.limit):
        return Fixed(0.0)
    value = max(start.value, 1e-4)
    return Dual(value, rate=0.5 / max(start.bound.limit, 1e-6), minimum=1e-4, maximum=max(value, 1e4))


# The coefficient of each penalty.
PENALTIES: dict[PenaltyRule, Callable[[Start], Coefficient]] = {
    "adaptive": _adaptive,
    "lagrange": _lagrange,
    "fixed": lambda start: Fixed(start.value),
    "annealed": lambda start: Annealed(start.value, start.end, start.updates),
    "cyclical": lambda start: Annealed(start.value, start.end, start.updates, shape="cyclical"),
    "reciprocal": lambda start: Annealed(start.value, start.end, start.updates, shape="reciprocal"),
    "none": lambda start: Fixed(0.0),
}


def _positive(**given: float) -> None:
    for name, number in given.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {number}")


class StateRule:
    """What each state's own move does to its part of a policy's loss.

    A rule overrides ``factor``, which serves any loss, or ``within``; one that is about a ratio, ``weight``. What is
    not of the surrogate, such as PPO's entropy bonus and penalty, pulls as before. Raises ValueError for a number that
    the rule cannot act by.
    """

    reads_kl = True
    """Whether the rule is about each state's KL."""

    def factor(self, kl: Tensor, further: Tensor) -> Tensor:
        """By what to multiply the gradient of each state's loss, [B]; 1 leaves it.

        kl: of each state, in the limited direction; further: bool, where a step down the loss raises it; both [B].
        """
        return torch.ones_like(kl)

    def weight(self, ratio: Tensor, advantage: Tensor, kl: Tensor | None) -> Tensor:
        """By what to multiply the gradient of each state's surrogate ratio * advantage, [B]; 1 leaves it.

        ratio: new(a|s) / old(a|s); kl: of each state, in the limited direction; all [B], without gradients. By default
        ``factor`` is asked, and a step goes further where it moves the ratio further from 1.
        """
        assert kl is not None
        return self.factor(kl, ratio * advantage > advantage)

    @property
    def weighs(self) -> bool:
        """Whether it multiplies gradients: whether it has a ``factor`` or a ``weight`` of its own."""
        return type(self).factor is not StateRule.factor or type(self).weight is not StateRule.weight

    def within(self, old: td.Distribution, new: D, direction: Direction) -> D:
        """The policy that the loss is of, in place of ``new``: differentiable in ``new``."""
        return new

    def pull(self, within: td.Distribution, new: td.Distribution) -> Tensor | float:
        """What to add to each state's loss, [B], so that ``new`` follows ``within``."""
        return 0.0


@dataclass(frozen=True)
class _RatioRule(StateRule):
    range: float = 0.2
    reads_kl = False

    def __post_init__(self) -> None:
        _positive(range=self.range)


class Clip(_RatioRule):
    """PPO's clipping: no gradient where the ratio is beyond 1 -+ ``range`` and would go further.

    Source: Schulman et al. (2017), "Proximal policy optimization algorithms", equation 7.
    """

    def weight(self, ratio: Tensor, advantage: Tensor, kl: Tensor | None) -> Tensor:
        clipped = ratio.clip(1 - self.range, 1 + self.range) * advantage
        return 1.0 * (ratio * advantage <= clipped)


class SPO(_RatioRule):
    """A parabola in the ratio: at its highest where the ratio is ``range`` from 1, it draws what is beyond back.

    It acts at every ratio: the gradient of ratio * A - |A| (ratio - 1)^2 / (2 range) over that of ratio * A.
    Source: Xie et al. (2025), "Simple policy optimization", section 4.
    """

    def weight(self, ratio: Tensor, advantage: Tensor, kl: Tensor | None) -> Tensor:
        sign = 1.0 * (advantage > 0) - 1.0 * (advantage < 0)
        return 1 - sign * (ratio - 1) / self.range


@dataclass(frozen=True)
class Gate(StateRule):
    """TR-PPO: no gradient where a state's KL is above ``limit``, in nats, and the state would move further.

    Source: Wang et al. (2019), "Truly proximal policy optimization": PPO triggered by the trust region.
    """

    limit: float = 0.05

    def __post_init__(self) -> None:
        _positive(limit=self.limit)

    def factor(self, kl: Tensor, further: Tensor) -> Tensor:
        return 1.0 - 1.0 * ((kl > self.limit) & further)


@dataclass(frozen=True)
class Reverse(StateRule):
    """TR-PPO-RB: the gradient turned round and times ``turn`` where ``Gate`` drops it, so that the state comes back.

    Source: Wang et al. (2019), "Truly proximal policy optimization": its trust region and its rollback together.
    """

    limit: float = 0.05
    turn: float = 1.0

    def __post_init__(self) -> None:
        _positive(limit=self.limit, turn=self.turn)

    def factor(self, kl: Tensor, further: Tensor) -> Tensor:
        return 1.0 - (1.0 + self.turn) * ((kl > self.limit) & further)


@dataclass(frozen=True)
class Project(StateRule):
    """A trust region layer: the loss is of the nearest policy whose KL is at most ``limit`` in every state.

    ``strength`` weighs the KL from there to the network's own policy, which acts, and so follows. Source: Otto et al.
    (2021), "Differentiable trust region layers for deep reinforcement learning", section 4; see ``project_states``.
    """

    limit: float = 0.05
    strength: float = 1.0

    def __post_init__(self) -> None:
        _positive(limit=self.limit, strength=self.strength)

    def within(self, old: td.Distribution, new: D, direction: Direction) -> D:
        return project_states(old, new, self.limit, direction)

    def pull(self, within: td.Distribution, new: td.Distribution) -> Tensor | float:
        return self.strength * kl(freeze(within), new)


def check_rules(rules: Sequence[StateRule]) -> None:
    """Raise ValueError for what is no rule of single states."""
    for rule in rules:
        if not isinstance(rule, StateRule):
            raise ValueError(f"{rule!r} is no rule of single states: give an instance, such as Gate(0.05)")


def pulled(rules: Sequence[StateRule], within: td.Distribution | None, new: td.Distribution) -> Tensor | float:
    """What the rules add to each state's loss, [B]. Raises ValueError where one of them needs a ``within``."""
    if within is not None:
        return sum(rule.pull(within, new) for rule in rules)
    if any(type(rule).pull is not StateRule.pull for rule in rules):
        raise ValueError("a rule draws the policy to what within(old, new) makes of it: the loss is of that")
    return 0.0


def weigh(rules: Sequence[StateRule], ratio: Tensor, advantage: Tensor, kl: Callable[[], Tensor]) -> Tensor | float:
    """The least weight that the rules give each state's surrogate, [B]; 1 without a rule that weighs.

    ratio, advantage: [B]. kl: gives the states' KLs, and is asked where a rule reads them. Raises ValueError where
    these are not one value per state.
    """
    weighing = [rule for rule in rules if rule.weighs]
    if not weighing:
        return 1.0
    if advantage.shape not in (ratio.shape, ()):  # torch would make a table of all pairs of states
        raise ValueError(f"advantage has shape {tuple(advantage.shape)}, the ratio {tuple(ratio.shape)}: one per state")
    with torch.no_grad():
        reached = kl() if any(rule.reads_kl for rule in weighing) else None
        if reached is not None and reached.shape != ratio.shape:
            raise ValueError(f"KL has shape {tuple(reached.shape)}, the ratio {tuple(ratio.shape)}: wrap in joint(...)")
        return reduce(torch.minimum, [rule.weight(ratio.detach(), advantage, reached) for rule in weighing])


# Rules written in operators alone, so that they take NumPy arrays as well as tensors, at a fraction of the cost.
ARRAY_RULES = frozenset({Clip, SPO, Gate, Reverse})
# The rule of each name, from the KL that a state may have and from the rule's strength.
STATE_RULES: dict[StateRuleName, Callable[[float, float], StateRule | None]] = {
    "none": lambda limit, turn: None,
    "gate": lambda limit, turn: Gate(limit),
    "reverse": Reverse,
    "project": Project,
}
# The rule of each name, from the range that a ratio may leave 1 by.
RATIO_RULES: dict[RatioRuleName, Callable[[float], StateRule]] = {"clip": Clip, "spo": SPO}
