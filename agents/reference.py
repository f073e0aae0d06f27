"""Another policy that an agent is held to: KL(policy||reference) in its loss, under a limit of its own."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from klrl.agents import registry
from klrl.agents.actor import refuse_recurrent
from klrl.agents.base import Agent, State
from klrl.config import Checked, Needs, NonNegative, PositiveInt
from klrl.errors import UsageError
from klrl.kl import (
    Direction,
    KLLimit,
    Move,
    NoClosedFormError,
    at_most,
    concatenate,
    kl,
    reverse_kl,
    select,
    state_mean,
)
from klrl.kl.measure import Of, states
from klrl.kl.rules import PENALTIES, Start
from klrl.kl.trust_region import project
from klrl.policies.distributions import uniform_like
from klrl.policies.encoder import Inputs
from klrl.policies.observations import Observation
from klrl.policies.spaces import check_same_spaces

UNIFORM = "uniform"
_USED = Needs("run")
_ANY_EXCESS = 2.0  # of what may not grow at all, however little it does
_FIGURES: tuple[Of, Of] = ("mean", "max")


@dataclass(frozen=True)
class ReferenceConfig(Checked):
    """Which policy the agent's is held to besides, and how far it may be from it."""

    group = "reference."

    run: str = ""
    """A run or checkpoint whose policy is the reference, or uniform: all discrete actions alike; by default none."""
    target: Annotated[NonNegative, _USED] = 0.0
    """Limit on the mean KL to the reference, in nats, action dimensions summed; 0 sets none. PPO and TRPO hold it on
    the states of each update, or where it was above before, let it grow no more; SAC's policy is only drawn there."""
    rule: Annotated[Literal["adaptive", "lagrange", "fixed", "annealed"], _USED] = "lagrange"
    """How the coefficient of the KL in the loss moves, as with kl.penalty; the first two need a target."""
    coef: Annotated[NonNegative, _USED] = 1.0
    """That coefficient at the start."""
    anneal_to: Annotated[NonNegative, _USED] = 0.0
    """An annealed coefficient at its schedule's end."""
    anneal_over: Annotated[PositiveInt, _USED] = 1000
    """How many updates that schedule takes."""
    direction: Annotated[Direction, _USED] = "reverse"
    """Which KL: reverse KL(policy||reference), or forward KL(reference||policy)."""

    def make_limit(self, device: torch.device) -> KLLimit:
        """The limit that these settings ask for. Raises UsageError where they contradict each other."""
        if self.run and self.target == 0 and self.rule in ("adaptive", "lagrange"):
            raise UsageError(f"--reference.rule {self.rule} needs a --reference.target above 0, such as 0.5")
        if self.target and not self.run:
            raise UsageError("--reference.target needs a --reference.run, or uniform")
        bound = at_most(self.target or math.inf)
        penalty = PENALTIES[self.rule](Start(self.coef, bound, True, self.anneal_to, self.anneal_over))
        return KLLimit(bound, direction=self.direction, penalty=penalty, stop=0.0, device=device)


class FrozenPolicy:
    """A saved agent's policy that learns no more: what another is held to, or learns from."""

    def __init__(self, agent: Agent) -> None:
        """``agent``: one that nobody trains, or moves."""
        self.agent = agent

    @classmethod
    def read(cls, path: str | Path, device: torch.device) -> "FrozenPolicy":
        """The policy of a run or checkpoint. Raises UsageError where there is none."""
        agent = registry.read(path).agent
        refuse_recurrent(agent, str(path))
        return cls.from_state(cls(agent).state_dict(), device)

    def distribution(self, obs: Observation) -> Any:
        """The policy at observations [B, *shape], as data."""
        return self.agent.distribution(obs)

    def at(self, inputs: Inputs) -> Any:
        """``distribution`` at observations that are encoded, and not normalised."""
        return self.agent.policy_at(self.agent.encoder.scaled(inputs))

    def state_dict(self) -> State:
        """What it takes to make the policy again."""
        weights = {name: weight.detach().clone() for name, weight in self.agent.policy.state_dict().items()}
        about = self.agent.description()
        about["options"]["critic_hidden_sizes"] = []  # of a critic that is not kept
        return {**about, "policy": weights, "encoder": self.agent.encoder.state_dict()}

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> "FrozenPolicy":
        """The policy that ``state_dict`` describes. Raises UsageError where its agent's class is not known here."""
        agent = registry.find(state["options"]["agent"]).from_description(state, state["policy"], device)
        agent.policy.load_state_dict(state["policy"])
        agent.encoder.load_state_dict(state["encoder"])
        return cls(agent)


