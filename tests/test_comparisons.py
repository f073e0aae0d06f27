"""JS, Jeffreys, Renyi, total variation, entropies, and KL of full-covariance and squashed normals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import distributions as td

from klrl.kl import (
    NoClosedFormError,
    cross_entropy,
    entropy,
    freeze,
    jeffreys,
    joint,
    js,
    kl,
    mc_entropy,
    mutual_information,
    pinsker_bound,
    renyi,
    total_variation,
)
from klrl.policies.distributions import DiagonalNormal, MultiCategorical


def random_categoricals(spread: float = 1.0) -> tuple[td.Categorical, td.Categorical]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=rng)
    return td.Categorical(logits=logits), td.Categorical(logits=logits + spread * torch.randn(500, 5, generator=rng))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_measure_is_as_precise_as_the_policies_are(dtype: torch.dtype) -> None:
    old, new = (td.Categorical(logits=x.to(dtype)) for x in torch.randn(2, 8, 3, generator=torch.manual_seed(0)))
    for measure in (kl, js, total_variation, lambda p, q: renyi(p, q, 0.5)):
        assert measure(old, new).dtype == dtype
    wide = [td.Normal(x.to(dtype), torch.ones(8, dtype=dtype)) for x in torch.zeros(2, 8)]
    assert renyi(*wide, 0.5).dtype == dtype


def test_js_matches_a_hand_computed_example_and_its_bounds() -> None:
    old = td.Categorical(probs=torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    new = td.Categorical(probs=torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    assert js(old, new).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    assert js(old, new, units="bits").tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert total_variation(old, new).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_js_is_zero_at_identity() -> None:
    old, _ = random_categoricals()
    assert bool((js(old, old) == 0).all())


def test_root_js_is_a_metric() -> None:
    torch.manual_seed(0)
    a, b, c = (td.Categorical(logits=2 * torch.randn(1000, 4)) for _ in range(3))
    assert torch.allclose(js(a, b), js(b, a))
    assert bool((js(a, c).sqrt() <= js(a, b).sqrt() + js(b, c).sqrt() + 1e-6).all())


def test_identities_between_the_measures() -> None:
    old, new = random_categoricals()
    assert torch.allclose(cross_entropy(old, new), -(old.probs * new.logits).sum(-1), rtol=1e-5)
    assert torch.allclose(cross_entropy(old, new), entropy(old) + kl(old, new))
    assert torch.allclose(jeffreys(old, new), kl(old, new) + kl(new, old))
    assert torch.allclose(entropy(old, "bits") * math.log(2), entropy(old))
    assert bool((total_variation(old, new) <= pinsker_bound(kl(old, new)) + 1e-6).all())
    with pytest.raises(ValueError, match="units"):
        entropy(old, "hartleys")  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
def test_renyi_equals_its_definition_and_kl_in_the_limit(spread: float, alpha: float) -> None:
    old, new = random_categoricals(spread)
    log_p, log_q = (torch.log_softmax(d.logits.double(), -1) for d in (old, new))
    definition = torch.logsumexp(alpha * log_p + (1 - alpha) * log_q, -1) / (alpha - 1)
    assert torch.allclose(renyi(old, new, alpha).double(), definition, rtol=1e-5, atol=1e-14)
    assert torch.allclose(renyi(old, new, 1 + 1e-7), kl(old, new), rtol=1e-4)
    assert torch.equal(renyi(old, new, 1.0), kl(old, new))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_renyi_of_forbidden_and_nearly_forbidden_actions(alpha: float) -> None:
    inf = math.inf
    old = torch.tensor([[0.0, -720.0], [-inf, 0.0], [0.0, 0.0], [-inf, 0.0]]).unsqueeze(0)
    new = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-inf, 0.0], [-inf, 5.0]]).unsqueeze(0)
    value = renyi(td.Categorical(logits=old), td.Categorical(logits=new), alpha)[0].tolist()
    masked = math.log(2) if alpha < 1 else inf  # half of old's mass has no counterpart: -2 log(sqrt(1/2)), or infinite
    assert value == pytest.approx([math.log(2), math.log(2), masked, 0.0], rel=1e-6)


@pytest.mark.parametrize("measure", [kl, js, total_variation, jeffreys, lambda old, new: renyi(old, new, 0.5)])
def test_nan_parameters_are_named_by_every_measure(measure: Callable[..., torch.Tensor]) -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="new is a Categorical with parameters that are nan"):
        measure(td.Categorical(logits=good), td.Categorical(logits=bad, validate_args=False))


def test_renyi_of_normals_matches_quadrature() -> None:
    old, new, alpha = td.Normal(0.2, 0.7), td.Normal(-0.1, 1.1), 0.6
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    integrand = torch.exp(alpha * old.log_prob(x) + (1 - alpha) * new.log_prob(x))
    expected = torch.log(torch.trapezoid(integrand, x)) / (alpha - 1)
    one = [td.Normal(torch.tensor([float(d.loc)]), torch.tensor([float(d.scale)])) for d in (old, new)]
    assert float(renyi(one[0], one[1], alpha)) == pytest.approx(float(expected), rel=1e-4)
    wide, narrow = td.Normal(torch.zeros(1), 3 * torch.ones(1)), td.Normal(torch.zeros(1), torch.ones(1))
    assert float(renyi(wide, narrow, 2.0)) == math.inf, "no density results: the tails are too heavy"


def test_joint_distributions_are_compared_as_one() -> None:
    torch.manual_seed(0)
    old, new = MultiCategorical(torch.randn(6, 2, 3)), MultiCategorical(torch.randn(6, 2, 3))
    outcomes = [(d.log_probs[:, 0, :, None] + d.log_probs[:, 1, None, :]).flatten(1) for d in (old, new)]
    flat = [td.Categorical(logits=x) for x in outcomes]
    assert torch.allclose(js(old, new), js(flat[0], flat[1]), rtol=1e-5)
    assert torch.allclose(total_variation(old, new), total_variation(flat[0], flat[1]), rtol=1e-5)
    assert torch.allclose(renyi(old, new, 0.5), renyi(flat[0], flat[1], 0.5), rtol=1e-5)
    coins = [joint(td.Bernoulli(logits=torch.randn(6, 4))) for _ in range(2)]
    assert js(coins[0], coins[1]).shape == (6,)
    many = MultiCategorical(torch.zeros(1, 20, 3))
    with pytest.raises(ValueError, match="joint outcomes"):
        js(many, many)


def test_one_hot_actions_are_compared_as_their_numbers_are() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=torch.manual_seed(0))
    hot, numbers = ([joint(make(logits=x)) for x in logits] for make in (td.OneHotCategorical, td.Categorical))
    for measure in (js, total_variation, lambda old, new: renyi(old, new, 0.5), lambda old, _: mutual_information(old)):
        assert torch.equal(measure(*hot), measure(*numbers))


def test_what_has_no_closed_form_is_refused() -> None:
    normal = DiagonalNormal(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="both must be discrete, and of finitely many outcomes"):
        js(normal, normal)
    with pytest.raises(ValueError, match="alpha"):
        renyi(normal, normal, 0.0)
    beta = td.Beta(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="no closed form between Beta and Beta"):
        renyi(beta, beta, 0.5)


def ar1(dimension: int, rho: float) -> torch.Tensor:
    index = torch.arange(dimension, dtype=torch.float64)
    return torch.linalg.cholesky(rho ** (index[:, None] - index).abs()).float()


def test_full_covariance_kl_is_exact_in_200_dimensions_and_near_identity() -> None:
    old = td.MultivariateNormal(torch.zeros(200), scale_tril=ar1(200, 0.9))
    new = td.MultivariateNormal(0.1 * torch.ones(200), scale_tril=ar1(200, 0.8))
    exact = td.kl_divergence(
        td.MultivariateNormal(old.loc.double(), scale_tril=old.scale_tril.double()),
        td.MultivariateNormal(new.loc.double(), scale_tril=new.scale_tril.double()),
    )
    assert float(kl(old, new)) == pytest.approx(float(exact), rel=1e-6)
    assert float(kl(old, freeze(old))) == 0.0
    near = td.MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3) * (1 + 1e-4))
    unit = td.MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3))
    u = -2 * math.log(float(near.scale_tril[0, 0].double()))
    assert float(kl(unit, near)) == pytest.approx(1.5 * (math.expm1(u) - u), rel=1e-5)


def test_a_squashed_normal_has_the_kl_of_its_base() -> None:
    dist = squashed(0.5, 1.0)[1]
    assert kl(squashed(0.0, 1.0)[1], squashed(1.0, 1.0)[1]).tolist() == pytest.approx([1.0])
    assert kl(dist, freeze(dist)).tolist() == [0.0]
    other = td.TransformedDistribution(dist.base_dist, [td.ExpTransform()])
    with pytest.raises(ValueError, match="different transforms"):
        kl(dist, other)


def squashed(mean: float, std: float) -> tuple[td.TransformedDistribution, td.TransformedDistribution]:
    """A tanh of a normal, bare in one dimension and joint in two."""
    loc, scale = torch.full((1, 2), mean), torch.full((1, 2), std)
    tanh = [td.TanhTransform()]
    one = td.TransformedDistribution(td.Normal(loc[:, 0], scale[:, 0]), tanh)
    return one, td.TransformedDistribution(td.Independent(td.Normal(loc, scale), 1), tanh)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (3.0, 0.5), (-9.0, 3.0), (0.0, 0.01), (50.0, 1e-3)])
def test_the_entropy_of_a_squashed_normal_is_estimated_as_quadrature_has_it(mean: float, std: float) -> None:
    torch.manual_seed(0)
    x = torch.linspace(mean - 12 * std, mean + 12 * std, 200_001, dtype=torch.float64)
    log_p = td.Normal(torch.tensor(mean, dtype=torch.float64), std).log_prob(x)
    log_slope = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
    exact = float(torch.trapezoid(log_p.exp() * (log_slope - log_p), x))
    for dist, dimensions in zip(squashed(mean, std), (1, 2), strict=True):
        value, stderr = mc_entropy(dist, 10_000)
        assert value.shape == (1,)
        assert abs(float(value) - dimensions * exact) < 4 * float(stderr) + 1e-5 * abs(exact)
        assert float(stderr) < 0.1
        with pytest.raises(NoClosedFormError, match="mc_entropy estimates it"):
            entropy(dist)


def test_the_entropy_of_a_mixture_is_estimated() -> None:
    torch.manual_seed(0)
    mixture = td.MixtureSameFamily(
        td.Categorical(torch.ones(1, 2)), td.Normal(torch.tensor([[-50.0, 50.0]]), torch.ones(1, 2))
    )
    value, stderr = mc_entropy(mixture, 4_000)
    exact = math.log(2) + 0.5 * math.log(2 * math.pi * math.e)  # the two do not overlap
    assert abs(float(value) - exact) < 4 * float(stderr)
