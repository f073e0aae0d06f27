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

from klrl.kl.closed_form import categorical_kl_of, exact_log_probs
from klrl.kl.divergence import NoClosedFormError, Units, in_units, kl, logits_of, name_of, same_shape

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
    """H(old, new) = -E_old log new = H(old) + KL(old || new): the cost of coding old's actions with new's code."""
    return in_units(entropy(old) + kl(old, new), units)


def jeffreys(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """KL(old || new) + KL(new || old), symmetric. Source: Jeffreys (1946)."""
    return in_units(kl(old, new) + kl(new, old), units)


def js(old: td.Distribution, new: td.Distribution, units: Units = "nats") -> Tensor:
    """Jensen-Shannon divergence of discrete distributions: 0 to log 2; its square root is a metric.

    A joint of several categoricals is written out, up to 65,536 outcomes. Source: Lin (1991), equation 3.3.
    """
    log_p, log_q = _tables(old, new)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    value = 0.5 * (categorical_kl_of(log_p, middle) + categorical_kl_of(log_q, middle))
    return in_units(value, units).to(torch.get_default_dtype())


def total_variation(old: td.Distribution, new: td.Distribution) -> Tensor:
    """Half the sum of |p - q| over the outcomes of discrete distributions: 0 to 1, no unit."""
    log_p, log_q = _tables(old, new)
    return (0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)).to(torch.get_default_dtype())


def pinsker(divergence: Tensor) -> Tensor:
    """The largest total variation that a KL in nats allows: min(1, sqrt(KL / 2)). Source: Pinsker (1960)."""
    return (divergence / 2).sqrt().clamp_max(1.0)


def renyi(old: td.Distribution, new: td.Distribution, alpha: float, units: Units = "nats") -> Tensor:
    """Renyi divergence of order alpha > 0, KL at alpha = 1: discrete distributions and normals of diagonal covariance.

    Source: Renyi (1961); for normals Gil, Alajaji and Linder (2013), table 2, infinite where no density results.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if alpha == 1:
        return in_units(kl(old, new), units)
    same_shape(old, new)
    if _log_probs(old) is not None and _log_probs(new) is not None:
        log_p, log_q = (exact_log_probs(x) for x in (_log_probs(old), _log_probs(new)) if x is not None)
        p = log_p.exp()
        x = torch.where(p > 0, log_q - log_p, 0.0)
        # sum p^a q^(1-a) - 1, with the first order taken out: it sums to zero wherever old's support covers new's.
        covered = (log_q.exp() * (p > 0)).sum(-1) - 1
        terms = p * (torch.expm1((1 - alpha) * x) - (1 - alpha) * torch.expm1(x))
        value = torch.log1p(terms.sum(-1) + (1 - alpha) * covered) / (alpha - 1)
        return in_units(_sum_parts(old, value.clamp_min(0.0)), units).to(torch.get_default_dtype())
    (mean_p, log_std_p), (mean_q, log_std_q) = _normal(old, new), _normal(new, old)
    var_p, var_q = (2 * log_std_p).exp(), (2 * log_std_q).exp()
    mixed = alpha * var_q + (1 - alpha) * var_p
    # ln(mixed / (var_p^(1-a) var_q^a)), again with its first order taken out.
    ratio = 2 * (log_std_p - log_std_q)
    logarithm = torch.log1p((1 - alpha) * torch.expm1(ratio)) - (1 - alpha) * ratio
    value = 0.5 * alpha * (mean_q - mean_p) ** 2 / mixed + 0.5 * logarithm / (1 - alpha)
    value = torch.where(mixed > 0, value.clamp_min(0.0), math.inf)
    return in_units(_sum_parts(old, value), units).to(torch.get_default_dtype())


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
