"""The policy of SAC for a Box: tanh of a normal whose mean and standard deviation both depend on the state."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch import distributions as td

from klrl.policies.distributions import LOG_SQRT_TWO_PI, DiagonalNormal
from klrl.policies.networks import Array
from klrl.policies.spaces import check_bounded

_LOG_STD = (-20.0, 2.0)  # where the logarithm of the standard deviation is cut off, as in SB3
_NODES = torch.linspace(-8.0, 8.0, 129)  # in standard deviations: the trapezoidal rule for the entropy


class SquashedNormal(td.Distribution):
    """The joint of tanh(u_i) for independent normals u_i, from their means and log_stds, each [B, d].

    Actions are in (-1, 1)^d. tanh is invertible, so KL and Fisher information are those of the normals, ``base``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)
    has_rsample = True

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.base = DiagonalNormal(mean, log_std)
        self.loc, self.log_std = mean, log_std
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "SquashedNormal":
        return SquashedNormal(function(self.loc), function(self.log_std))

    def fisher_vector_product(self, to_mean: Tensor, to_log_std: Tensor) -> tuple[Tensor, Tensor]:
        """F v for a direction in the normals' mean and log_std, each [B, d]."""
        return self.base.fisher_vector_product(to_mean, to_log_std)

    def between(self, old: "SquashedNormal", weight: Tensor) -> "SquashedNormal":
        """The geometric mean with ``old``; weight: [B], this policy's part."""
        base = self.base.between(old.base, weight)
        return SquashedNormal(base.loc, base.log_std)

    def squash(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action tanh(mean + std * noise) and its log-density, [B, d] and [B], with gradients in the parameters.

        log p = log N(u) - sum log(1 - tanh(u)^2). Source: Haarnoja et al. (2018b), appendix C.
        """
        u = torch.addcmul(self.loc, self.log_std.exp(), noise)
        log_normal = -0.5 * noise.square() - self.log_std - LOG_SQRT_TWO_PI
        return torch.tanh(u), (log_normal - _log_slope(u)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]; -inf outside (-1, 1)."""
        u = torch.atanh(value)
        density = self.base.log_prob(u) - _log_slope(u).sum(-1)
        return torch.where((value.abs() < 1).all(-1), density, float("-inf"))

    def entropy(self) -> Tensor:
        """Joint differential entropy in nats, shape [B]: the normals' plus E[log(1 - tanh(u)^2)], by quadrature."""
        nodes = _NODES.to(self.loc)
        weights = torch.exp(-0.5 * nodes.square())
        u = self.loc.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes
        return self.base.entropy() + (_log_slope(u) @ (weights / weights.sum())).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Actions of shape [*sample_shape, B, d], with gradients in the parameters."""
        return torch.tanh(self.base.rsample(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Actions of shape [*sample_shape, B, d]."""
        return torch.tanh(self.base.sample(sample_shape))

    @property
    def mode(self) -> Tensor:
        """The action that is taken without noise: tanh of the normals' means."""
        return torch.tanh(self.loc)


def _log_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2), as 2 (log 2 - u - softplus(-2u)), which does not saturate."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


@td.register_kl(SquashedNormal, SquashedNormal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_squashed_normal(old: SquashedNormal, new: SquashedNormal) -> Tensor:
    return td.kl_divergence(old.base, new.base)


class SquashedHead(nn.Module):
    """A Box with finite bounds: outputs [B, 2d], means and log_stds, to a ``SquashedNormal``."""

    def __init__(self, space: spaces.Box) -> None:
        check_bounded(space)
        super().__init__()
        self.space = space
        self.dimensions = int(np.prod(space.shape))
        self.size = 2 * self.dimensions

    def forward(self, output: Tensor) -> SquashedNormal:
        mean, log_std = output.tensor_split(2, dim=-1)
        return SquashedNormal(mean, log_std.clamp(*_LOG_STD))

    def numbers(self, output: Array) -> tuple[Array, Array]:
        """The normals' means and log standard deviations, each [B, d], that outputs stand for."""
        return output[:, : self.dimensions], output[:, self.dimensions :].clip(*_LOG_STD)

    def sample(self, output: Array, rng: Any) -> Array:
        """Actions [B, d] in [-1, 1]."""
        return self.draw(*self.numbers(output), rng)

    def draw(self, mean: Array, log_std: Array, rng: Any) -> Array:
        """``sample`` by the normals' means and log standard deviations, each [B, d]."""
        if rng is None:
            return np.tanh(mean)
        noise = rng.standard_normal(mean.shape, dtype=np.float32)
        return np.tanh(mean + noise * np.exp(log_std))

    def to_env(self, action: Array) -> Array:
        """Actions [N, d] in [-1, 1] scaled to the bounds, [N, *space.shape]."""
        low, high = self.space.low, self.space.high
        scaled = low + (action.reshape(len(action), *self.space.shape) + 1) / 2 * (high - low)
        return scaled.clip(low, high).astype(self.space.dtype)

    def deployed(self, output: Tensor, noise: Tensor | None) -> Tensor:
        """``to_env`` of the mode, or of the action that standard normal noise [N, d] draws, in torch."""
        policy, (low, high) = self(output), (torch.from_numpy(x) for x in (self.space.low, self.space.high))
        action = policy.mode if noise is None else policy.squash(noise)[0]
        scaled = low + (action.reshape(-1, *low.shape) + 1) / 2 * (high - low)
        return scaled.clamp(low, high).to(low.dtype)

    def metrics(self) -> dict[str, float]:
        return {}


class CorrelatedNoise:
    """Standard normal noise for each environment, correlated with the one before: x' = c x + sqrt(1 - c^2) n.

    Independent noise averages out over the many steps that some tasks need in one direction; each single action has the
    policy's distribution either way. (Eberhard et al. 2023 study such noise; theirs is pink.)
    """

    def __init__(self, rng: np.random.Generator, correlation: float) -> None:
        self.rng, self.correlation = rng, correlation
        self.last: Array | None = None

    def standard_normal(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Draw the next noise; it begins anew where ``shape`` is not that of the last."""
        noise: Array = self.rng.standard_normal(shape, dtype=dtype)
        if self.correlation > 0 and self.last is not None and self.last.shape == shape:
            noise = self.correlation * self.last + math.sqrt(1 - self.correlation**2) * noise
        self.last = noise
        return noise

    def standard_exponential(self, shape: tuple[int, ...]) -> Array:
        """Draw independent exponential noise, which discrete actions take."""
        return self.rng.standard_exponential(shape)

    def uniform(self, shape: tuple[int, ...]) -> Array:
        """Draw the next noise and send it through the normal's distribution function: uniform on -1 to 1."""
        result: Array = torch.erf(torch.from_numpy(self.standard_normal(shape)) / math.sqrt(2)).numpy()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"last": None if self.last is None else torch.from_numpy(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = None if state["last"] is None else state["last"].numpy()
