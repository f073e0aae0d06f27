"""Families and shapes beyond the policies' own: what is exact stays exact, what cannot be compared is named."""

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import distributions as td

from klrl.kl import (
    NoClosedFormError,
    at_most,
    entropy,
    freeze,
    joint,
    js,
    kl,
    mc_entropy,
    mc_kl,
    measure,
    renyi,
    total_variation,
    track,
)
from klrl.policies.distributions import MultiCategorical

mp.mp.dps = 50
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (td.Gumbel(0 * ONE, ONE), td.Gumbel(3 * ONE, ONE)),
        (td.Pareto(ONE, ONE), td.Pareto(3 * ONE, ONE)),
        (td.HalfNormal(ONE), td.HalfNormal(2 * ONE)),
        (td.LogNormal(0 * ONE, ONE), td.LogNormal(ONE, 2 * ONE)),
        (td.Gamma(ONE, ONE), td.Gamma(3 * ONE, ONE)),
    ],
    ids=lambda dist: type(dist).__name__,
)
def test_families_that_torch_knows_have_the_kl_that_torch_gives(old: td.Distribution, new: td.Distribution) -> None:
    assert torch.allclose(kl(old, new), td.kl_divergence(old, new))


def test_a_family_whose_kl_torch_has_wrong_has_none() -> None:
    old, new = (td.Wishart(torch.tensor([freedom]), torch.eye(3)) for freedom in (4.0, 5.0))
    with pytest.raises(NoClosedFormError, match="Wishart"):
        kl(old, new)


def test_only_equal_and_bijective_transforms_keep_the_kl_of_the_bases() -> None:
    def moved(transform: Any, mean: float = 0.0) -> td.TransformedDistribution:
        return td.TransformedDistribution(td.Normal(mean * ONE, ONE), [td.TanhTransform(), transform])

    same = td.AffineTransform(1.0, 2.0)
    assert kl(moved(same), moved(td.AffineTransform(1.0, 2.0), 1.0)).tolist() == [0.5]
    for old, new in ((same, td.AffineTransform(5.0, 2.0)), (same, td.ExpTransform())):
        with pytest.raises(NoClosedFormError, match="different transforms"):
            kl(moved(old), moved(new))
    with pytest.raises(NoClosedFormError):
        kl(moved(td.AbsTransform()), moved(td.AbsTransform(), 1.0))


def mp_renyi(old: list[float], new: list[float], alpha: float) -> float:
    tables = [[mp.exp(mp.mpf(x)) for x in logits] for logits in (old, new)]
    p, q = ([x / sum(table) for x in table] for table in tables)
    a = mp.mpf(alpha)
    terms = [x**a * y ** (1 - a) for x, y in zip(p, q, strict=True) if x > 0]
    return float(mp.log(sum(terms)) / (a - 1))


@pytest.mark.parametrize(
    ("old", "new", "alpha"),
    [
        ([0.0, -70.0, -70.0], [-70.0, 0.0, 1.0], 0.5),
        ([0.0, -73.0, -73.0], [-73.0, 0.0, 1.0], 0.5),
        ([math.log(9), 0.0, 0.0], [0.0, math.log(9), 0.0], 330.0),
        ([0.0, 1.0, -math.inf], [0.5, 1.0, -math.inf], 1 + 1e-7),
        ([0.0, 0.001, 0.0], [0.0, 0.0, 0.0], 2.0),
        ([0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], 2.0),
    ],
)
def test_renyi_far_apart_near_and_masked(old: list[float], new: list[float], alpha: float) -> None:
    pair = [td.Categorical(logits=torch.tensor([logits, [0.0, 0.0, -math.inf]]).double()) for logits in (old, new)]
    value = renyi(*pair, alpha)
    assert float(value[0]) == pytest.approx(mp_renyi(old, new, alpha), rel=1e-5)
    assert float(value[1]) == 0.0


def test_a_frozen_copy_differs_in_nothing() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(1000, 5).to(dtype)
        with track(lambda logits=logits: td.Categorical(logits=logits), at_most(0.0)) as update:  # type: ignore[misc]
            pass
        assert (update.report.max, update.report.of_limit) == (0.0, 0.0)
    full = td.MultivariateNormal(torch.zeros(50, 3), covariance_matrix=torch.cov(torch.randn(3, 9)).expand(50, 3, 3))
    assert float(kl(full, freeze(full)).max()) == 0.0
    log_normal = td.LogNormal(torch.zeros(4), torch.ones(4))
    assert torch.equal(freeze(log_normal).entropy(), log_normal.entropy())


