"""SAC for Discrete, MultiDiscrete and MultiBinary actions: exact expectations over actions (Christodoulou 2019)."""

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.policies.distributions import MultiCategorical
from klrl.policies.encoder import Inputs
from klrl.policies.heads import JointCategoricalHead
from klrl.policies.networks import Array, TwinCritic
from klrl.policies.squashed import CorrelatedNoise


class EnumeratedActions:
    """What SAC needs to know of actions that it counts, each joint action by its number."""

    dimensions, stored_width = 1, 1

    def __init__(self, space: spaces.Space[Any], target_entropy_fraction: float) -> None:
        self.head = JointCategoricalHead(space)
        self.critic_shape = (0, self.head.size)
        """The action's width in the critics' input, and their number of outputs."""
        self.target_entropy = target_entropy_fraction * math.log(self.head.size)

    def draw_noise(self, rng: np.random.Generator, rows: int) -> Tensor:
        """Nothing, twice: the expectation is exact."""
        return torch.zeros(2, 0)

    def q(self, critic: TwinCritic, inputs: Inputs, action: Tensor) -> Tensor:
        """Q(s, a) of both critics, [2, B]."""
        return critic(inputs).gather(-1, action.long().expand(2, *action.shape)).squeeze(-1)

    def soft_value(
        self, policy: MultiCategorical, critic: TwinCritic, inputs: Inputs, alpha: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V(s) = sum_a pi(a|s) (min Q(s, a) - alpha log pi(a|s)), and the policy's entropy, [B].

        Source: Christodoulou (2019), equation 10; its gradient in pi, less its sign, equation 12.
        """
        with torch.no_grad():
            q = critic(inputs).amin(0)
        log_prob = policy.log_probs.squeeze(1).clamp_min(torch.finfo(torch.float32).min)
        return (log_prob.exp() * (q - alpha * log_prob)).sum(-1), policy.entropy()

    def value(self, policy: MultiCategorical, critic: TwinCritic, inputs: Inputs, alpha: Tensor) -> Tensor:
        """V(s), [B]."""
        return self.soft_value(policy, critic, inputs, alpha, torch.zeros(0))[0]

    def random(self, noise: CorrelatedNoise, rows: int) -> Array:
        """Actions [rows, 1], uniform over all."""
        actions: Array = noise.rng.integers(self.head.size, size=(rows, 1))
        return actions
