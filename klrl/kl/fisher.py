"""The Fisher information as an operator: KL(theta, theta + d v) = d^2 v^T F v / 2 + O(d^3), in the parameters' space.

What a natural gradient needs of the policy's distribution (Amari 1998). In the parameters' own space F is diagonal or
nearly so, and its product with a vector costs as much as a log-probability.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.parameters import name_of, parameters_of


@runtime_checkable
class KnowsFisher(Protocol):
    """A distribution of one's own that knows its Fisher information, as ``fisher_vector_product`` below."""

    def fisher_vector_product(self, *vectors: Tensor) -> tuple[Tensor, ...]: ...


def fisher_vector_product(dist: td.Distribution, *vectors: Tensor) -> tuple[Tensor, ...]:
    """F v per state, in the distribution's parameters: one vector of each parameter's shape in, one out.

    Parameters, in order: logits of a Categorical or Bernoulli; loc and scale of a Normal; loc and scale_tril of a
    MultivariateNormal; concentration1 and concentration0 of a Beta; of a class with a method of this name, its own.
    Independent, OneHotCategorical and a bijective transform of a base distribution have their base's.

    Raises ValueError for another family, for probabilities in place of logits, and for vectors that do not fit.
    """
    while isinstance(dist, td.Independent | td.TransformedDistribution):
        if isinstance(dist, td.TransformedDistribution) and not all(step.bijective for step in dist.transforms):
            raise ValueError(f"the Fisher information of {name_of(dist)} is not its base's: a transform folds it")
        dist = dist.base_dist
    dist = dist._categorical if isinstance(dist, td.OneHotCategorical) else dist
    shapes = [tuple(parameter.shape) for parameter in parameters_of(dist)]
    if [tuple(vector.shape) for vector in vectors] != shapes:
        raise ValueError(f"{name_of(dist)} has parameters of shapes {shapes}, got {[tuple(v.shape) for v in vectors]}")
    if isinstance(dist, KnowsFisher):
        return dist.fisher_vector_product(*vectors)
    if isinstance(dist, td.Categorical | td.Bernoulli):
        return (_discrete(dist, *vectors),)
    if isinstance(dist, td.Normal):
        return vectors[0] / dist.scale**2, 2 * vectors[1] / dist.scale**2
    if isinstance(dist, td.MultivariateNormal):
        return _multivariate_normal(dist, *vectors)
    if isinstance(dist, td.Beta):
        return beta_fisher(dist.concentration1, dist.concentration0, *vectors)
    raise ValueError(f"the Fisher information of {name_of(dist)} is not known in closed form")


def _discrete(dist: td.Categorical | td.Bernoulli, vector: Tensor) -> Tensor:
    if dist._param is dist.__dict__.get("probs"):
        raise ValueError(f"{name_of(dist)} was given by probabilities: give it logits, in whose space F is bounded")
    if isinstance(dist, td.Bernoulli):
        return vector * torch.sigmoid(dist.logits) * torch.sigmoid(-dist.logits)
    return softmax_fisher(torch.softmax(dist.logits, dim=-1), vector)


def softmax_fisher(p: Tensor, vector: Tensor) -> Tensor:
    """(diag(p) - p p^T) v over the last dimension: the Fisher information of probabilities p in their logits."""
    return p * (vector - (p * vector).sum(-1, keepdim=True))


def _multivariate_normal(dist: td.MultivariateNormal, to_mean: Tensor, to_factor: Tensor) -> tuple[Tensor, Tensor]:
    factor = dist.scale_tril
    mean = torch.cholesky_solve(to_mean.unsqueeze(-1), factor).squeeze(-1)
    # With N = L^-1 V, lower triangular: v^T F v = sum of N_ij^2, the diagonal counted twice.
    n = torch.linalg.solve_triangular(factor, to_factor.tril(), upper=False)
    n = n + torch.diag_embed(n.diagonal(dim1=-2, dim2=-1))
    return mean, torch.linalg.solve_triangular(factor.mT, n, upper=True).tril()


def beta_fisher(a: Tensor, b: Tensor, to_one: Tensor, to_zero: Tensor) -> tuple[Tensor, Tensor]:
    """F v of Betas with concentrations a at 1 and b at 0, elementwise."""
    both = torch.polygamma(1, a + b) * (to_one + to_zero)
    return torch.polygamma(1, a) * to_one - both, torch.polygamma(1, b) * to_zero - both
