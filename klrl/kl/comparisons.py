"""Other ways to compare two policies on the same states: beside KL, never instead of it.

As in ``klrl.kl.divergence``: ``old`` first, one value per state, action dimensions summed, float64 inside, terms that
do not cancel. ``units`` is "nats" or "bits". A pair of different families or shapes, or without a closed form, raises
ValueError that names it.
"""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.closed_form import categorical_kl, categorical_kl_of, log_probs_64
from klrl.kl.divergence import (
    NoClosedFormError,
    Product,
    Tabular,
    Units,
    in_units,
    kl,
    logits_of,
    raise_nan,
    same_shape,
)
from klrl.kl.parameters import name_of


@runtime_checkable
class LogScaled(Protocol):
    """A diagonal normal of one's own, by its mean and the logarithm of its standard deviation."""

    loc: Tensor
    log_std: Tensor


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
    are not discrete. No gradients. Source: Lin (1991), equation 3.3.
    """
    with torch.no_grad():
        log_p, log_q = _tables(old, new)
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        value = 0.5 * (categorical_kl_of(log_p, middle) + categorical_kl_of(log_q, middle))
        value = torch.where((log_p == log_q).all(-1), 0.0, value)  # where middle is them but for its rounding
    return in_units(_checked(value, old, new), units)


def total_variation(old: td.Distribution, new: td.Distribution) -> Tensor:
    """Half the sum of |p - q| over the outcomes of discrete distributions, shape ``batch_shape``: 0 to 1, no unit.

    Raises as ``js`` does. Source: Levin, Peres and Wilmer (2009), proposition 4.2.
    """
    log_p, log_q = _tables(old, new)
    value = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    return _checked(value, old, new)


def pinsker_bound(divergence: Tensor) -> Tensor:
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
    logits = _same_family(old, new)
    if logits is not None:
        log_p, log_q = (log_probs_64(x) for x in logits)
        p, x = log_p.exp(), log_q - log_p
        # sum p^a q^(1-a) - 1, with its first order taken out: p * expm1(x) sums to minus new's mass where old has none.
        terms = p * (torch.expm1((1 - alpha) * x) - (1 - alpha) * torch.expm1(x))
        excess = torch.where(p == 0, (alpha - 1) * log_q.exp(), terms).sum(-1)
        powers = torch.where(log_p == -math.inf, log_p, alpha * log_p + (1 - alpha) * log_q)
        near = excess.isfinite() & (excess > -0.5)  # far apart nothing cancels, but powers may overflow
        whole = torch.where(near, torch.log1p(torch.where(near, excess, 0.0)), torch.logsumexp(powers, -1))
        value = whole / (alpha - 1)
        return in_units(_checked(_sum_parts(old, value.clamp_min(0.0)), old, new), units)
    (mean_p, log_std_p), (mean_q, log_std_q) = _normal(old, new), _normal(new, old)
    var_p, var_q = (2 * log_std_p).exp(), (2 * log_std_q).exp()
    mixed = alpha * var_q + (1 - alpha) * var_p
    # ln(mixed / (var_p^(1-a) var_q^a)), again with its first order taken out.
    ratio = 2 * (log_std_p - log_std_q)
    logarithm = torch.log1p((1 - alpha) * torch.expm1(ratio)) - (1 - alpha) * ratio
    value = 0.5 * alpha * (mean_q - mean_p) ** 2 / mixed + 0.5 * logarithm / (1 - alpha)
    value = torch.where(mixed <= 0, math.inf, value.clamp_min(0.0))
    return in_units(_checked(_sum_parts(old, value), old, new), units)


def mutual_information(policy: td.Distribution, units: Units = "nats") -> Tensor:
    """I(S; A) = H(E_s pi(a|s)) - E_s H(pi(a|s)) over B states that count alike, a scalar: what actions tell of states.

    ``policy``: discrete, with batch shape [B]. Computed as the mean KL(pi(.|s) || E_s pi), whose terms are at least 0,
    and differentiable. Raises ValueError for others, and for over 65,536 joint actions. Source: Cover and Thomas
    (2006), equation 2.36.
    """
    log_p = _tables(policy, policy)[0]
    if log_p.dim() != 2 or bool(log_p.isnan().any()):
        raise ValueError(f"policy has batch shape {tuple(policy.batch_shape)} or nan: it must be [B], and finite")
    # The mean is the policy that makes this least, and so has no part in its gradient.
    log_mean = torch.logsumexp(log_p.detach(), 0) - math.log(len(log_p))
    return in_units(categorical_kl(log_p, log_mean.expand_as(log_p)).mean(), units)


def _checked(value: Tensor, old: td.Distribution, new: td.Distribution) -> Tensor:
    """``value``, which is float64, in the parameters' type. Raises ValueError where it is nan."""
    if bool(value.isnan().any()):
        raise_nan(old, new)
    return value.to(torch.promote_types(*(_precision(dist) for dist in (old, new))))