def test_gradients_may_be_attached_where_none_are_given() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    old = td.Categorical(logits=torch.randn(3, 4))
    assert not js(old, td.Categorical(logits=logits)).requires_grad
    for function in (kl, total_variation, lambda a, b: renyi(a, b, 0.5)):
        (gradient,) = torch.autograd.grad(function(old, td.Categorical(logits=logits)).sum(), logits)
        assert bool(gradient.isfinite().all())


def test_autocast_rounds_nothing() -> None:
    torch.manual_seed(0)
    old, new = (joint(td.Normal(torch.randn(8, 3), torch.ones(8, 3))) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl(old, new), kl(old, new).float())
        inside = kl(old, new)
    assert torch.equal(inside, kl(old, new))


@pytest.mark.parametrize(
    ("measure_them", "old", "new", "message"),
    [
        (kl, td.Normal(torch.zeros(2), 1.0), td.Laplace(torch.zeros(3), 1.0), "one shape"),
        (kl, td.Normal(torch.zeros(1), 1.0), td.Laplace(torch.zeros(3), 1.0), "one shape"),
        (kl, MultiCategorical(torch.zeros(4, 2, 3)), MultiCategorical(torch.zeros(4, 2, 2)), "one shape"),
        (kl, MultiCategorical(torch.zeros(4, 2, 3)), MultiCategorical(torch.zeros(4, 2, 1)), "one shape"),
        (js, td.Categorical(torch.ones(4, 2)), td.Bernoulli(0.5 * torch.ones(4)), "different families"),
        (renyi, td.Categorical(torch.ones(4, 2)), td.Bernoulli(0.5 * torch.ones(4)), "different families"),
        (renyi, td.Categorical(torch.ones(4, 2)), td.Categorical(torch.ones(4, 1)), "one shape"),
        (kl, td.Gamma(math.nan * ONE, ONE, validate_args=False), td.Gamma(ONE, ONE), "old is a Gamma with parameters"),
        (kl, td.Gamma(-ONE, ONE, validate_args=False), td.Gamma(ONE, ONE), "Gamma and Gamma is nan"),
    ],
)
def test_what_cannot_be_compared_is_named(
    measure_them: Callable[..., Any], old: td.Distribution, new: td.Distribution, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_them(old, new, *([0.5] if measure_them is renyi else []))


def test_products_of_unequal_categoricals_have_every_discrete_measure() -> None:
    torch.manual_seed(0)
    old, new = ([td.Categorical(logits=torch.randn(5, n)) for n in (2, 3)] for _ in range(2))
    flat = [td.Categorical(logits=(a.logits[:, :, None] + b.logits[:, None, :]).flatten(1)) for a, b in (old, new)]
    for function in (js, total_variation, lambda a, b: renyi(a, b, 0.5)):
        assert torch.allclose(function(joint(old), joint(new)), function(*flat), rtol=1e-5)


def test_estimates_say_when_they_are_infinite() -> None:
    value, stderr = mc_kl(td.Uniform(torch.zeros(3), 2 * torch.ones(3)), td.Uniform(torch.zeros(3), torch.ones(3)))
    assert value.tolist() == stderr.tolist() == [math.inf] * 3
    sure = mc_kl(td.Uniform(torch.zeros(3), torch.ones(3)), td.Uniform(torch.zeros(3), torch.ones(3)))
    assert sure.value.tolist() == [0.0] * 3


def test_the_entropy_of_wrapped_nested_and_mixed_transforms_is_estimated() -> None:
    torch.manual_seed(0)
    tanh, base = [td.TanhTransform()], td.Normal(5.0 * torch.ones(20, 2), 2.0)
    inside = td.TransformedDistribution(td.Independent(base, 1), tanh)
    around = joint(td.TransformedDistribution(base, tanh))
    first, second = mc_entropy(inside, 4000), mc_entropy(around, 4000)
    assert bool(((first.value - second.value).abs() < 5 * (first.stderr + second.stderr)).all())
    nested = td.TransformedDistribution(td.TransformedDistribution(base, [td.AffineTransform(0.0, 1.0)]), tanh)
    assert torch.allclose(mc_entropy(nested, 4000).value.sum(-1), first.value, atol=0.5)
    parts = td.MixtureSameFamily(td.Categorical(torch.ones(20, 2)), base)
    mixture = td.TransformedDistribution(parts, tanh)
    assert bool(mc_entropy(mixture, 100).value.isfinite().all())
    report = measure(around, joint(td.TransformedDistribution(td.Normal(5.1 * torch.ones(20, 2), 2.0), tanh)))
    assert math.isfinite(report.entropy)
    assert not report.estimated
    with pytest.raises(ValueError, match="AbsTransform is not bijective"):
        mc_entropy(td.TransformedDistribution(base, [td.AbsTransform()]))
    with pytest.raises(NoClosedFormError, match="mc_entropy estimates it"):
        entropy(inside)
