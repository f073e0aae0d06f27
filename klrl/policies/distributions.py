"""Policy distributions: one joint distribution per state, whatever the action space.

Two families cover Gymnasium's four action spaces: independent categoricals (Discrete is one of them, MultiBinary is
pairs, MultiDiscrete any sizes) and a diagonal normal (Box). Both are torch distributions with ``batch_shape`` [B],
entered in torch's own ``kl_divergence`` with the exact forms of ``klrl.kl``.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.errors import UsageError
from klrl.kl import categorical_kl, normal_kl
from klrl.kl.closed_form import categorical_kl_of, log_probs_64
from klrl.kl.fisher import softmax_fisher
from klrl.kl.projection import mix_logits, mix_normals

LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


@runtime_checkable
class KnowsUniform(Protocol):
    """A policy of a kind that can take all actions alike."""

    def uniform(self) -> td.Distribution: ...


class MultiCategorical(td.Distribution):
    """The joint of k independent categoricals over at most n choices, from logits of shape [B, k, n].

    -inf forbids a choice (and pads shorter ones): it has probability 0, no entropy and no gradient.
    Actions are int64 of shape [B, k].
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._log_probs: Tensor | None = None
        self._log_probs_64: Tensor | None = None
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    @property  # not functools.cached_property, whose lock no compiled step can hold
    def log_probs(self) -> Tensor:
        """Normalised log-probabilities, shape [B, k, n]."""
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits, dim=-1)
        return self._log_probs

    @property
    def probs(self) -> Tensor:
        """Probabilities, shape [B, k, n]."""
        return self.log_probs.exp()

    @property
    def log_probs_64(self) -> Tensor:
        """Log-probabilities in float64, without gradient: what KL is measured with."""
        if self._log_probs_64 is None:
            self._log_probs_64 = log_probs_64(self.logits.detach())
        return self._log_probs_64

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "MultiCategorical":
        return MultiCategorical(function(self.logits))

    def fisher_vector_product(self, vector: Tensor) -> tuple[Tensor]:
        """F v for a direction [B, k, n] in the logits."""
        return (softmax_fisher(self.log_probs.exp(), vector),)

    def between(self, old: "MultiCategorical", weight: Tensor) -> "MultiCategorical":
        """The geometric mean with ``old``; weight: [B], this policy's part."""
        return MultiCategorical(mix_logits(old.logits, self.logits, weight[..., None, None]))

    def uniform(self) -> "MultiCategorical":
        """The policy of the same kind that takes all allowed actions alike."""
        return self.map_parameters(lambda logits: torch.where(logits == -torch.inf, logits, 0.0))

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]."""
        return self.log_probs.gather(-1, value.unsqueeze(-1)).sum((-2, -1))

    def entropy(self) -> Tensor:
        """Joint entropy in nats, shape [B]."""
        # exp(-inf) * lowest is -0 where exp(-inf) * -inf would be nan, forward and backward.
        log_probs = self.log_probs.clamp_min(torch.finfo(self.logits.dtype).min)
        return -(log_probs.exp() * log_probs).sum((-2, -1))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """int64 actions of shape [*sample_shape, B, k], by the Gumbel-max rule."""
        noise = torch.empty((*sample_shape, *self.logits.shape), device=self.logits.device)
        noise = noise.exponential_(generator=generator)
        return (self.logits - noise.log_()).argmax(dim=-1)

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(dim=-1)


class DiagonalNormal(td.Distribution):
    """The joint of d independent normals, from ``mean`` and ``log_std`` of shape [B, d]. Actions are [B, d]."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)
    has_rsample = True

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = mean, log_std
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "DiagonalNormal":
        return type(self)(function(self.loc), function(self.log_std))

    def fisher_vector_product(self, to_mean: Tensor, to_log_std: Tensor) -> tuple[Tensor, Tensor]:
        """F v for a direction in mean and log_std, each [B, d]."""
        return to_mean * torch.exp(-2 * self.log_std), 2 * to_log_std

    def between(self, old: "DiagonalNormal", weight: Tensor) -> "DiagonalNormal":
        """The geometric mean with ``old``; weight: [B], this policy's part."""
        return type(self)(*mix_normals(old.loc, old.log_std, self.loc, self.log_std, weight.unsqueeze(-1)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s), shape [B]."""
        z = (value - self.loc) * torch.exp(-self.log_std)
        return -torch.addcmul(self.log_std, z, z, value=0.5).sum(-1) - value.shape[-1] * LOG_SQRT_TWO_PI

    def entropy(self) -> Tensor:
        """Joint differential entropy in nats, shape [B]."""
        return self.log_std.sum(-1) + self.loc.shape[-1] * (0.5 + LOG_SQRT_TWO_PI)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Actions of shape [*sample_shape, B, d], with gradients in the parameters."""
        noise = torch.randn((*sample_shape, *self.loc.shape), generator=generator, device=self.loc.device)
        return noise * self.log_std.exp() + self.loc

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Actions of shape [*sample_shape, B, d]."""
        return self.rsample(sample_shape, generator).detach()

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        return self.mode


@td.register_kl(MultiCategorical, MultiCategorical)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_multi_categorical(old: MultiCategorical, new: MultiCategorical) -> Tensor:
    if torch.is_grad_enabled() and (old.logits.requires_grad or new.logits.requires_grad):
        return categorical_kl(old.logits, new.logits).sum(-1)
    # A policy is measured against many others, forward and in reverse: what KL needs of it is computed once.
    return categorical_kl_of(old.log_probs_64, new.log_probs_64).sum(-1).to(new.logits.dtype)


@td.register_kl(DiagonalNormal, DiagonalNormal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_diagonal_normal(old: DiagonalNormal, new: DiagonalNormal) -> Tensor:
    return normal_kl(old.loc, old.log_std, new.loc, new.log_std).sum(-1)


def uniform_like(policy: td.Distribution) -> td.Distribution:
    """The policy of the same kind that takes all allowed actions alike; KL(policy||it) is that one's entropy, log n of
    n actions, less the policy's.

    Raises UsageError for a kind of which none does.
    """
    if not isinstance(policy, KnowsUniform):
        raise UsageError("only discrete actions, and a Beta's, can be uniform: a normal's KL to that is infinite")
    return policy.uniform()
