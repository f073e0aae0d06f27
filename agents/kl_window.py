"""Many small updates measured as one: how far an off-policy agent's policy moved since a block of them began."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from klrl.agents.base import State
from klrl.kl import Bound, Direction, KLReport, measure
from klrl.policies.distributions import DiagonalNormal, PolicyDistribution
from klrl.policies.encoder import Inputs


@dataclass
class Block:
    """The policy's steps between two measurements of its KL."""

    inputs: Inputs
    """The replay states that it is measured on."""
    old: PolicyDistribution
    """The policy at those states when the block began."""
    before: State
    """What was learned when it began."""
    steps: int = 0
    stopped: int = 0
    """The step after which the policy stood still, as its KL exceeded the limit; 0 if none did."""
    trace: list[Tensor] = field(default_factory=list)
    """Figures of each step, to be averaged."""

    def measure(self, new: PolicyDistribution, bound: Bound, direction: Direction) -> KLReport:
        """How far ``new`` is from the policy of the beginning; a normal is that of a tanh-squashed action."""
        pair: tuple[Any, Any] = (self.old, new)
        if isinstance(new, DiagonalNormal):  # tanh changes no KL, but the entropy
            pair = tuple(td.TransformedDistribution(dist, [td.TanhTransform()]) for dist in pair)  # type: ignore[assignment]
        return measure(*pair, bound, direction=direction, samples=32)

    def state_dict(self) -> State:
        """All but ``old``, which follows from ``before``."""
        trace = torch.stack(self.trace) if self.trace else None
        parts = {"inputs": self.inputs, "before": self.before, "trace": trace}
        return {**parts, "steps": self.steps, "stopped": self.stopped}

    @staticmethod
    def from_state(state: State, policy: Callable[[Inputs], PolicyDistribution], device: torch.device) -> "Block":
        """The block as it was; ``policy`` must have the weights that it had when the block began."""
        inputs = {key: part.to(device) for key, part in state["inputs"].items()}
        trace = [] if state["trace"] is None else list(state["trace"].to(device))
        return Block(inputs, policy(inputs), state["before"], state["steps"], state["stopped"], trace)
