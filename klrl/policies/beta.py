"""A Beta policy for bounded actions: no action lies outside of the bounds, and none is clipped."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional

from klrl.kl.closed_form import beta_kl
from klrl.kl.fisher import beta_fisher
from klrl.policies.networks import Array
from klrl.policies.spaces import check_bounded

_EDGE = 2.0**-24  # how near to 0 and 1 an action may be: what is nearer to 1 is 1 in float32, where no density is
_PLAIN = 1 + math.log(2)  # both concentrations where a network's outputs are 0
_SHARPEST = 1e6


class JointBeta(td.Distribution):
    """The joint of d independent Betas, from concentrations at 1 and at 0, each [B, d]. Actions are in (0, 1)^d.

    Log-gammas are taken in float64: in float32 those of a sharp policy cancel to noise.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)
    has_rsample = True

    def __init__(self, concentration1: Tensor, concentration0: Tensor) -> None:
        self.concentration1, self.concentration0 = concentration1, concentration0
        super().__init__(concentration1.shape[:-1], concentration1.shape[-1:], validate_args=False)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "JointBeta":
        return JointBeta(function(self.concentration1), function(self.concentration0))

    def fisher_vector_product(self, to_one: Tensor, to_zero: Tensor) -> tuple[Tensor, Tensor]:
        """F v for a direction in both concentrations, each [B, d]."""
        return beta_fisher(self.concentration1, self.concentration0, to_one, to_zero)

    def between(self, old: "JointBeta", weight: Tensor) -> "JointBeta":
        """The geometric mean with ``old``; weight: [B], this policy's part."""
        pairs = ((old.concentration1, self.concentration1), (old.concentration0, self.concentration0))
        return JointBeta(*(torch.lerp(a, b, weight.unsqueeze(-1).to(b.dtype)) for a, b in pairs))

    def uniform(self) -> "JointBeta":
        """The policy of the same kind that takes all actions alike."""
        return self.map_parameters(torch.ones_like)

    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both concentrations and the logarithm of the Beta function, float64 [B, d]."""
        a, b = self.concentration1.double(), self.concentration0.double()
        return a, b, torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]; -inf outside of (0, 1)."""
        a, b, log_beta = self._wide()
        inside = (value > 0) & (value < 1)
        x = torch.where(inside, value, 0.5).double()
        density = (a - 1) * x.log() + (b - 1) * torch.log1p(-x) - log_beta
        return torch.where(inside, density, -torch.inf).sum(-1).to(self.concentration1.dtype)

    def entropy(self) -> Tensor:
        """Joint differential entropy in nats, shape [B]; 0 where all actions are alike, else below that."""
        a, b, log_beta = self._wide()
        slopes = (a - 1) * torch.digamma(a) + (b - 1) * torch.digamma(b) - (a + b - 2) * torch.digamma(a + b)
        return (log_beta - slopes).sum(-1).to(self.concentration1.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Actions of shape [*sample_shape, B, d], with gradients in the parameters."""
        beta = td.Beta(self.concentration1, self.concentration0, validate_args=False)
        return beta.rsample(torch.Size(sample_shape)).clamp(_EDGE, 1 - _EDGE)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Actions of shape [*sample_shape, B, d]."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def mode(self) -> Tensor:
        """The action that is taken without noise: the mean, as the likeliest may be a bound of a policy still wide."""
        return self.mean

    @property
    def mean(self) -> Tensor:
        return self.concentration1 / (self.concentration1 + self.concentration0)

    @property
    def stddev(self) -> Tensor:
        return (self.mean * (1 - self.mean) / (self.concentration1 + self.concentration0 + 1)).sqrt()


@td.register_kl(JointBeta, JointBeta)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_joint_beta(old: JointBeta, new: JointBeta) -> Tensor:
    parameters = (old.concentration1, old.concentration0, new.concentration1, new.concentration0)
    return beta_kl(*parameters).sum(-1).to(new.concentration1.dtype)


class BetaHead(nn.Module):
    """A Box with finite bounds: outputs [B, 2d] to a ``JointBeta`` with one mode, both concentrations above 1.

    Concentrations are 1 + softplus(output + offset), where the offset gives outputs of 0 the standard deviation
    exp(log_std_init), of an action that spans -1 to 1, or 0.48 where that is more. Source: Chou et al. (2017),
    "Improving stochastic policy gradients in continuous control ... using the Beta distribution", section 3.
    """

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        check_bounded(space, "a Beta policy's")
        super().__init__()
        self.space = space
        self.dimensions = int(np.prod(space.shape))
        self.size = 2 * self.dimensions
        wanted = (math.exp(-2 * log_std_init) - 1) / 2  # the variance on -1 to 1 is 1 / (2 a + 1), a being both
        above = min(max(wanted, _PLAIN), _SHARPEST) - 1
        self.offset = above + math.log(-math.expm1(-above))  # whose softplus it is

    def forward(self, output: Tensor) -> JointBeta:
        return JointBeta(*(1 + functional.softplus(output + self.offset)).tensor_split(2, dim=-1))

    def sample(self, output: Array, rng: Any) -> Array:
        """Actions [B, d] in (0, 1)."""
        if rng is None:
            return self(torch.from_numpy(output)).mode.numpy()
        a, b = np.split(1 + np.logaddexp(0.0, output + self.offset), 2, axis=-1)
        return rng.beta(a, b).clip(_EDGE, 1 - _EDGE).astype(np.float32)

    def to_env(self, action: Array) -> Array:
        """Actions [N, d] in (0, 1) scaled to the bounds, [N, *space.shape]."""
        low, high = self.space.low, self.space.high
        scaled = low + action.reshape(len(action), *self.space.shape) * (high - low)
        return scaled.clip(low, high).astype(self.space.dtype)

    def deployed(self, output: Tensor, noise: Tensor | None) -> Tensor:
        """``to_env`` of the mean, in torch; no noise is known that draws a Beta's actions."""
        low, high = (torch.from_numpy(x) for x in (self.space.low, self.space.high))
        scaled = low + self(output).mode.reshape(-1, *low.shape) * (high - low)
        return scaled.clamp(low, high).to(low.dtype)

    def metrics(self) -> dict[str, float]:
        return {}
