"""Other ways to compare two policies on the same states: beside KL, never instead of it.

As in ``klrl.kl.divergence``: ``old`` first, one value per state, action dimensions summed, float64 inside, terms that
do not cancel. ``units`` is "nats" or "bits". A pair of different families or shapes, or without a closed form, raises
ValueError that names it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.closed_form import categorical_kl_of, exact_log_probs, ordinary
from klrl.kl.divergence import NoClosedFormError, Units, explain_nan, in_units, kl, logits_of, name_of, same_shape

_MOST_OUTCOMES = 65_536  # of a joint discrete distribution that is written out


def entropy(dist: td.Distribution, units: Units = "nats") -> Tensor:
    """H(dist), shape ``batch_shape``; differential for continuous distributions.

    Raises NoClosedFormError for squashed normals and mixtures, whose entropy ``mc_entropy`` estimates.
    """
    try:
        return in_units(dist.entropy(), units)
    except NotImplementedError:
        raise NoClosedFormError(f"no closed-form entropy of {name_of(dist)}: mc_entropy estimates it") from None


def cross_entropy(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """H(old, new) = -E_old log new = H(old) + KL(old || new): the cost of coding old's actions with new's code.

    Shape ``batch_shape``. Raises as ``kl`` and ``entropy`` do. Source: Cover and Thomas (2006), section 5.4.
    """
    return in_units(entropy(old) + kl(old, new), units)


def jeffreys(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """KL(old || new) + KL(new || old), symmetric, shape ``batch_shape``. Raises as ``kl``. Source: Jeffreys (1946)."""
    return in_units(kl(old, new) + kl(new, old), units)


def js(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """Jensen-Shannon divergence of discrete distributions, shape ``batch_shape``: 0 to log 2; its root is a metric.

    A joint of several categoricals is written out; raises ValueError beyond 65,536 outcomes, and for distributions that
    are not discrete. Source: Lin (1991), equation 3.3.
    """
    log_p, log_q = _tables(old, new)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    value = 0.5 * (categorical_kl_of(log_p, middle) + categorical_kl_of(log_q, middle))
    return in_units(_checked(value, old, new), units).to(torch.get_default_dtype())


def total_variation(old: td.Distribution, new: td.Distribution) -> Tensor:
    """Half the sum of |p - q| over the outcomes of discrete distributions, shape ``batch_shape``: 0 to 1, no unit.

    Raises as ``js`` does. Source: Levin, Peres and Wilmer (2009), proposition 4.2.
    """
    log_p, log_q = _tables(old, new)
    value = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    return _checked(value, old, new).to(torch.get_default_dtype())


def pinsker(divergence: Tensor) -> Tensor:
    """The most total variation that a KL in nats allows, elementwise: min(1, sqrt(KL / 2)). Source: Pinsker (1960)."""
    return (divergence / 2).sqrt().clamp_max(1.0)


def renyi(old: td.Distribution, new: td.Distribution, alpha: float, units: Units = "nats") -> Tensor:
    """Renyi divergence of order alpha > 0, KL at alpha = 1: discrete distributions and normals of diagonal covariance.

    Shape ``batch_shape``. Raises ValueError for an alpha that is not finite or not above 0, and for other families.
    Source: Renyi (1961); for normals Gil, Alajaji and Linder (2013), table 2, infinite where no density results.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if alpha == 1:
        return in_units(kl(old, new), units)
    same_shape(old, new)
    if _log_probs(old) is not None and _log_probs(new) is not None:
        log_p, log_q = (exact_log_probs(x) for x in (_log_probs(old), _log_probs(new)) if x is not None)
        x = log_q - log_p
        if ordinary(x):  # sum p^a q^(1-a) - 1, with its first order taken out, as that of q - p sums to 0
            terms = log_p.exp() * (torch.expm1((1 - alpha) * x) - (1 - alpha) * torch.expm1(x))
            value = torch.log1p(terms.sum(-1)) / (alpha - 1)
        else:  # forbidden or nearly forbidden actions
            powers = torch.where(log_p == -math.inf, log_p, alpha * log_p + (1 - alpha) * log_q)
            value = torch.logsumexp(powers, -1) / (alpha - 1)
        value = _checked(value.clamp_min(0.0), old, new)
        return in_units(_sum_parts(old, value), units).to(torch.get_default_dtype())
    (mean_p, log_std_p), (mean_q, log_std_q) = _normal(old, new), _normal(new, old)
    var_p, var_q = (2 * log_std_p).exp(), (2 * log_std_q).exp()
    mixed = alpha * var_q + (1 - alpha) * var_p
    # ln(mixed / (var_p^(1-a) var_q^a)), again with its first order taken out.
    ratio = 2 * (log_std_p - log_std_q)
    logarithm = torch.log1p((1 - alpha) * torch.expm1(ratio)) - (1 - alpha) * ratio
    value = 0.5 * alpha * (mean_q - mean_p) ** 2 / mixed + 0.5 * logarithm / (1 - alpha)
    value = _checked(torch.where(mixed <= 0, math.inf, value.clamp_min(0.0)), old, new)
    return in_units(_sum_parts(old, value), units).to(torch.get_default_dtype())


def _checked(value: Tensor, old: td.Distribution, new: td.Distribution) -> Tensor:
    if bool(value.isnan().any()):
        explain_nan(old, new)
    return value


def _base(dist: Any) -> Any:
    return _base(dist.base_dist) if isinstance(dist, td.Independent) else dist


def _log_probs(dist: td.Distribution) -> Tensor | None:
    """Unnormalised log-probabilities [*batch, *parts, n] of a discrete distribution, None for others."""
    base = _base(dist)
    if isinstance(base, td.Bernoulli | td.Categorical):
        return logits_of(base)
    return base.logits if hasattr(base, "exact_log_probs") else None  # klrl's Categoricals


def _normal(dist: td.Distribution, other: td.Distribution) -> tuple[Tensor, Tensor]:
    base = _base(dist)
    if isinstance(base, td.Normal):
        return base.loc.double(), base.scale.double().log()
    if hasattr(base, "log_std"):
        return base.loc.double(), base.log_std.double()
    raise ValueError(f"no closed form between {name_of(dist)} and {name_of(other)}")


def _sum_parts(dist: td.Distribution, value: Tensor) -> Tensor:
    extra = value.dim() - len(dist.batch_shape)
    return value.sum(dim=tuple(range(-extra, 0))) if extra else value


def _tables(old: td.Distribution, new: td.Distribution) -> list[Tensor]:
    """Every joint outcome's exact log-probability [*batch, outcomes], of both distributions."""
    same_shape(old, new)
    tables = []
    for dist in (old, new):
        logits = _log_probs(dist)
        if logits is None:
            raise ValueError(f"no closed form between {name_of(old)} and {name_of(new)}: both must be discrete")
        log_p = exact_log_probs(logits)
        parts = log_p.flatten(len(dist.batch_shape), -2) if log_p.dim() > len(dist.batch_shape) + 1 else None
        if parts is not None:
            if parts.shape[-1] ** parts.shape[-2] > _MOST_OUTCOMES:
                raise ValueError(f"{name_of(dist)} has over {_MOST_OUTCOMES:,} joint outcomes: compare it part by part")
            log_p = parts[..., 0, :]
            for i in range(1, parts.shape[-2]):
                log_p = (log_p.unsqueeze(-1) + parts[..., i, :].unsqueeze(-2)).flatten(-2)
        tables.append(log_p)
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"old has {tables[0].shape[-1]} outcomes, new has {tables[1].shape[-1]}")
    return tables
