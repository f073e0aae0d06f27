"""Policy distributions: one joint distribution per state, whatever the action space.

Two families cover Gymnasium's four action spaces: independent categoricals (Discrete is one of them, MultiBinary is
pairs, MultiDiscrete any sizes) and a diagonal normal (Box). Both are torch distributions with ``batch_shape`` [B],
entered in torch's own ``kl_divergence`` with the exact forms of ``klrl.kl``.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import Direction, categorical_kl, normal_kl
from klrl.kl.closed_form import categorical_kl_of, exact_log_probs

_LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Categoricals(td.Distribution):
    """The joint of k independent categoricals over at most n choices, from logits of shape [B, k, n].

    -inf forbids a choice (and pads shorter ones): it has probability 0, no entropy and no gradient.
    Actions are int64 of shape [B, k].
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    @property
    def param_shape(self) -> torch.Size:
        """[B, k, n]: what must agree for two to be compared."""
        return self.logits.shape

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised log-probabilities, shape [B, k, n]."""
        return torch.log_softmax(self.logits, dim=-1)

    @cached_property
    def exact_log_probs(self) -> Tensor:
        """Log-probabilities in float64, without gradient: what KL is measured with."""
        return exact_log_probs(self.logits.detach())

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "Categoricals":
        return Categoricals(function(self.logits))

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]."""
        return self.log_probs.gather(-1, value.unsqueeze(-1)).sum((-2, -1))

    def gradient(
        self,
        action: Tensor,
        to_log_prob: Tensor,
        old: "Categoricals",
        to_kl: Tensor | None = None,
        to_entropy: Tensor | None = None,
        direction: Direction = "forward",
    ) -> tuple[Tensor]:
        """d/d logits of sum_b to_log_prob * log pi(a) + to_kl * KL(old, self) + to_entropy * H, each weight [B].

        With p = pi, q = old, per categorical: onehot(a) - p; p - q, or p * (log p/q - KL(p||q)) for the reverse KL;
        -p * (log p + H). Written out because three such graphs cost more than the networks they stand on.
        """
        a = to_log_prob[:, None, None]
        log_p = self.log_probs
        p = log_p.exp()
        result = p * -a
        if to_kl is not None and direction == "forward":
            result += (p - old.log_probs.exp()) * to_kl[:, None, None]
        elif to_kl is not None:
            excess = torch.where(p > 0, log_p - old.log_probs, 0.0)
            result += p * (excess - (p * excess).sum(-1, keepdim=True)) * to_kl[:, None, None]
        if to_entropy is not None:
            finite = log_p.clamp_min(torch.finfo(p.dtype).min)
            result -= p * (finite - (p * finite).sum(-1, keepdim=True)) * to_entropy[:, None, None]
        index = action.unsqueeze(-1)
        return (result.scatter_add_(-1, index, a.expand_as(index)),)

    def entropy(self) -> Tensor:
        """Joint entropy in nats, shape [B]."""
        # exp(-inf) * lowest is -0 where exp(-inf) * -inf would be nan, forward and backward.
        log_probs = self.log_probs.clamp_min(torch.finfo(self.logits.dtype).min)
        return -(log_probs.exp() * log_probs).sum((-2, -1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """int64 actions of shape [*sample_shape, B, k], by the Gumbel-max rule."""
        noise = torch.empty((*sample_shape, *self.logits.shape), device=self.logits.device).exponential_()
        return (self.logits - noise.log_()).argmax(dim=-1)

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(dim=-1)


class DiagonalNormal(td.Distribution):
    """The joint of d independent normals, from ``mean`` and ``log_std`` of shape [B, d]. Actions are [B, d]."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = mean, log_std
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "DiagonalNormal":
        return DiagonalNormal(function(self.loc), function(self.log_std))

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]."""
        z = (value - self.loc) * torch.exp(-self.log_std)
        return -torch.addcmul(self.log_std, z, z, value=0.5).sum(-1) - value.shape[-1] * _LOG_SQRT_TWO_PI

    def gradient(
        self,
        action: Tensor,
        to_log_prob: Tensor,
        old: "DiagonalNormal",
        to_kl: Tensor | None = None,
        to_entropy: Tensor | None = None,
        direction: Direction = "forward",
    ) -> tuple[Tensor, Tensor]:
        """d/d(mean, log_std) of sum_b to_log_prob * log pi(a) + to_kl * KL(old, self) + to_entropy * H, weights [B].

        With z = (a - mu)/sigma: (z/sigma, z^2 - 1); with d = (mu - mu_old)/sigma and u = 2 log(sigma_old/sigma):
        (d/sigma, 1 - d^2 - e^u), or ((mu - mu_old)/sigma_old^2, e^-u - 1) for the reverse KL; (0, 1).
        """
        inverse_std = torch.exp(-self.log_std)
        a = to_log_prob[:, None]
        z = (action - self.loc) * inverse_std
        to_mean, to_log_std = a * z * inverse_std, a * (z * z - 1)
        if to_kl is not None:
            k, u, shift = to_kl[:, None], 2 * (old.log_std - self.log_std), self.loc - old.loc
            if direction == "forward":
                d = shift * inverse_std
                to_mean += k * d * inverse_std
                to_log_std -= k * (d * d + torch.expm1(u))
            else:
                to_mean += k * shift * torch.exp(-2 * old.log_std)
                to_log_std += k * torch.expm1(-u)
        if to_entropy is not None:
            to_log_std += to_entropy[:, None]
        return to_mean, to_log_std

    def entropy(self) -> Tensor:
        """Joint differential entropy in nats, shape [B]."""
        return self.log_std.sum(-1) + self.loc.shape[-1] * (0.5 + _LOG_SQRT_TWO_PI)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Actions of shape [*sample_shape, B, d]."""
        noise = torch.randn((*sample_shape, *self.loc.shape), device=self.loc.device)
        return (noise * self.log_std.exp() + self.loc).detach()

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        return self.loc


def squash(normal: DiagonalNormal, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The action tanh(u) with u = mean + std * noise, and its log-density, [B, d] and [B].

    log p = log N(u) - sum log(1 - tanh(u)^2), the latter as 2 (log 2 - u - softplus(-2u)), which does not saturate.
    Source: Haarnoja et al. (2018b), appendix C.
    """
    std = normal.log_std.exp()
    u = torch.addcmul(normal.loc, std, noise)
    log_normal = -0.5 * noise.square() - normal.log_std - _LOG_SQRT_TWO_PI
    log_slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


def squash_gradient(
    normal: DiagonalNormal, noise: Tensor, action: Tensor, to_action: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """d/d(mean, log_std) of sum_b alpha * log p + to_action . action, at fixed noise; alpha: [B].

    With u as in ``squash``: d log p / du = 2 tanh(u), besides -1 for log_std directly.
    """
    a = alpha[:, None]
    to_u = 2 * a * action + to_action * (1 - action.square())
    return to_u, to_u * normal.log_std.exp() * noise - a


PolicyDistribution = Categoricals | DiagonalNormal


@td.register_kl(Categoricals, Categoricals)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_categoricals(old: Categoricals, new: Categoricals) -> Tensor:
    if torch.is_grad_enabled() and (old.logits.requires_grad or new.logits.requires_grad):
        return categorical_kl(old.logits, new.logits).sum(-1)
    # A policy is measured against many others, forward and in reverse: what KL needs of it is computed once.
    return categorical_kl_of(old.exact_log_probs, new.exact_log_probs).sum(-1).to(new.logits.dtype)


@td.register_kl(DiagonalNormal, DiagonalNormal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_diagonal_normal(old: DiagonalNormal, new: DiagonalNormal) -> Tensor:
    return normal_kl(old.loc, old.log_std, new.loc, new.log_std).sum(-1)
