"""``KLLimit``: how far an update may move a policy, what holds it back, and what happens where it went too far."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Bound, Coefficient, Fixed, Penalty, at_most
from klrl.kl.divergence import NoClosedFormError, kl, reverse_kl
from klrl.kl.measure import Direction, KLReport, Of, check_states, fraction, measure, states
from klrl.kl.parameters import freeze
from klrl.kl.ranks import ALONE, Ranks
from klrl.kl.rules import PENALTIES, PenaltyRule, Start, StateRule, check_rules, pulled, weigh
from klrl.kl.trust_region import project

Check = Literal["update", "epoch", "minibatch"]
Overshoot = Literal["keep", "rollback", "project"]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer | Tensor]
D = TypeVar("D", bound=td.Distribution)
_WITHOUT = (
    "an estimate has no gradient and is no measure of a single state: with penalty='none' and no rule of states, stop "
    "and on_overshoot limit it"
)


def _check_name(*given: tuple[Any, Any]) -> None:
    for name, known in given:
        if isinstance(name, str) and name not in get_args(known):
            raise ValueError(f"{name!r} is none of {', '.join(get_args(known))}")


def _check_numbers(**given: float) -> None:
    for name, number in given.items():
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def _checked(bound: Bound) -> Bound:
    if not isinstance(bound, Bound):
        raise ValueError(f"bound must be a Bound, such as at_most({bound!r}), got {bound!r}")
    if bound.sign < 0 or bound.limit < 0:
        raise ValueError(f"a KL is limited from above, at 0 or more: at_most(0.02), not {bound}")
    return bound


def _apart(given: Optimizers) -> tuple[list[torch.optim.Optimizer], list[Tensor]]:
    """Those with a state_dict, and the tensors of others."""
    parts = [given] if isinstance(given, torch.optim.Optimizer) else given
    optimizers = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
    return optimizers, [part for part in parts if isinstance(part, Tensor)]


class KLLimit:
    """A bound on the KL of an update, in nats, and everything that enforces it.

    ``bound`` is about the mean over states, or what ``of`` names; ``max_limit`` about each state. ``direction``:
    forward bounds KL(old || new), reverse KL(new || old). They are held by rules, in three places:

    - on the mean, during the update: ``term``, a penalty whose coefficient follows ``penalty``, a name of
      ``PENALTIES``, started at ``coef``, or a ``Coefficient``, as ``Annealed`` to an end; and ``Move.exceeded``, which
      says when to stop: once the KL is above ``stop`` times a limit (0: never), measured where ``check`` says;
    - in each state, during the update: ``weight`` and ``within``, by the ``StateRule``s in ``rules``;
    - after it: ``on_overshoot`` keeps an update that ends above a limit, takes it back ("rollback"), or moves it back
      along its own line to the boundary ("project"); then the coefficient adapts to what the update had reached: the
      "adaptive" one doubles above 1.5 limits, or above 1 where overshoots are taken back, and halves below 1/1.5.

    Where no rule answers a rollback, the next may be the same. Beyond ``influence`` limits a state's KL pulls no harder
    (Huber 1964); 0 sets no bound. ``device``: of ``beta``. ``ranks``: who trains the policy, and decides, together.

        with limit.update(lambda: policy(obs), weights=list(policy.parameters())) as move:
            for epoch in range(10):
                train_one_epoch(limit)
                if move.exceeded():
                    break

    Raises ValueError for a rule that is not known, and for a number below 0.
    """

    def __init__(
        self,
        bound: Bound | None = None,
        *,
        direction: Direction = "forward",
        of: Of = "mean",
        max_limit: float = math.inf,
        penalty: PenaltyRule | Coefficient = "adaptive",
        coef: float = 1.0,
        influence: float = 0.0,
        rules: Iterable[StateRule] = (),
        stop: float = 1.5,
        check: Check = "epoch",
        on_overshoot: Overshoot = "keep",
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.bound = _checked(at_most(math.inf) if bound is None else bound)
        _check_name((direction, Direction), (of, Of), (check, Check), (on_overshoot, Overshoot), (penalty, PenaltyRule))
        _check_numbers(coef=coef, stop=stop, max_limit=max_limit, influence=influence)
        check_rules(rules := list(rules))
        self.direction, self.of, self.max_limit, self.influence = direction, of, max_limit, influence
        self.stop, self.check, self.on_overshoot, self.rules, self.ranks = stop, check, on_overshoot, rules, ranks
        answered = at_most(max_limit) if math.isinf(self.bound.limit) else self.bound
        if isinstance(penalty, str):
            penalty = PENALTIES[penalty](Start(coef, answered, on_overshoot == "keep"))
        self.penalty = Penalty(answered, penalty)
        self.penalises = not (isinstance(penalty, Fixed) and penalty.value == 0)
        self.beta = torch.tensor(penalty.value, device=device)
        """The coefficient as a float32 scalar: a tensor, so that a compiled step reads what it now is."""

    def term(self, old: td.Distribution, new: td.Distribution, within: td.Distribution | None = None) -> Tensor | float:
        """beta * KL of each state, [B], to be added to a loss; 0 where nothing penalises.

        ``within``: what ``self.within`` made of ``new``, which is then drawn to it, as a rule such as Project needs.
        """
        pull = pulled(self.rules, within, new)
        if not self.penalises:
            return pull
        divergence = self.kl(old, new)
        return self.strength(lambda: divergence) * divergence + pull

    def strength(self, kl: Callable[[], Tensor]) -> Tensor:
        """What multiplies each state's KL, [B], in ``term``: beta, or less where a state's influence is bounded."""
        if self.influence == 0 or math.isinf(self.penalty.bound.limit):
            return self.beta
        # A KL's gradient grows as its root: this keeps it as long as it is at the edge.
        edge = max(self.influence * self.penalty.bound.limit, 1e-30)
        return self.beta * (edge / kl().detach().clamp(edge, 1e30)).sqrt()

    def weight(self, ratio: Tensor, advantage: Tensor, old: td.Distribution, new: td.Distribution) -> Tensor | float:
        """By what to multiply the gradient of each state's surrogate ratio * advantage, [B]: the least of the rules'.

        ratio: new(a|s) / old(a|s). The loss is -weight * ratio * advantage.
        """
        return weigh(self.rules, ratio, advantage, lambda: self.kl(old, new))

    @property
    def replaces(self) -> bool:
        """Whether a rule changes more of the loss than the surrogate's weight."""
        return any((type(r).within, type(r).pull) != (StateRule.within, StateRule.pull) for r in self.rules)

    def within(self, old: td.Distribution, new: D) -> D:
        """The policy that a loss is of: ``new``, or what a rule makes of it in states that moved too far."""
        return reduce(lambda policy, rule: rule.within(old, policy, self.direction), self.rules, new)

    def kl(self, old: td.Distribution, new: td.Distribution) -> Tensor:
        """The KL that the limit is about, [B]. Raises ValueError as ``klrl.kl.kl`` does."""
        try:
            return kl(old, new) if self.direction == "forward" else reverse_kl(old, new)
        except NoClosedFormError as problem:
            raise NoClosedFormError(f"{problem}; {_WITHOUT}") from None

    def begin(self, *args: Any, **more: Any) -> "Move":
        """Begin an update, which ``Move.end`` ends. Takes what ``Move`` takes after the limit."""
        return Move(self, *args, **more)

    @contextmanager
    def update(self, *args: Any, **more: Any) -> Iterator["Move"]:
        """Hold the update in the block, as ``begin`` and ``end``; if the block raises, nothing is measured."""
        move = self.begin(*args, **more)
        yield move
        move.end()

    def adapt(self, reached: float) -> None:
        """Let the coefficient answer what an update reached."""
        self.penalty.adapt(reached)
        self.beta.fill_(self.penalty.coefficient.value)

    def state_dict(self) -> dict[str, float]:
        return self.penalty.coefficient.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what ``state_dict`` gave. Raises ValueError for what is of another rule or not a finite number."""
        self.penalty.coefficient.load_state_dict(state)
        self.beta.fill_(self.penalty.coefficient.value)


class Move:
    """An update that is under way: how far it went, and its ``report`` once it has ended.

    ``policy()``: the policy at a fixed batch of B states, as it now is. ``weights``: what it depends on, to be taken
    back in place, and ``optimizer``, several, or their tensors: what "rollback" restores beside it. ``mask``: bool
    [B], the states that count. ``actions``: one for each state, drawn from the old policy, for the estimates k1 and k3.
    ``old``: the policy at the beginning, where it is known already. Raises ValueError where these do not have one
    value per state, and where an overshoot is to be taken back without ``weights``.
    """

    def __init__(
        self,
        limit: KLLimit,
        policy: Callable[[], td.Distribution],
        weights: Tensor | Sequence[Tensor] = (),
        mask: Tensor | None = None,
        *,
        optimizer: Optimizers = (),
        actions: Tensor | None = None,
        old: td.Distribution | None = None,
    ) -> None:
        self.limit, self.policy, self.mask, self.actions = limit, policy, mask, actions
        self.weights = [weights] if isinstance(weights, Tensor) else list(weights)
        self.optimizers, tensors = _apart(optimizer)
        self.restored = [*self.weights, *tensors]
        if limit.on_overshoot != "keep" and not self.weights:
            raise ValueError(f"on_overshoot {limit.on_overshoot!r} takes weights back: give them")
        with torch.no_grad():
            self.old = self.new = freeze(policy() if old is None else old)
            self.old_log_prob = None if actions is None else self.old.log_prob(actions)
        check_states(self.old.batch_shape, mask, self.old_log_prob)
        self.before = [] if limit.on_overshoot == "keep" else [tensor.detach().clone() for tensor in self.restored]
        self.optimizers_before = [copy.deepcopy(part.state_dict()) for part in self.optimizers] if self.before else []
        self.log_ratio: Tensor | None = None
        """log new(a) - log old(a) of ``actions``, [B], of ``new``: the policy at the last measurement."""
        self.stopped_at, self.reached = 0, 0.0
        """The epoch or step of an early stop, or 0; the limited KL, in nats, that ``excess`` found last."""
        self.kept, self.attempted = 1.0, 0.0  # of what another limit took back: the fraction left, the KL before
        self._report: KLReport | None = None

    @torch.no_grad()
    def excess(self, new: td.Distribution | None = None) -> float:
        """The KL so far as a fraction of its limit, of ``new`` where it is given: at most 1 where both limits hold.

        Infinite where the policy is not finite.
        """
        limit = self.limit
        try:
            divergence = limit.kl(self.old, self.policy() if new is None else new)
        except NoClosedFormError:
            return self.check().excess
        except ValueError:
            divergence = torch.full(self.old.batch_shape, math.inf, device=limit.beta.device)  # so on every rank
        self.reached = states(divergence, limit.of, self.mask, limit.ranks)
        furthest = states(divergence, "max", self.mask, limit.ranks) if limit.max_limit < math.inf else 0.0
        return max(fraction(self.reached, limit.bound.limit), fraction(furthest, limit.max_limit))

    def exceeded(self, when: Check | None = None, at: int = 1) -> bool:
        """Whether the update is to stop, as its KL is above ``stop`` times the limit.

        ``when``: what has just ended; measured only where the limit's ``check`` is that, or where none is given.
        ``at``: the epoch or step, for the report.
        """
        limit = self.limit
        if when not in (None, limit.check) or limit.stop == 0 or math.isinf(min(limit.bound.limit, limit.max_limit)):
            return False
        over = not self.excess() <= limit.stop
        self.stopped_at = at if over else self.stopped_at
        return over

    @torch.no_grad()
    def check(self) -> KLReport:
        """Measure the move so far, as if the update ended here."""
        self.new, limit = self.policy(), self.limit
        if self.actions is not None and self.old_log_prob is not None:
            self.log_ratio = self.new.log_prob(self.actions) - self.old_log_prob
        more: Any = {"direction": limit.direction, "of": limit.of, "max_limit": limit.max_limit, "ranks": limit.ranks}
        return measure(self.old, self.new, limit.bound, log_ratio=self.log_ratio, mask=self.mask, **more)

    @torch.no_grad()
    def end(self) -> KLReport:
        """Measure the update, take back what overshot, measure again, and adapt the coefficient.

        Raises ValueError where the new policy has no KL, as its parameters are not finite, and where it still is above
        the limit once it was taken back. Nothing adapts then, and what can be taken back is.
        """
        limit, kept = self.limit, self.kept
        try:
            report = self.check()
        except ValueError:
            self._restore()
            raise
        first, beta = report, limit.penalty.coefficient.value
        if limit.on_overshoot != "keep" and not first.excess <= 1:
            kept *= self._take_back(first.excess)
            report = self.check()
            if not report.excess <= 1:
                raise ValueError("the policy depends on more than the weights that were given to be taken back")
        reached = first.limited if math.isinf(limit.max_limit) else first.excess * limit.penalty.bound.limit
        limit.adapt(max(reached, self.attempted))
        own: Any = {"coefficient": beta, "rolled_back": 1 - kept, "stopped_at": self.stopped_at}
        self._report = replace(report, attempted=max(first.limited, self.attempted), **own)
        return self._report

    def _restore(self) -> None:
        for tensor, before in zip(self.restored, self.before, strict=False):
            tensor.copy_(before)
        for optimizer, state in zip(self.optimizers, self.optimizers_before, strict=False):
            optimizer.load_state_dict(state)

    def _take_back(self, reached: float) -> float:
        """Move the weights back as ``on_overshoot`` says; the fraction of the update that is kept."""
        if self.limit.on_overshoot == "rollback":
            self._restore()
            return 0.0
        ends = [weight.detach().clone() for weight in self.weights]

        def place(fraction: float) -> None:
            for weight, old, new in zip(self.weights, self.before, ends, strict=False):
                weight.copy_(torch.lerp(old, new, fraction) if fraction > 0 else old)

        return project(place, self.excess, 1.0, reached)

    @property
    def report(self) -> KLReport:
        """The finished update's KLReport. Raises RuntimeError inside the block, where nothing is measured yet."""
        if self._report is None:
            raise RuntimeError("the update has not ended: read the report after the with block, or call check()")
        return self._report
