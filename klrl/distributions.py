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

from klrl.kl import categorical_kl, normal_kl

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

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised log-probabilities, shape [B, k, n]."""
        return torch.log_softmax(self.logits, dim=-1)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "Categoricals":
        return Categoricals(function(self.logits))

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]."""
        result: Tensor = _CategoricalLogProb.apply(self.logits, value)  # type: ignore[no-untyped-call]
        return result

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
        result: Tensor = _NormalLogProb.apply(self.loc, self.log_std, value)  # type: ignore[no-untyped-call]
        return result

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


class _CategoricalLogProb(torch.autograd.Function):
    """d log pi(a) / d logits = onehot(a) - pi, in one node instead of five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor) -> Tensor:
        index = value.unsqueeze(-1)
        log_probs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs, index)
        return log_probs.gather(-1, index).sum((-2, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_probs, index = ctx.saved_tensors
        grad = grads[0][:, None, None]
        return (-grad * log_probs.exp()).scatter_add_(-1, index, grad.expand_as(index)), None


class _NormalLogProb(torch.autograd.Function):
    """d log pi(a) / d mu = z / sigma and d / d log sigma = z^2 - 1, with z = (a - mu) / sigma."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, value: Tensor) -> Tensor:
        inverse_std = torch.exp(-log_std)
        z = (value - mean).mul_(inverse_std)
        ctx.save_for_backward(z, inverse_std)
        return torch.addcmul(log_std, z, z, value=0.5).sum(-1).neg_().sub_(value.shape[-1] * _LOG_SQRT_TWO_PI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, inverse_std = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        to_mean = grad * z
        return to_mean * inverse_std, to_mean * z - grad, None


PolicyDistribution = Categoricals | DiagonalNormal


@td.register_kl(Categoricals, Categoricals)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_categoricals(old: Categoricals, new: Categoricals) -> Tensor:
    return categorical_kl(old.logits, new.logits).sum(-1)


@td.register_kl(DiagonalNormal, DiagonalNormal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_diagonal_normal(old: DiagonalNormal, new: DiagonalNormal) -> Tensor:
    return normal_kl(old.loc, old.log_std, new.loc, new.log_std).sum(-1)
