"""Monte Carlo errors: an interval that says 95 % holds the exact KL about so often, or the error is infinite."""

import math

import pytest
import torch
from torch import distributions as td

from klrl.kl import NoClosedFormError, kl, kl_estimate, mc_kl

REPEATS = 1000


def normals(mean: float, std: float, dims: int) -> tuple[td.Distribution, td.Distribution]:
    zero, one = torch.zeros(REPEATS, dims), torch.ones(REPEATS, dims)
    return td.Independent(td.Normal(zero, one), 1), td.Independent(td.Normal(zero + mean, std * one), 1)


@pytest.mark.parametrize(
    ("mean", "std", "dims"),
    [
        (0.1, 1.1, 1),
        (0.0, 2.0, 1),
        (0.0, 5.0, 1),
        (0.0, 0.5, 1),
        (0.0, 0.1, 1),
        (0.01, 1.0, 1),
        (3.0, 1.0, 1),
        (0.05, 1.05, 17),
        (0.0, 2.0, 17),
        (0.5, 1.0, 17),
    ],
)
def test_the_interval_of_mc_kl_holds_the_exact_value(mean: float, std: float, dims: int) -> None:
    torch.manual_seed(0)
    old, new = normals(mean, std, dims)
    estimate, exact = mc_kl(old, new), kl(old, new)
    assert bool((estimate.value >= 0).all())
    share = float(((estimate.value - exact).abs() <= 1.96 * estimate.stderr).double().mean())
    assert 0.9 <= share <= 0.975
    assert abs(float(estimate.value.mean() - exact[0])) < 4 * float(estimate.value.std()) / REPEATS**0.5, "unbiased"


def test_mc_kl_is_unbiased_where_new_has_mass_outside_of_old() -> None:
    torch.manual_seed(0)
    narrow, wide = (td.Uniform(torch.zeros(400), high * torch.ones(400)) for high in (1.0, 2.0))
    assert float(mc_kl(narrow, wide).value.mean()) == pytest.approx(math.log(2), rel=0.01)
    assert mc_kl(narrow, narrow).stderr.tolist() == [0.0] * 400


def held(kind: str, mean: float, std: float, n: int) -> tuple[float, float]:
    """The share of 200 samples of size n whose error is finite, and that whose interval holds the exact KL."""
    torch.manual_seed(0)
    old, new = td.Normal(0.0, 1.0), td.Normal(mean, std)
    exact, samples = float(td.kl_divergence(old, new)), old.sample((200, n)).double()
    estimates = [kl_estimate(x, kind) for x in new.log_prob(samples) - old.log_prob(samples)]  # type: ignore[arg-type]
    finite = sum(math.isfinite(e.stderr) for e in estimates)
    return finite / 200, sum(abs(e.value - exact) <= 1.96 * e.stderr for e in estimates) / 200


@pytest.mark.parametrize(("mean", "std"), [(0.1, 1.1), (0.0, 2.0), (0.0, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_the_interval_of_k1_holds_the_exact_value(mean: float, std: float) -> None:
    finite, share = held("k1", mean, std, 512)
    assert finite == 1.0
    assert 0.9 <= share <= 0.99


@pytest.mark.parametrize(("mean", "std"), [(0.1, 1.0), (0.3, 1.0), (0.2, 1.05), (0.0, 0.5)])
def test_the_interval_of_k3_holds_the_exact_value_where_the_ratio_has_a_light_tail(mean: float, std: float) -> None:
    finite, share = held("k3", mean, std, 2048)
    assert finite > 0.95
    assert 0.9 <= share <= 0.99


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.42), (0.0, 2.0), (0.0, 5.0), (3.0, 1.0), (10.0, 1.0)])
def test_k3_has_no_error_where_the_ratio_has_a_heavy_tail(mean: float, std: float) -> None:
    for n in (256, 2048):
        finite, share = held("k3", mean, std, n)
        assert finite <= 0.01
        assert share >= 0.99


def test_no_error_comes_of_one_sample_and_of_an_infinite_ratio() -> None:
    assert kl_estimate(torch.zeros(1)).stderr == math.inf
    assert kl_estimate(torch.tensor([0.0, 0.1, -math.inf])) == (math.inf, math.inf)
    assert kl_estimate(torch.zeros(2)) == (0.0, 0.0)


def test_what_cannot_score_samples_is_named() -> None:
    class OneWay(td.Transform):
        domain = codomain = td.constraints.real
        bijective = True

        def _call(self, x: torch.Tensor) -> torch.Tensor:
            return x

    normal = td.Normal(torch.zeros(3), torch.ones(3))
    with pytest.raises(NoClosedFormError, match="TransformedDistribution and Normal: one has no sample or log_prob"):
        mc_kl(td.TransformedDistribution(normal, [OneWay()]), normal)
