"""Exact divergences between policy distributions, one value per state.

Every function takes ``old`` first, returns nats and sums over action dimensions. No formula subtracts large numbers to
get a small one: each is second order in the difference of the two policies, as KL itself is. The textbook p*log(p/q) in
float32 leaves an error of about 1e-7, which is more than the KL of a small policy step.

Conventions: 0*log 0 = 0; where old has mass and new has none, KL is +inf, never a clamped number; actions that both
forbid (logit -inf) drop out. KL >= 0 always and KL(p||p) = 0 exactly, but for the rounding of formulas of torch's own.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import closed_form, state
from klrl.kl.parameters import map_parameters, name_of, parameters_of
from klrl.kl.state import NotSupportedError, in_float64, same_state, tensors_of

Units = Literal["nats", "bits"]


@runtime_checkable
class Tabular(Protocol):
    """A discrete distribution of one's own, as logits [*batch, *parts, n] of independent parts; -inf forbids."""

    logits: Tensor

    @property
    def log_probs_64(self) -> Tensor: ...


def kl(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """KL(old || new) in closed form, shape ``batch_shape``.

    A bare ``Normal`` or ``Bernoulli`` with parameters of shape [B, d] keeps its dimensions, as everywhere in torch;
    wrap it in ``joint`` to sum over them. Differentiable in both arguments, and twice, so that its Hessian at
    old = new is the Fisher information.

    What is exact is the KL of the parameters that the distributions hold. ``Categorical(logits=...)`` normalises its
    logits in their own dtype when it is made; ``categorical_kl`` takes them as they are.

    Categorical, Bernoulli, normal, full-covariance normal, Beta, products and bijective transforms of these are
    computed here; what torch has registered besides (Gamma, Dirichlet, Poisson, ...) is its formula in float64, which
    leaves an error of about 1e-15 times the terms that it subtracts. A KL that a package of your own registered with
    torch is taken as it is, and a subclass as its family, whatever its own ``log_prob`` says.

    Raises ValueError for different shapes, parameters that are nan, or a pair without a closed form, whose KL
    ``mc_kl`` estimates: also where a transform's own parameters differ, or, with gradients, learn.
    Source: Kullback and Leibler (1951), equation 2.4.
    """
    value = _kl(old, new)
    # No KL is -inf, so only a nan makes their sum one.
    if state.may_look() and math.isnan(value.detach().sum()):
        raise_nan(old, new)
    return in_units(value, units)


def raise_nan(old: td.Distribution, new: td.Distribution) -> None:
    """Raise the ValueError that says why the divergence of the two is nan."""
    for side, dist in (("old", old), ("new", new)):
        with contextlib.suppress(NotSupportedError):
            if any(bool(parameter.isnan().any()) for parameter in parameters_of(dist)):
                raise ValueError(f"{side} is a {name_of(dist)} with parameters that are nan")
    raise ValueError(f"the KL between {name_of(old)} and {name_of(new)} is nan: their parameters are out of range")


def _kl(old: td.Distribution, new: td.Distribution) -> Tensor:
    same_shape(old, new)
    if isinstance(old, td.Independent) and isinstance(new, td.Independent):
        value = _kl(old.base_dist, new.base_dist)
        for _ in range(old.reinterpreted_batch_ndims):
            value = closed_form.sum_last(value)
        return value
    try:
        for family, function in _STABLE.items():
            if isinstance(old, family) and isinstance(new, family):
                return function(old, new)
        return _by_torch(old, new)
    except NotImplementedError:
        raise NoClosedFormError(f"no closed-form KL between {name_of(old)} and {name_of(new)}") from None


def _by_torch(old: td.Distribution, new: td.Distribution) -> Tensor:
    """The registered formula; torch's own in float64, as in float32 it cancels."""
    registered: Any = td.kl._dispatch_kl(type(old), type(new))  # type: ignore[no-untyped-call]
    if getattr(registered, "__module__", None) != td.kl.__name__:
        return td.kl_divergence(old, new)
    if isinstance(old, td.Wishart):  # torch's is wrong: 0.35 nats, of 4 degrees of freedom and 5, are -1.6 to it
        raise NotImplementedError
    floats = [x.dtype for dist in (old, new) for x in tensors_of(dist) if x.is_floating_point()]
    value = td.kl_divergence(in_float64(old), in_float64(new)).clamp_min(0.0)
    return value.to(reduce(torch.promote_types, floats))


class NoClosedFormError(ValueError):
    """The pair of distributions has no closed-form KL; ``mc_kl`` estimates it where both can score samples."""


def in_units(nats: Tensor, units: Units) -> Tensor:
    """Nats as "nats" or "bits". Raises ValueError for another unit."""
    if units not in ("nats", "bits"):
        raise ValueError(f"units must be 'nats' or 'bits', got {units!r}")
    return nats if units == "nats" else nats / math.log(2)


def reverse_kl(old: td.Distribution, new: td.Distribution) -> Tensor:
    """KL(new || old), shape ``batch_shape``, in nats: the direction that seeks one mode of ``old``."""
    return kl(new, old)


def joint(dist: td.Distribution | Sequence[td.Distribution]) -> td.Distribution:
    """One distribution per state: every batch dimension after the first becomes an action dimension.

    ``joint(Normal(mean, std))`` with parameters of shape [B, d] has ``batch_shape`` [B], so its KL is the joint one.
    A list of distributions, such as a MultiDiscrete's categoricals of unequal sizes, becomes their product.
    """
    if not isinstance(dist, td.Distribution):
        return Product([joint(part) for part in dist])
    extra = len(dist.batch_shape) - 1
    return td.Independent(dist, extra) if extra > 0 else dist


class Product(td.Distribution):
    """Independent distributions of one ``batch_shape`` as one; a value is [*batch, parts], one column for each."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own declaration)

    def __init__(self, parts: Sequence[td.Distribution]) -> None:
        if not parts or len({(p.batch_shape, p.event_shape) for p in parts}) != 1 or parts[0].event_shape:
            raise ValueError("a product needs at least one distribution, all of one batch shape, each of one number")
        self.parts = list(parts)
        super().__init__(parts[0].batch_shape, torch.Size([len(parts)]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([p.log_prob(v) for p, v in zip(self.parts, value.unbind(-1), strict=True)]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.stack([part.sample(sample_shape) for part in self.parts], dim=-1)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> "Product":
        return Product([map_parameters(part, function) for part in self.parts])


@td.register_kl(Product, Product)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_product(old: Product, new: Product) -> Tensor:
    return torch.stack([_kl(a, b) for a, b in zip(old.parts, new.parts, strict=True)]).sum(0)


def _normal(old: td.Normal, new: td.Normal) -> Tensor:
    return closed_form.normal_kl_of_scale(old.loc, old.scale, new.loc, new.scale)


def _discrete(old: td.Categorical | td.Bernoulli, new: td.Categorical | td.Bernoulli) -> Tensor:
    return closed_form.categorical_kl(logits_of(old), logits_of(new)).to(new._param.dtype)


def _one_hot(old: td.OneHotCategorical, new: td.OneHotCategorical) -> Tensor:
    return _discrete(old._categorical, new._categorical)


def _cholesky_factor(dist: td.MultivariateNormal | td.LowRankMultivariateNormal) -> Tensor:
    if isinstance(dist, td.MultivariateNormal):
        return dist.scale_tril.double()
    # What torch has of it beside its parameters was computed in their own dtype.
    factor, variance = dist.cov_factor.double(), dist.cov_diag.double()
    return torch.linalg.cholesky(factor @ factor.mT + torch.diag_embed(variance))


def _multivariate_normal(
    old: td.MultivariateNormal | td.LowRankMultivariateNormal, new: td.MultivariateNormal | td.LowRankMultivariateNormal
) -> Tensor:
    # With the Cholesky factors L and M = L_new^-1 L_old, lower triangular: KL is half of
    # sum phi(2 log M_ii) + sum_{i>j} M_ij^2 + |L_new^-1 (mu_new - mu_old)|^2. No inverse, no determinant.
    factors = [_cholesky_factor(dist) for dist in (old, new)]
    change = torch.linalg.solve_triangular(factors[1], factors[0] - factors[1], upper=False)  # M - 1
    diagonals = [factor.diagonal(dim1=-2, dim2=-1).log() for factor in factors]
    shift = (new.loc.double() - old.loc.double()).unsqueeze(-1)
    z = torch.linalg.solve_triangular(factors[1], shift, upper=False).squeeze(-1)
    terms = closed_form.phi(2 * (diagonals[0] - diagonals[1])) + z * z
    return (0.5 * (terms.sum(-1) + change.tril(-1).square().sum((-2, -1)))).to(new.loc.dtype)


def _beta(old: td.Beta, new: td.Beta) -> Tensor:
    parameters = (old.concentration1, old.concentration0, new.concentration1, new.concentration0)
    return closed_form.beta_kl(*parameters).to(new.concentration1.dtype)


def _poisson(old: td.Poisson, new: td.Poisson) -> Tensor:
    a, b = old.rate.double(), new.rate.double()
    value = a * closed_form.phi(b.log() - a.log())
    return torch.where(a == 0, b, value).to(new.rate.dtype)


def _transformed(old: td.TransformedDistribution, new: td.TransformedDistribution) -> Tensor:
    state.check_still(old, name_of(old))
    state.check_still(new, name_of(new))
    # Compared by what they hold: most transforms' == does not look at it.
    pairs = list(itertools.zip_longest(old.transforms, new.transforms))
    if all(t.bijective for t in old.transforms) and all(same_state(*pair) for pair in pairs):
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(new.transforms)):
            raise NoClosedFormError(
                f"the KL between {name_of(old)} and {name_of(new)} has no closed-form gradient, as a transform's "
                "parameters learn: under torch.no_grad() it is measured"
            )
        return _kl(old.base_dist, new.base_dist)  # an invertible map changes no KL
    if type(old) is td.TransformedDistribution or type(new) is td.TransformedDistribution:
        raise NoClosedFormError(f"no closed-form KL between {name_of(old)} and {name_of(new)}: different transforms")
    return _by_torch(old, new)  # torch builds some of its families so: Gumbel, Pareto, HalfNormal


def logits_of(dist: td.Categorical | td.Bernoulli) -> Tensor:
    """Log-probabilities up to a constant, [..., n]; a Bernoulli's are those of 0 and 1.

    torch turns probabilities into logits by way of an epsilon, which would make an impossible action possible: where
    the distribution was given by its probabilities, these are taken as they are, in float64.
    """
    pair = isinstance(dist, td.Bernoulli)
    if dist._param is not dist.__dict__.get("probs"):
        return torch.stack([torch.zeros_like(dist.logits), dist.logits], dim=-1) if pair else dist.logits
    p = dist.probs.double()
    p = torch.stack([1 - p, p], dim=-1) if pair else p
    possible = p > 0
    return torch.where(possible, torch.where(possible, p, 1.0).log(), float("-inf"))


# torch's own formulas cancel; these families are computed here, all others by torch's registry, where
# klrl.policies.distributions enters its own.
_STABLE: dict[Any, Callable[[Any, Any], Tensor]] = {
    td.Normal: _normal,
    td.Categorical: _discrete,
    td.Bernoulli: _discrete,
    td.OneHotCategorical: _one_hot,
    td.MultivariateNormal | td.LowRankMultivariateNormal: _multivariate_normal,
    td.Beta: _beta,
    td.Poisson: _poisson,
    td.TransformedDistribution: _transformed,
}


def same_shape(old: td.Distribution, new: td.Distribution) -> None:
    """Raise ValueError unless the two have one batch shape, one event shape and as many choices."""
    if (old.batch_shape, old.event_shape) != (new.batch_shape, new.event_shape):
        raise ValueError(
            f"old and new must have one shape: {name_of(old)} has batch {tuple(old.batch_shape)} and event "
            f"{tuple(old.event_shape)}, {name_of(new)} has {tuple(new.batch_shape)} and {tuple(new.event_shape)}"
        )
    if type(old) is type(new) and _choices(old) != _choices(new):
        raise ValueError(f"old and new must have one shape: parameters of {_choices(old)} and {_choices(new)}")


def _choices(dist: Any) -> tuple[int, ...]:
    if isinstance(dist, td.Categorical):
        return tuple(dist.param_shape)
    # Not asked of the protocol Tabular, which takes as long as the KL.
    return tuple(dist.logits.shape) if getattr(type(dist), "log_probs_64", None) is not None else ()
