"""Each state's policy moved back towards the old one until its own KL is within a limit, differentiably."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import state
from klrl.kl.divergence import NoClosedFormError, Product, kl, logits_of, reverse_kl
from klrl.kl.measure import Direction
from klrl.kl.parameters import map_parameters, name_of, parameters_of

D = TypeVar("D", bound=td.Distribution)
_FALSE_POSITIONS, _BISECTIONS = 10, 25
_MIXED = td.Normal | td.Categorical | td.OneHotCategorical | td.Bernoulli | td.Dirichlet
_SHORT = -1e-5  # by how much the root of a KL may stay below that of its limit, as a fraction


def project_states(old: td.Distribution, new: D, limit: float, direction: Direction = "forward") -> D:
    """``new`` where a state's KL from ``old`` is at most ``limit``; elsewhere their geometric mean whose KL is that.

    (It is never above, and below by more than 1e-4 of it only where the weight is within 1e-7 of 0 or 1.)

    Differentiable in ``new``, the weight of the mean included. In the reverse direction it is, of all policies within
    the limit, the nearest to ``new`` by KL(policy || new), and (1 - weight) / weight is the constraint's multiplier; in
    the forward direction it is the same mean, up to another limit. Source: Otto et al. (2021), "Differentiable trust
    region layers for deep reinforcement learning", section 4, here with one limit on mean and covariance together;
    TROLL (arXiv 2510.03817) for categoricals.

    Raises NoClosedFormError for families that ``geometric_mean`` does not know, ValueError for a limit of 0 or less.
    """
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    if not _has_mean(new):  # said in the first update, not in the first that moves a state too far
        raise NoClosedFormError(f"no geometric mean of {name_of(new)} is known")
    measure = kl if direction == "forward" else reverse_kl
    with torch.no_grad():
        reached = measure(old, new)
        moved = reached > limit
        if state.may_look() and not bool(moved.any()):
            return new
        weight = torch.where(moved, _weight(old, new, limit, measure, reached), 1.0)
        if not any(parameter.requires_grad for parameter in parameters_of(new)):
            return geometric_mean(old, new, weight)
    with torch.enable_grad():  # d KL / d weight
        leaf = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(measure(old, geometric_mean(old, _detached(new), leaf)).sum(), leaf)
    slope = torch.where(moved & (slope > 0), slope, torch.inf)  # weights of 0 and 1 stay
    # One Newton step from where it already is within: its gradient is that of the weight that the limit implies.
    newton = weight - (measure(old, geometric_mean(old, new, weight)) - limit) / slope
    exact = weight + (newton - newton.detach())
    return geometric_mean(old, new, torch.where(moved & (weight > 0), exact, weight))


def _weight(old: td.Distribution, new: td.Distribution, limit: float, measure: Any, reached: Tensor) -> Tensor:
    """The largest weight found whose KL is within the limit, [B], where that of ``new`` is not.

    The root of the KL is nearly linear in the weight: false position on it, with the Illinois rule. Where that is slow,
    as the solution is next to 0 or to 1, bisection of the log-odds follows.
    """
    low, high, beyond = torch.zeros_like(reached), torch.ones_like(reached), reached > limit
    at_low, at_high = -torch.ones_like(reached), ((reached / limit).sqrt() - 1).clamp(1e-6, 1e3)
    was_inside, short = torch.full_like(reached, torch.nan), -torch.ones_like(reached)
    for i in range(_FALSE_POSITIONS + _BISECTIONS):
        if i < _FALSE_POSITIONS:
            middle = low + (high - low) * at_low / (at_low - at_high)
        else:
            middle = torch.sigmoid((torch.logit(low, eps=1e-7) + torch.logit(high, eps=1e-7)) / 2)
        value = (measure(old, geometric_mean(old, new, middle)) / limit).sqrt().clamp(max=1e3) - 1
        inside = value <= 0
        # An end that stays for a second time counts half, so that the next guess moves away from the other.
        at_high = torch.where(inside, torch.where(was_inside == 1, 0.5, 1.0) * at_high, value)
        at_low = torch.where(inside, value, torch.where(was_inside == 0, 0.5, 1.0) * at_low)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        was_inside, short = inside.to(reached.dtype), torch.where(inside, value, short)
        if state.may_look() and not bool((beyond & (short < _SHORT)).any()):
            break
    return low


def _detached(dist: D) -> D:
    return map_parameters(dist, Tensor.detach)


def _has_mean(dist: Any) -> bool:
    if isinstance(dist, Product):
        return all(_has_mean(part) for part in dist.parts)
    if isinstance(dist, td.Independent):
        return _has_mean(dist.base_dist)
    return getattr(type(dist), "between", None) is not None or isinstance(dist, _MIXED)


def geometric_mean(old: td.Distribution, new: D, weight: Tensor) -> D:
    """old^(1 - weight) new^weight, normalised, for each state. weight: [B], between 0 and 1.

    Raises NoClosedFormError where the two are not categoricals, Bernoullis, Dirichlets or normals of one kind, products
    of these, or of a class with a method ``between``.
    """
    result: Any
    if not (isinstance(old, type(new)) or isinstance(new, type(old))):
        raise NoClosedFormError(f"no geometric mean of {name_of(old)} and {name_of(new)} is known")
    if getattr(type(new), "between", None) is not None:  # isinstance of a protocol takes as long as a KL
        result = new.between(old, weight)  # type: ignore[attr-defined]
    elif isinstance(new, Product):
        result = Product([geometric_mean(a, b, weight) for a, b in zip(old.parts, new.parts, strict=True)])  # type: ignore[attr-defined]
    elif isinstance(new, td.Independent):
        wide = weight.view(*weight.shape, *[1] * new.reinterpreted_batch_ndims)
        result = td.Independent(geometric_mean(old.base_dist, new.base_dist, wide), new.reinterpreted_batch_ndims)  # type: ignore[attr-defined]
    elif isinstance(new, td.OneHotCategorical):
        logits = geometric_mean(old._categorical, new._categorical, weight).logits  # type: ignore[attr-defined]
        result = td.OneHotCategorical(logits=logits, validate_args=False)
    elif isinstance(new, td.Dirichlet):
        concentration = torch.lerp(old.concentration, new.concentration, weight.unsqueeze(-1))  # type: ignore[attr-defined]
        result = td.Dirichlet(concentration, validate_args=False)
    elif isinstance(new, td.Normal):
        mean, log_std = mix_normals(old.loc, old.scale.log(), new.loc, new.scale.log(), weight)  # type: ignore[attr-defined]
        result = td.Normal(mean, log_std.exp(), validate_args=False)
    elif isinstance(new, td.Categorical):
        logits = mix_logits(logits_of(old), logits_of(new), weight.unsqueeze(-1))  # type: ignore[arg-type]
        result = td.Categorical(logits=logits.to(new._param.dtype), validate_args=False)
    elif isinstance(new, td.Bernoulli):
        logits = mix_logits(logits_of(old), logits_of(new), weight.unsqueeze(-1))  # type: ignore[arg-type]
        result = td.Bernoulli(logits=(logits[..., 1] - logits[..., 0]).to(new._param.dtype), validate_args=False)
    else:
        raise NoClosedFormError(f"no geometric mean of {name_of(new)} is known")
    return result


def mix_logits(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities of the geometric mean of categoricals [..., n]; what one with a part in it forbids has none."""
    lowest = -1e30  # finite, so that a weight of 0 makes no nan of it
    logs = [torch.log_softmax(logits, -1) for logits in (old, new)]
    forbidden = ((logs[0] == -torch.inf) & (weight < 1)) | ((logs[1] == -torch.inf) & (weight > 0))
    mixed = torch.lerp(logs[0].clamp_min(lowest), logs[1].clamp_min(lowest), weight.to(logs[0].dtype))
    return torch.log_softmax(torch.where(forbidden, -torch.inf, mixed), -1)


def mix_normals(
    mean_old: Tensor, log_std_old: Tensor, mean: Tensor, log_std: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log_std of the geometric mean of normals: precisions, and means times precisions, are averaged."""
    share = torch.sigmoid(2 * (log_std_old - log_std) + torch.logit(weight))  # of the precision, the new one's
    log_precision = torch.logaddexp(torch.log1p(-weight) - 2 * log_std_old, weight.log() - 2 * log_std)
    return torch.lerp(mean_old, mean, share), -0.5 * log_precision
