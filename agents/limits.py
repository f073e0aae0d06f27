"""The options of an agent's limit on KL, and the ``KLLimit`` that they ask for."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch

from klrl.config import Checked, Named, Needs, NonNegative, Positive, PositiveInt, Reads
from klrl.errors import UsageError
from klrl.kl import Coefficient, Direction, KLLimit, StateRule, at_most
from klrl.kl.limit import Check, Overshoot
from klrl.kl.measure import Of
from klrl.kl.rules import PENALTIES, STATE_RULES, Start
from klrl.policies.own import make_own, metavar, name_of, unusable

PenaltyName = Annotated[str, Reads(name_of), Named(tuple(PENALTIES)), metavar(*PENALTIES)]
RuleName = Annotated[str, Reads(name_of), Named(tuple(STATE_RULES)), metavar(*STATE_RULES)]
_OPTIONS = {"direction", "of", "penalty", "coef", "influence", "stop", "check", "on_overshoot"}  # of KLLimit


@dataclass(frozen=True)
class KLTarget(Checked):
    """How far an update may move the policy."""

    group = "kl."

    target: NonNegative = 0.04
    """Limit on the KL(old||new) of an update, in nats, action dimensions summed; 0 sets none."""
    of: Of = "mean"
    """What of the states' KLs the target is about: their mean, their 95th percentile or the largest."""
    max_target: NonNegative = 0.0
    """Limit on the largest KL of a single state, held as the target is; 0 sets none."""
    direction: Direction = "forward"
    """Which KL is limited: forward KL(old||new) or reverse KL(new||old). Both are always logged."""

    def make_limit(self, device: torch.device) -> KLLimit:
        """The limit that these settings ask for."""
        return KLLimit(device=device, **self.options())

    def options(self) -> dict[str, Any]:
        """What ``KLLimit`` takes of these settings; what they do not name does nothing."""
        limits = {"bound": at_most(self.target or math.inf), "max_limit": self.max_target or math.inf}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _OPTIONS}
        return {**limits, "penalty": "none", "stop": 0.0, **own}


@dataclass(frozen=True)
class KLConfig(KLTarget):
    """How far an update may move the policy, and what answers an excess."""

    penalty: PenaltyName = "none"
    """KL penalty in the loss. Its coefficient doubles after an update above 1.5 targets (above 1 where overshoots are
    undone or moved back) and halves after one below 1/1.5; climbs and falls with the excess; stays; follows a schedule;
    is 0; or is one of your own, a klrl.kl.Coefficient made from a klrl.kl.Start."""
    coef: Annotated[NonNegative, Needs("penalty")] = 1.0
    """The penalty's coefficient at the start; an adaptive or lagrange one stays within 1e-4 to 1e4."""
    anneal_to: Annotated[NonNegative, Needs("penalty")] = 0.0
    """The coefficient of an annealed, cyclical or reciprocal penalty at its schedule's end; above 0 for the last."""
    anneal_over: Annotated[PositiveInt, Needs("penalty")] = 1000
    """How many updates that schedule takes."""
    influence: Annotated[NonNegative, Needs("penalty")] = 0.0
    """Beyond this many targets, a state's KL pulls no harder in the penalty; 0, or no target, sets no bound."""
    per_state: RuleName = "none"
    """Where a state's own KL is above kl.state_limit, drop what of the surrogate would move it further (gate), turn
    it back (reverse), or learn by the nearest policy that is within it, and draw the network to that (project); or a
    rule of your own, a klrl.kl.StateRule made from kl.state_limit and kl.turn."""
    state_limit: Annotated[Positive, Needs("per_state")] = 0.05
    """The KL of a single state, in nats, from which on kl.per_state acts."""
    turn: Annotated[Positive, Needs("per_state")] = 1.0
    """How strongly kl.per_state reverse turns back, and project draws the network to the projected policy."""
    stop: NonNegative = 0.0
    """Stop an update once its KL, measured as kl.check says, exceeds this many times the target; 0 never stops."""
    check: Annotated[Check, Needs("stop")] = "epoch"
    """When the whole batch's exact KL is measured: after each epoch, each minibatch, or only after the update, which
    then cannot be stopped."""
    on_overshoot: Overshoot = "project"
    """What happens to an update whose KL ends above the target: kept, undone, or moved back to the boundary. Without a
    penalty, one update after the other may be undone."""

    def options(self) -> dict[str, Any]:
        options = super().options()
        answered = options["bound"] if self.target else at_most(options["max_limit"])
        start = Start(self.coef, answered, self.on_overshoot == "keep", self.anneal_to, self.anneal_over)
        if ":" in self.penalty:
            penalty = _own_coefficient(self.penalty, start)
        else:
            try:
                penalty = PENALTIES[self.penalty](start)  # type: ignore[index]
            except ValueError as problem:
                raise UsageError(f"--kl.penalty {self.penalty}, with --kl.coef and --kl.anneal-to: {problem}") from None
        if ":" in self.per_state:
            rule: StateRule | None = _own_rule(self.per_state, self.state_limit, self.turn)
        else:
            rule = STATE_RULES[self.per_state](self.state_limit, self.turn)  # type: ignore[index]
        return {**options, "penalty": penalty, "rules": [] if rule is None else [rule]}


def _own_coefficient(name: str, start: Start) -> Coefficient:
    """A coefficient of one's own, which was seen to have a value, to answer and to be saved."""
    needs = ("adapt", "state_dict", "load_state_dict")
    made: Coefficient
    made, twin = (make_own(name, object, "coefficient", "kl.penalty", needs, start) for _ in range(2))
    try:
        twin.adapt(0.0, start.bound)
        twin.load_state_dict(made.state_dict())
        if not twin.value == made.value >= 0:
            raise ValueError(f"its value is {made.value}, and {twin.value} once its state is loaded")
    except Exception as problem:
        raise unusable("coefficient", name, problem) from None
    return made


def _own_rule(name: str, limit: float, turn: float) -> StateRule:
    """A rule of one's own, whose twin was seen to weigh two states."""
    made: StateRule
    made, twin = (make_own(name, StateRule, "rule", "kl.per_state", (), limit, turn) for _ in range(2))
    two = torch.tensor([0.5, 2.0])
    try:
        weights = torch.as_tensor(twin.weight(two, two, limit * two) if twin.weighs else two)
        if weights.shape not in (two.shape, ()) or not weights.isfinite().all():
            raise ValueError(f"it weighs two states by {weights.tolist()}")
    except Exception as problem:
        raise unusable("rule", name, problem) from None
    return made


@dataclass(frozen=True)
class OffPolicyKLConfig(KLConfig):
    """How far the policy may move within a window of gradient steps, and what answers an excess."""

    target: NonNegative = 0.0
    """Limit on the KL(old||new) of a window, in nats, action dimensions summed; 0 sets none."""
    penalty: PenaltyName = "adaptive"
    stop: NonNegative = 1.5
    on_overshoot: Overshoot = "keep"
    every: PositiveInt = 1000
    """How many gradient steps make the window whose KL is measured and limited; kl.check's epoch is a tenth of it."""

    def options(self) -> dict[str, Any]:
        options = super().options()
        if any(rule.weighs and type(rule).factor is StateRule.factor for rule in options["rules"]):
            raise UsageError(f"--kl.per-state {self.per_state} is about a surrogate's ratio: this agent needs a factor")
        return options
