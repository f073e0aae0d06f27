"""The information bottleneck of a policy: what its options are, and what it adds to a loss."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from klrl.agents.base import Agent, State
from klrl.config import Checked, Needs, NonNegative, PositiveInt, Range
from klrl.errors import UsageError
from klrl.kl import KLLimit, at_most, mutual_information
from klrl.kl.measure import state_mean
from klrl.kl.rules import PENALTIES, Start
from klrl.policies.bottleneck import BottleneckNetwork, rate
from klrl.policies.distributions import MultiCategorical
from klrl.policies.encoder import Inputs
from klrl.policies.policy import masked

_USED = Needs("size")


@dataclass(frozen=True)
class BottleneckConfig(Checked):
    """How much the policy may know of an observation."""

    group = "bottleneck."

    size: Annotated[int, Range(0, 16_384)] = 0
    """Numbers of the normal code between the policy's hidden layers and its outputs; 0 makes no bottleneck."""
    target: Annotated[NonNegative, _USED] = 2.0
    """Limit on the code's mean KL to a standard normal, its rate, in nats; 0 sets none."""
    rule: Annotated[Literal["lagrange", "adaptive", "fixed", "annealed", "cyclical"], _USED] = "lagrange"
    """How the coefficient of the rate in the loss moves, as with kl.penalty; the first two need a target."""
    coef: Annotated[NonNegative, _USED] = 1e-2
    """That coefficient at the start."""
    anneal_to: Annotated[NonNegative, _USED] = 1e-2
    """An annealed or cyclical coefficient at its schedule's end, or at the end of each of four cycles."""
    anneal_over: Annotated[PositiveInt, _USED] = 1000
    """How many updates that schedule takes."""


class Bottleneck:
    """What ``config`` asks for of ``agent``'s policy, whose network is a ``BottleneckNetwork``."""

    def __init__(self, config: BottleneckConfig, agent: Agent) -> None:
        """Raises UsageError where the options contradict each other."""
        if config.size and config.target == 0 and config.rule in ("lagrange", "adaptive"):
            raise UsageError(f"--bottleneck.rule {config.rule} needs a --bottleneck.target above 0, such as 2")
        self.config, self.agent = config, agent
        bound = at_most(config.target or math.inf)
        penalty = PENALTIES[config.rule](Start(config.coef, bound, True, config.anneal_to, config.anneal_over))
        self.limit = KLLimit(bound, penalty=penalty, stop=0.0, device=agent.device)

    def network(self, make: Callable[[int, float], nn.Module], outputs: int, init: torch.Generator) -> nn.Module:
        """The policy's network, on one of ``make``'s, from outputs and their gain."""
        if not self.config.size:
            return make(outputs, 0.01)
        return BottleneckNetwork(make(2 * self.config.size, 0.01), self.config.size, outputs, init)

    def noisy(self, inputs: Inputs) -> tuple[Any, Tensor]:
        """The policy by one sample of each state's code, and what the rates add to each state's loss, [B]."""
        network: Any = self.agent.policy.network
        mean, log_std = network.code(inputs)
        noise = torch.from_numpy(self.agent.rng.standard_normal(tuple(mean.shape), dtype="float32")).to(mean)
        code = torch.addcmul(mean, log_std.exp(), noise)
        return self.agent.policy.head(masked(network.output(code), inputs)), self.limit.beta * rate(mean, log_std)

    @torch.no_grad()
    def end(self, inputs: Inputs, policy: Any, mask: Tensor) -> dict[str, float]:
        """Measure the rate after an update, let its coefficient answer, and say what is to be logged.

        Of discrete actions also I(S; A), in nats: what the policy tells of the state.
        """
        network, ranks = self.agent.policy.network, self.limit.ranks
        if not isinstance(network, BottleneckNetwork):
            return {}
        mean = float(state_mean(rate(*network.code(inputs)), mask, ranks))
        figures = {"rate": mean, "coef": self.limit.penalty.coefficient.value}
        if isinstance(policy, MultiCategorical):
            (logits,) = ranks.rows(policy.logits[mask])
            with suppress(ValueError):  # more joint actions than can be written out
                figures["information"] = float(mutual_information(MultiCategorical(logits)))
        self.limit.adapt(mean)
        return {f"bottleneck/{name}": figure for name, figure in figures.items()}

    def state_dict(self) -> State:
        return self.limit.state_dict() if self.config.size else {}

    def load_state_dict(self, state: State) -> None:
        if state:
            self.limit.load_state_dict(state)
