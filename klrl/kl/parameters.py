"""What a distribution consists of: its parameters, listed, copied, indexed, joined and replaced."""

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import state
from klrl.kl.state import NotSupportedError, copied, map_state, tensors_of

D = TypeVar("D", bound=td.Distribution)
# Of these the arguments are the parameters.
_BY_ARGUMENTS: tuple[Any, ...] = (
    *(td.Normal, td.Beta, td.Gamma, td.Dirichlet, td.Laplace, td.Cauchy, td.Exponential, td.Poisson),
    td.LowRankMultivariateNormal,
)
# What every transformed distribution consists of: a class that holds more, as Pareto does, would lose it.
_TRANSFORMED = {"base_dist", "transforms", "_batch_shape", "_event_shape", "_validate_args", "_seen"}


@runtime_checkable
class Parametric(Protocol):
    """A distribution of one's own that can be frozen, indexed and joined as torch's are."""

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> Self: ...


def parameters_of(dist: td.Distribution) -> list[Tensor]:
    """The distribution's parameter tensors, in a fixed order."""
    found: list[Tensor] = []

    def collect(parameter: Tensor) -> Tensor:
        found.append(parameter)
        return parameter

    map_parameters(dist, collect)
    return found


def freeze(dist: D) -> D:
    """``dist`` as data: the same distribution on detached copies of its parameters, those of its transforms included.

    A subclass of one of torch's families becomes that family, unless it has ``map_parameters``. Raises ValueError for a
    family whose parameters are not known, and for a transform whose state cannot be read.
    """
    return map_parameters(dist, copied)


def select(dist: D, index: Tensor | slice) -> D:
    """``dist`` on a minibatch: every parameter indexed along the first batch dimension.

    A transform's own parameters stay as they are: raises NotSupportedError where they are of single states.
    """
    inner: Any = dist
    while isinstance(inner, td.Independent):
        inner = inner.base_dist
    if isinstance(inner, td.TransformedDistribution):
        of_states = [x for x in tensors_of(inner.transforms) if x.shape[:1] == inner.batch_shape[:1] != (1,)]
        if any(x.dim() == len(inner.batch_shape + inner.event_shape) for x in of_states):
            raise NotSupportedError(f"{name_of(dist)} has a transform for each state, of which none is selected")
    return map_parameters(dist, lambda parameter: parameter[index])


def concatenate(dists: list[D]) -> D:
    """The distributions of consecutive chunks of states as one distribution. All must be of one type."""
    if len(dists) == 1:
        return dists[0]
    columns = [parameters_of(dist) for dist in dists]
    whole = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    return map_parameters(dists[0], lambda _: next(whole))


def _has(cls: Any, name: str) -> bool:  # asked for every KL: of a protocol, it takes as long as the KL
    return getattr(cls, name, None) is not None


def map_parameters(dist: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``dist`` with ``function`` applied to each of its parameters."""
    if _has(type(dist), "map_parameters"):
        return dist.map_parameters(function)
    if isinstance(dist, td.Independent):
        return td.Independent(map_parameters(dist.base_dist, function), dist.reinterpreted_batch_ndims)
    if isinstance(dist, _BY_ARGUMENTS):
        family = next(one for one in _BY_ARGUMENTS if isinstance(dist, one))
        return family(**{name: function(getattr(dist, name)) for name in family.arg_constraints}, validate_args=False)
    if isinstance(dist, td.OneHotCategorical):
        through = isinstance(dist, td.OneHotCategoricalStraightThrough)
        one_hot: Any = object.__new__(td.OneHotCategoricalStraightThrough if through else td.OneHotCategorical)
        one_hot._categorical = inner = map_parameters(dist._categorical, function)
        td.Distribution.__init__(one_hot, inner.batch_shape, inner.logits.shape[-1:], validate_args=False)
        return one_hot
    if isinstance(dist, td.Categorical | td.Bernoulli):
        name = "probs" if dist._param is dist.__dict__.get("probs") else "logits"
        parameter = function(getattr(dist, name))
        if isinstance(dist, td.Bernoulli):
            return td.Bernoulli(**{name: parameter}, validate_args=False)
        # Its constructor would normalise once more, which moves the last digit: a policy would differ from its copy.
        copy = object.__new__(td.Categorical)
        copy.__dict__ |= {name: parameter, "_param": parameter, "_num_events": parameter.shape[-1]}
        td.Distribution.__init__(copy, parameter.shape[:-1], validate_args=False)
        return copy
    if isinstance(dist, td.MultivariateNormal):
        loc, factor = function(dist.loc), function(dist.scale_tril)
        return td.MultivariateNormal(loc, scale_tril=factor, validate_args=False)
    if isinstance(dist, td.MixtureSameFamily):
        weights, parts = (map_parameters(d, function) for d in (dist.mixture_distribution, dist.component_distribution))
        return td.MixtureSameFamily(weights, parts, validate_args=False)
    if isinstance(dist, td.TransformedDistribution) and vars(dist).keys() <= _TRANSFORMED:
        base, rebuilt = map_parameters(dist.base_dist, function), object.__new__(type(dist))
        # The parameters of a transform are of no one state: an index leaves them, and only a copy takes them along.
        transforms = map_state(dist.transforms, copied) if function is copied else dist.transforms
        td.TransformedDistribution.__init__(rebuilt, base, transforms, validate_args=False)
        return state.remember(rebuilt) if function is copied else rebuilt
    raise NotSupportedError(
        f"{name_of(dist)} is not supported: give a Normal (also multivariate or squashed), Categorical (also one-hot), "
        "Bernoulli, Beta, Gamma, Dirichlet, Laplace, Cauchy, Exponential, Poisson, a mixture or transform of those, or "
        "a class with a method map_parameters(function)"
    )


def name_of(dist: object) -> str:
    if isinstance(dist, td.Independent):
        return f"Independent({name_of(dist.base_dist)})"
    return type(dist).__name__