@dataclass
class Reference:
    """What ``config`` asks for, from when ``agent`` first needs it; where it names no run, nothing at all."""

    config: ReferenceConfig
    agent: Agent
    limit: KLLimit = field(init=False)
    policy: FrozenPolicy | None = None

    def __post_init__(self) -> None:
        self.limit = self.config.make_limit(self.agent.device)

    @property
    def held(self) -> KLLimit | None:
        """The limit, where there is a reference."""
        return self.limit if self.config.run else None

    def read(self) -> None:
        """Read the run that the options name. Raises UsageError where there is none, and where its policy has no KL to
        the agent's."""
        if self.policy is None and self.config.run not in ("", UNIFORM):
            try:
                self.policy = FrozenPolicy.read(self.config.run, self.agent.device)
            except UsageError as problem:
                raise UsageError(f"--reference.run: {problem}") from None
        if self.policy is not None:
            check_same_spaces(self.agent, self.policy.agent, f"--reference.run {self.config.run}: its")
            if (sees := list(self.policy.agent.encoder.parts)) != list(self.agent.encoder.parts):
                raise UsageError(f"--reference.run {self.config.run}: it sees {', '.join(sees)} alone, of a Dict")
            if self.policy.agent.encoder.images != self.agent.encoder.images:
                raise UsageError(f"--reference.run {self.config.run}: it takes images for numbers, as klrl once did")
        if self.config.run:
            probe = self.agent.encoder.probe()
            try:
                own = self.agent.policy_at(probe)
                (kl if self.config.direction == "forward" else reverse_kl)(self.at(probe, own), own)
            except ValueError as problem:
                raise UsageError(f"--reference.run {self.config.run}: {problem}") from None

    def at(self, inputs: Inputs, own: Any) -> Any:
        """The reference at observations that are encoded, and not normalised; None where there is none.

        ``own``: the agent's policy there.
        """
        if self.config.run in ("", UNIFORM):
            return uniform_like(own) if self.config.run else None
        if self.policy is None:
            self.read()
        assert self.policy is not None
        return self.policy.at(inputs)

    def seen(self, obs: Observation, own: Any, valid: Tensor) -> Any:
        """``at`` observations [B, *shape] as the environment shows them; ``own`` where they are not ``valid``, bool
        [B], as a weight of 0 would make nan of an infinite KL."""
        if not self.config.run:
            return None
        at, rows = self.at(self.agent.encoder.unscaled(obs), own), torch.arange(len(valid), device=valid.device)
        if valid.all() or type(at) is not type(own):
            return at
        return select(concatenate([at, own]), torch.where(valid, rows, rows + len(rows)))

    def term(self, at: Any, new: Any) -> Tensor | float:
        """The coefficient times the KL of each state, [B], to be added to a loss; 0 where there is no reference."""
        return 0.0 if at is None else self.limit.term(at, new)

    def distance(self, at: Any, policy: Any, mask: Tensor | None = None) -> float:
        """The mean KL over states, in nats, of all ranks; 0 where there is no reference."""
        return 0.0 if at is None else float(state_mean(self.divergence(at, policy), mask, self.limit.ranks))

    def excess(self, first: float, distance: float) -> float:
        """What an update adds to the mean KL, from ``first``, as a fraction of what it may: up to the target, or where
        it begins above that, nothing."""
        room = max(self.limit.bound.limit - first, 0.0)
        if room == 0:
            return 0.0 if distance <= first else _ANY_EXCESS
        return (distance - first) / room

    def divergence(self, at: Any, policy: Any) -> Tensor:
        """The KL of each state, [B]; infinite where the policy is not finite, so that no rank leaves alone."""
        try:
            return self.limit.kl(at, policy)
        except NoClosedFormError:
            raise
        except ValueError:
            return torch.full(policy.batch_shape, math.inf, device=self.agent.device)

    def move_back(self, batch: Any, move: Move, before: Tensor) -> float | None:
        """Move an update's weights back towards those ``before`` it, until the mean KL is at most the target, or no
        more than it was where that is above.

        Returns the mean KL that the update had reached, in nats; None where nothing limits it.
        """
        if batch.reference is None or math.isinf(self.limit.bound.limit):
            return None
        (weights,) = move.weights
        ends, first = weights.clone(), self.distance(batch.reference, batch.old, batch.mask)

        def place(fraction: float) -> None:
            weights.copy_(torch.lerp(before, ends, fraction) if fraction > 0 else before)

        def measure() -> float:
            return self.distance(batch.reference, move.policy(), batch.mask)

        reached, allowed = measure(), max(self.limit.bound.limit, first)
        if reached > allowed:
            move.excess()
            move.attempted = move.reached
            # What it adds to the distance begins at 0, as the search has it; the distance itself does not.
            move.kept = project(place, lambda: measure() - first, allowed - first, reached - first)
        return reached

    def end(self, policy: Any, at: Any, mask: Tensor | None = None, attempted: float | None = None) -> dict[str, float]:
        """Measure an update's policy against the reference, and let the coefficient answer; what is to be logged.

        ``attempted``: what it answers, where that is not the KL of ``policy``, as the update was moved back.
        """
        if at is None:
            return {}
        divergence, coefficient = self.divergence(at, policy), self.limit.penalty.coefficient.value
        mean, largest = (states(divergence, of, mask, self.limit.ranks) for of in _FIGURES)
        self.limit.adapt(mean if attempted is None else attempted)
        figures = {"kl": mean, "max": largest, "coef": coefficient}
        if (target := self.limit.bound.limit) < math.inf:
            figures |= {"limit": target, "of_limit": mean / target}
            figures |= {} if attempted is None else {"attempted": attempted}
        return {f"reference/{name}": figure for name, figure in figures.items()}

    def state_dict(self) -> State:
        """The coefficient and the policy, so that a run goes on without the one that it refers to."""
        if not self.config.run:
            return {}
        if self.policy is None:
            self.read()
        policy = {} if self.policy is None else {"policy": self.policy.state_dict()}
        return {"limit": self.limit.state_dict(), **policy}

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state_dict``'s result."""
        if self.config.run not in ("", UNIFORM) and "policy" not in state:
            raise ValueError("it holds no reference's policy")
        if state:
            self.limit.load_state_dict(state["limit"])
        if "policy" in state:
            self.policy = FrozenPolicy.from_state(state["policy"], self.agent.device)
