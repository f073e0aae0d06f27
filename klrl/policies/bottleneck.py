"""A policy's network through a bottleneck: a normal code of few numbers, whose KL to a standard normal is its rate."""

import torch
from torch import Tensor, nn

from klrl.kl import normal_kl
from klrl.policies.encoder import Inputs
from klrl.policies.torso import linear


class BottleneckNetwork(nn.Module):
    """Encoded observations to a code, a normal over ``size`` numbers, and a linear layer from it to outputs.

    Acting takes the code's mean, so that the policy is a function of its weights whose KL is exact; learning also sees
    samples. Sources: Alemi et al. (2017), "Deep variational information bottleneck"; Igl et al. (2019), selective noise
    injection.
    """

    def __init__(self, encoder: nn.Module, size: int, outputs: int, rng: torch.Generator) -> None:
        """``encoder``: from inputs to the codes' means and log standard deviations, [B, 2 size]."""
        super().__init__()
        self.encoder, self.output = encoder, linear(size, outputs, 1.0, rng)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.output(self.code(inputs)[0])

    def code(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The codes' means and log standard deviations, each [B, size]."""
        mean, log_std = self.encoder(inputs).chunk(2, -1)
        return mean, log_std


def rate(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(code||standard normal), [B], in nats, of normals [B, size]. Source: Alemi et al. (2017), equation 17."""
    return normal_kl(mean, log_std, torch.zeros_like(mean), torch.zeros_like(log_std)).sum(-1)
