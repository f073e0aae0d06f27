"""A critic whose last layer is a distribution over weights, so that it says how sure it is of a state's value."""

from typing import Any

import torch
from torch import Tensor, nn

from klrl.kl import Ranks, normal_kl, state_mean
from klrl.policies.encoder import Inputs
from klrl.policies.networks import Critic
from klrl.policies.torso import linear

_PRIOR_LOG_STD, _FIRST_LOG_STD = 0.0, -3.0


class BayesianCritic(Critic):
    """The state value by a last layer of independent normal weights q, with a standard normal prior p.

    Its loss is E_q[(V - return)^2] + weight KL(q||p). V is normal in each state (local reparameterisation, Kingma et
    al. 2015), so that the expectation is exact: the mean's squared error plus V's variance, and nothing is sampled.
    Source: Blundell et al. (2015), "Weight uncertainty in neural networks", equation 2.
    """

    def __init__(self, network: nn.Module, width: int, kl_weight: float, rng: torch.Generator) -> None:
        """``network``: from inputs to features [B, width]."""
        super().__init__(network)
        self.kl_weight = kl_weight
        self.output = linear(width, 1, 1.0, rng)
        self.log_std = nn.Parameter(torch.full((width,), _FIRST_LOG_STD))

    def forward(self, inputs: Inputs) -> Tensor:
        """V's mean, [B]."""
        value: Tensor = self.output(torch.tanh(self.network(inputs)))
        return value.squeeze(-1)

    def variance(self, inputs: Inputs) -> Tensor:
        """V's variance under q, [B]."""
        return torch.tanh(self.network(inputs)).square() @ (2 * self.log_std).exp()

    def kl(self) -> Tensor:
        """KL(q||p), summed over the weights, a scalar, in nats."""
        mean, prior = self.output.weight[0], torch.full_like(self.log_std, _PRIOR_LOG_STD)
        return normal_kl(mean, self.log_std, torch.zeros_like(mean), prior).sum()

    def cost(self, batch: Any) -> Tensor:
        whole = batch.weight.sum()  # about 1, or this rank's share of it
        return batch.weight @ self.variance(batch.inputs) + self.kl_weight * whole * self.kl()

    @torch.no_grad()
    def metrics(self, batch: Any, ranks: Ranks) -> dict[str, float]:
        """The mean standard deviation of V over a batch's states, as the critic's values are scaled, and KL(q||p)."""
        spread = state_mean(self.variance(batch.inputs).sqrt(), batch.mask, ranks)
        return {"health/value_std": float(spread), "health/critic_kl": float(self.kl())}