def _precision(dist: td.Distribution) -> torch.dtype:
    logits = _log_probs(dist)
    found: torch.dtype = _base(dist).loc.dtype if logits is None else logits.dtype
    return found


def _base(dist: Any) -> Any:
    if isinstance(dist, td.OneHotCategorical):
        return dist._categorical
    return _base(dist.base_dist) if isinstance(dist, td.Independent) else dist


def _same_family(old: td.Distribution, new: td.Distribution) -> tuple[Tensor, Tensor] | None:
    """Both sides' ``_log_probs`` where they are discrete. Raises ValueError for different families or shapes."""
    families = [type(_base(dist)) for dist in (old, new)]
    if not (issubclass(*families) or issubclass(*reversed(families))):
        raise ValueError(f"{name_of(old)} and {name_of(new)} are of different families")
    same_shape(old, new)
    first, second = _log_probs(old), _log_probs(new)
    if first is None or second is None:
        return None
    if first.shape != second.shape:
        raise ValueError(f"old and new must have one shape: {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second


def _log_probs(dist: td.Distribution) -> Tensor | None:
    """Unnormalised log-probabilities [*batch, *parts, n] of a discrete distribution, None for others."""
    base = _base(dist)
    if isinstance(base, Product):
        parts = [_log_probs(part) for part in base.parts]
        known = [part for part in parts if part is not None]
        most = max((part.shape[-1] for part in known), default=0)
        padded = [torch.nn.functional.pad(part, (0, most - part.shape[-1]), value=-math.inf) for part in known]
        return torch.stack(padded, dim=-2) if len(known) == len(parts) else None
    if isinstance(base, td.Bernoulli | td.Categorical):
        return logits_of(base)
    return base.logits if isinstance(base, Tabular) else None


def _normal(dist: td.Distribution, other: td.Distribution) -> tuple[Tensor, Tensor]:
    base = _base(dist)
    if isinstance(base, td.Normal):
        return base.loc.double(), base.scale.double().log()
    if isinstance(base, LogScaled):
        return base.loc.double(), base.log_std.double()
    raise ValueError(f"no closed form between {name_of(dist)} and {name_of(other)}")


def _sum_parts(dist: td.Distribution, value: Tensor) -> Tensor:
    extra = value.dim() - len(dist.batch_shape)
    return value.sum(dim=tuple(range(-extra, 0))) if extra else value


def _tables(old: td.Distribution, new: td.Distribution) -> list[Tensor]:
    """Every joint outcome's exact log-probability [*batch, outcomes], of both distributions."""
    both = _same_family(old, new)
    if both is None:
        raise ValueError(
            f"no closed form between {name_of(old)} and {name_of(new)}: both must be discrete, and "
            "of finitely many outcomes"
        )
    tables = []
    for dist, logits in zip((old, new), both, strict=True):
        log_p = log_probs_64(logits)
        parts = log_p.flatten(len(dist.batch_shape), -2) if log_p.dim() > len(dist.batch_shape) + 1 else None
        if parts is not None:
            if parts.shape[-1] ** parts.shape[-2] > _MOST_OUTCOMES:
                raise ValueError(f"{name_of(dist)} has over {_MOST_OUTCOMES:,} joint outcomes: compare it part by part")
            log_p = parts[..., 0, :]
            for i in range(1, parts.shape[-2]):
                log_p = (log_p.unsqueeze(-1) + parts[..., i, :].unsqueeze(-2)).flatten(-2)
        tables.append(log_p)
    return tables
