"""Exact divergences between policy distributions, one value per state.

Every function takes ``old`` first, returns nats and sums over action dimensions. The arithmetic runs in float64
whatever the input, and sums terms that are each >= 0, so that nothing cancels:

- with x = log q - log p, KL(p||q) = sum p * phi(x), where phi(x) = e^x - 1 - x >= 0 (the sum of q - p is zero);
- a float32 log-ratio of 1e-5 leaves phi with an absolute error of 1e-21 in float64, where p*log(p/q) in float32
  would leave one of 1e-7, which is more than the KL of a small policy step.

Conventions: 0*log 0 = 0; where old has mass and new has none, KL is +inf, never a clamped number; actions that both
forbid (logit -inf) drop out. KL >= 0 always and KL(p||p) = 0 exactly.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import closed_form

D = TypeVar("D", bound=td.Distribution)


def kl(old: td.Distribution, new: td.Distribution) -> Tensor:
    """KL(old || new) in closed form, shape ``batch_shape``, in nats.

    A bare ``Normal`` or ``Bernoulli`` with parameters of shape [B, d] keeps its dimensions, as everywhere in torch;
    wrap it in ``joint`` to sum over them. Differentiable once, in both arguments.

    Raises ValueError for different families, different shapes, or a pair without a closed form.
    Source: Kullback and Leibler (1951), equation 2.4.
    """
    if isinstance(old, td.Independent) and isinstance(new, td.Independent):
        _same_shape(old, new)
        inner = kl(old.base_dist, new.base_dist)
        return inner.sum(dim=tuple(range(-old.reinterpreted_batch_ndims, 0)))
    for family, function in _STABLE.items():
        if isinstance(old, family) and isinstance(new, family):
            _same_shape(old, new)
            if getattr(old, "param_shape", None) != getattr(new, "param_shape", None):  # a Categorical's choices
                raise ValueError(f"old and new must have one shape: {old.param_shape} and {new.param_shape}")  # type: ignore[attr-defined]
            return function(old, new)
    try:
        return td.kl_divergence(old, new)
    except NotImplementedError:
        raise ValueError(f"no closed-form KL between {_name(old)} and {_name(new)}") from None


def reverse_kl(old: td.Distribution, new: td.Distribution) -> Tensor:
    """KL(new || old), shape ``batch_shape``, in nats: the direction that seeks one mode of ``old``."""
    return kl(new, old)


def joint(dist: td.Distribution) -> td.Distribution:
    """One distribution per state: every batch dimension after the first becomes an action dimension.

    ``joint(Normal(mean, std))`` with parameters of shape [B, d] has ``batch_shape`` [B], so its KL is the joint one.
    """
    extra = len(dist.batch_shape) - 1
    return td.Independent(dist, extra) if extra > 0 else dist


def freeze(dist: D) -> D:
    """``dist`` as data: the same distribution on detached copies of its parameters."""
    return _map_parameters(dist, lambda parameter: parameter.detach().clone())


def select(dist: D, index: Tensor | slice) -> D:
    """``dist`` on a minibatch: every parameter indexed along the first batch dimension."""
    return _map_parameters(dist, lambda parameter: parameter[index])


def concatenate(dists: list[D]) -> D:
    """The distributions of consecutive chunks of states as one distribution. All must be of one type."""
    if len(dists) == 1:
        return dists[0]
    columns: list[list[Tensor]] = []
    for dist in dists:
        parameters: list[Tensor] = []

        def collect(parameter: Tensor, into: list[Tensor] = parameters) -> Tensor:
            into.append(parameter)
            return parameter

        _map_parameters(dist, collect)
        columns.append(parameters)
    whole = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    return _map_parameters(dists[0], lambda _: next(whole))


def _map_parameters(dist: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if hasattr(dist, "map_parameters"):
        return dist.map_parameters(function)
    if isinstance(dist, td.Independent):
        return td.Independent(_map_parameters(dist.base_dist, function), dist.reinterpreted_batch_ndims)
    if isinstance(dist, td.Normal):
        return td.Normal(function(dist.loc), function(dist.scale), validate_args=False)
    if isinstance(dist, td.Categorical):
        return td.Categorical(logits=function(dist.logits), validate_args=False)
    if isinstance(dist, td.Bernoulli):
        return td.Bernoulli(logits=function(dist.logits), validate_args=False)
    raise ValueError(
        f"{_name(dist)} is not supported: give a Normal, Categorical or Bernoulli, bare or in Independent, "
        "or a class with a method map_parameters(function)"
    )


def _normal(old: td.Normal, new: td.Normal) -> Tensor:
    return closed_form.normal_kl(old.loc, old.scale.double().log(), new.loc, new.scale.double().log())


def _categorical(old: td.Categorical, new: td.Categorical) -> Tensor:
    return closed_form.categorical_kl(old.logits, new.logits)


def _bernoulli(old: td.Bernoulli, new: td.Bernoulli) -> Tensor:
    pair = [torch.stack([torch.zeros_like(d.logits), d.logits], dim=-1) for d in (old, new)]
    return closed_form.categorical_kl(pair[0], pair[1])


# torch's own formulas cancel in float32; these families are computed here, all others by torch's registry,
# where klrl.distributions enters its own.
_STABLE: dict[type[td.Distribution], Callable[[Any, Any], Tensor]] = {
    td.Normal: _normal,
    td.Categorical: _categorical,
    td.Bernoulli: _bernoulli,
}


def _same_shape(old: td.Distribution, new: td.Distribution) -> None:
    if old.batch_shape != new.batch_shape or old.event_shape != new.event_shape:
        raise ValueError(
            f"old and new must have one shape: {_name(old)} has batch {tuple(old.batch_shape)} and event "
            f"{tuple(old.event_shape)}, {_name(new)} has {tuple(new.batch_shape)} and {tuple(new.event_shape)}"
        )


def _name(dist: object) -> str:
    if isinstance(dist, td.Independent):
        return f"Independent({_name(dist.base_dist)})"
    return type(dist).__name__
