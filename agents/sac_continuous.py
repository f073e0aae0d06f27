"""SAC for Box actions: a tanh-squashed normal, expectations over its actions by one sample (Haarnoja et al. 2018b)."""

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.policies.encoder import Inputs
from klrl.policies.networks import Array, TwinCritic
from klrl.policies.squashed import CorrelatedNoise, SquashedHead, SquashedNormal


class SampledActions:
    """What SAC needs to know of actions that it samples."""

    def __init__(self, space: spaces.Box, target_entropy: float) -> None:
        self.head = SquashedHead(space)
        self.dimensions = self.stored_width = self.head.dimensions
        self.critic_shape = (self.dimensions, 1)
        """The action's width in the critics' input, and their number of outputs."""
        self.target_entropy = target_entropy * self.dimensions

    def draw_noise(self, rng: np.random.Generator, rows: int) -> Tensor:
        """Standard normal noise [2, rows, d]: for the next states' actions and for the present ones'."""
        return torch.from_numpy(rng.standard_normal((2, rows, self.dimensions), dtype=np.float32))

    def q(self, critic: TwinCritic, inputs: Inputs, action: Tensor) -> Tensor:
        """Q(s, a) of both critics, [2, B]."""
        return critic(inputs, action).squeeze(-1)

    def soft_value(
        self, policy: SquashedNormal, critic: TwinCritic, inputs: Inputs, alpha: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V(s) = min Q(s, a) - alpha log pi(a|s) for one a of the policy, and the sample -log pi of its entropy, [B].

        Source: Haarnoja et al. (2018b), equation 3; with its gradient through a, less its sign, equation 9.
        """
        action, log_prob = policy.squash(noise)
        return critic(inputs, action).squeeze(-1).amin(0) - alpha * log_prob, -log_prob

    def value(self, policy: SquashedNormal, critic: TwinCritic, inputs: Inputs, alpha: Tensor) -> Tensor:
        """min Q(s, a), [B], of the action that the policy takes without noise."""
        return critic(inputs, policy.mode).squeeze(-1).amin(0)

    def random(self, noise: CorrelatedNoise, rows: int) -> Array:
        """Actions [rows, d], uniform over the bounds."""
        return noise.uniform((rows, self.dimensions))
