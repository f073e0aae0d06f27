"""The Fisher-vector product of each family: half of its quadratic form is what KL becomes for small steps."""

from typing import Any

import pytest
import torch
from torch import distributions as td

from klrl.kl import fisher_vector_product, joint, kl
from klrl.kl.parameters import map_parameters, parameters_of
from klrl.policies.distributions import DiagonalNormal, MultiCategorical


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def masked() -> MultiCategorical:
    logits = randn(5, 2, 3)
    logits[:, 0, 2] = float("-inf")
    return MultiCategorical(logits)


FAMILIES: dict[str, Any] = {
    "categorical": lambda: td.Categorical(logits=randn(5, 4)),
    "one-hot": lambda: td.OneHotCategorical(logits=randn(5, 4)),
    "bernoulli": lambda: td.Bernoulli(logits=randn(5)),
    "normal": lambda: td.Normal(randn(5), randn(5).exp()),
    "joint normal": lambda: joint(td.Normal(randn(5, 3), randn(5, 3).exp())),
    "full-covariance normal": lambda: td.MultivariateNormal(
        randn(5, 3), scale_tril=0.3 * randn(5, 3, 3).tril(-1) + torch.diag_embed(randn(5, 3).exp())
    ),
    "squashed normal": lambda: td.TransformedDistribution(td.Normal(randn(5), randn(5).exp()), [td.TanhTransform()]),
    "beta": lambda: td.Beta(randn(5).exp(), randn(4 + 1).exp() + 1),
    "masked categoricals": masked,
    "diagonal normal": lambda: DiagonalNormal(randn(5, 3), randn(5, 3)),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kl_of_a_small_step_is_half_the_fisher_form(family: str) -> None:
    torch.manual_seed(0)
    dist = FAMILIES[family]()
    parameters = parameters_of(dist)
    vectors = [torch.randn_like(p) for p in parameters]
    if family.startswith("full"):
        vectors[1] = vectors[1].tril()
    products = fisher_vector_product(dist, *vectors)
    form = sum((v * f).flatten(1).sum(1) if v.dim() > 1 else v * f for v, f in zip(vectors, products, strict=True))
    errors = []
    for step in (1e-3, 1e-4):
        moved = iter([p + step * v for p, v in zip(parameters, vectors, strict=True)])
        ratio = kl(dist, map_parameters(dist, lambda _, moved=moved: next(moved))) / (0.5 * step**2 * form)
        errors.append(float((ratio - 1).abs().max()))
    assert errors[1] < 2e-3
    assert errors[1] < 0.2 * errors[0] + 1e-6, "and the rest is of third order"


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(5, 4\)\]"):
        fisher_vector_product(td.Categorical(logits=randn(5, 4)), randn(5, 3))
    with pytest.raises(ValueError, match="given by probabilities"):
        fisher_vector_product(td.Categorical(probs=torch.ones(2, 2)), torch.ones(2, 2))
    with pytest.raises(ValueError, match="a transform folds it"):
        fisher_vector_product(td.HalfNormal(torch.ones(2)), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="of Gamma is not known"):
        fisher_vector_product(td.Gamma(torch.ones(2), torch.ones(2)), torch.ones(2), torch.ones(2))
