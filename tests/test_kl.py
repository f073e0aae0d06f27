"""The heart: exact KL, its semantics, its gradients, control and tracking."""

import math
from typing import Any

import pytest
import torch
from torch import distributions as td

from klrl.kl import (
    KLLimit,
    NoClosedFormError,
    at_most,
    categorical_kl,
    concatenate,
    freeze,
    joint,
    kl,
    kl_estimate,
    mc_kl,
    measure,
    normal_kl,
    reverse_kl,
    select,
    track,
)
from klrl.policies.distributions import DiagonalNormal, MultiCategorical

INF = float("inf")


def test_categorical_kl_matches_a_hand_computed_example() -> None:
    old, new = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    # 0.5 ln 2 + 0 + 0.25 ln 0.5 = 0.25 ln 2
    assert float(categorical_kl(old, new)) == pytest.approx(0.25 * math.log(2), rel=1e-7)


def test_normal_kl_matches_a_hand_computed_example() -> None:
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    # KL(N(0, 1) || N(1, 2)) = ln 2 + (1 + 1)/8 - 1/2
    value = normal_kl(zero, zero, one, torch.tensor(math.log(2.0), dtype=torch.float64))
    assert float(value) == pytest.approx(math.log(2) - 0.25, rel=1e-7)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([0.0, 0.0], [5.0, 5.0], 0.0),
        ([-INF, 0.0, 0.0], [-INF, 0.0, 0.0], 0.0),
        ([-INF, 0.0, 0.0], [0.0, 0.0, 0.0], math.log(1.5)),
        ([0.0, 0.0, 0.0], [-INF, 0.0, 0.0], INF),
        ([-1e9, 0.0, 0.0], [-1e9, 0.0, 0.0], 0.0),
        ([200.0, 0.0], [0.0, 200.0], 200.0),
        ([0.0, -720.0], [0.0, 0.0], math.log(2)),
    ],
)
def test_support_and_extremes_have_their_exact_kl(old: list[float], new: list[float], expected: float) -> None:
    assert float(categorical_kl(torch.tensor(old), torch.tensor(new))) == pytest.approx(expected, rel=1e-6)


def test_kl_is_never_negative_and_zero_only_at_identity() -> None:
    rng = torch.Generator().manual_seed(2)
    old = 3 * torch.randn(20_000, 4, generator=rng)
    new = old + 1e-4 * torch.randn(20_000, 4, generator=rng)
    values = categorical_kl(old, new)
    assert bool((values > 0).all())
    assert bool((categorical_kl(old, old.clone()) == 0).all())
    mean, log_std = old[:, :2], old[:, 2:]
    assert bool((normal_kl(mean, log_std, mean.clone(), log_std.clone()) == 0).all())


def test_nan_parameters_are_named() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="new is a Categorical with parameters that are nan"):
        kl(td.Categorical(logits=good), td.Categorical(logits=bad, validate_args=False))
    with pytest.raises(ValueError, match=r"old is a Independent\(Normal\) with parameters that are nan"):
        kl(joint(td.Normal(bad, 1.0, validate_args=False)), joint(td.Normal(good, 1.0)))


def test_a_list_of_unequal_categoricals_is_one_product() -> None:
    torch.manual_seed(0)
    old, new = ([td.Categorical(logits=torch.randn(5, n)) for n in (2, 4, 3)] for _ in range(2))
    expected = sum(kl(a, b) for a, b in zip(old, new, strict=True))
    assert torch.allclose(kl(joint(old), joint(new)), expected)  # type: ignore[arg-type]
    assert torch.equal(td.kl_divergence(joint(old), joint(new)), kl(joint(old), joint(new)))
    sample = joint(old).sample()
    assert sample.shape == (5, 3)
    assert joint(freeze(joint(old))).log_prob(sample).shape == (5,)
    assert torch.allclose(joint(old).entropy(), sum(part.entropy() for part in old))  # type: ignore[arg-type]


def test_beta_agrees_with_torch_in_float64_and_is_zero_at_identity() -> None:
    torch.manual_seed(0)
    a, b, c, d = (0.2 + 5 * torch.rand(4, 500)).unbind(0)
    exact = td.kl_divergence(td.Beta(a.double(), b.double()), td.Beta(c.double(), d.double()))
    assert torch.allclose(kl(td.Beta(a, b), td.Beta(c, d)).double(), exact, rtol=1e-5)
    assert bool((kl(td.Beta(a, b), td.Beta(a.clone(), b.clone())) == 0).all())


def test_mixtures_are_estimated_and_said_to_be() -> None:
    torch.manual_seed(0)

    def mixture(shift: float) -> td.MixtureSameFamily:
        parts = td.Normal(torch.tensor([[-1.0, 1.0]]) + shift, torch.ones(1, 2))
        return td.MixtureSameFamily(td.Categorical(torch.ones(1, 2)), parts)

    old, new = mixture(0.0), mixture(0.5)
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)[:, None]
    p, q = old.log_prob(x), new.log_prob(x)
    exact = float(torch.trapezoid((p.exp() * (p - q))[:, 0], x[:, 0]))
    value, stderr = mc_kl(old, new, 20_000)
    assert abs(float(value) - exact) < 4 * float(stderr)
    with pytest.raises(NoClosedFormError, match="no closed-form KL between MixtureSameFamily"):
        kl(old, new)
    report = measure(old, new, at_most(0.1))
    assert report.estimated
    assert not measure(*(td.Normal(torch.zeros(3), torch.ones(3)),) * 2).estimated
    with pytest.raises(ValueError, match="at least 2"):
        mc_kl(old, new, 1)


def test_masked_actions_keep_finite_gradients() -> None:
    old = torch.tensor([-INF, 0.0, 1.0], requires_grad=True)
    new = torch.tensor([-INF, 0.0, 2.0], requires_grad=True)
    categorical_kl(old, new).backward()
    assert old.grad is not None
    assert new.grad is not None
    assert bool(torch.isfinite(old.grad).all() and torch.isfinite(new.grad).all())
    assert float(new.grad[0]) == 0.0


def test_kl_takes_torch_distributions_and_gives_their_joint_when_asked() -> None:
    torch.manual_seed(0)
    mean, std = torch.randn(7, 3), torch.rand(7, 3) + 0.5
    old, new = td.Normal(mean, std), td.Normal(mean + 1, std)
    assert kl(old, new).shape == (7, 3)
    assert torch.allclose(kl(joint(old), joint(new)), td.kl_divergence(old, new).sum(-1), rtol=1e-5)
    coin, other = td.Bernoulli(logits=torch.randn(5)), td.Bernoulli(logits=torch.randn(5))
    assert torch.allclose(kl(coin, other), td.kl_divergence(coin, other), rtol=1e-4)
    a, b = td.Categorical(logits=torch.randn(5, 3)), td.Categorical(logits=torch.randn(5, 3))
    assert torch.allclose(kl(a, b), td.kl_divergence(a, b), rtol=1e-4)
    assert torch.equal(reverse_kl(a, b), kl(b, a))


def test_probabilities_of_zero_are_taken_as_they_are() -> None:
    old, new = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    pair = td.Categorical(probs=old), td.Categorical(probs=new.clone().requires_grad_())
    assert float(kl(*pair).detach()) == INF
    assert float(kl(pair[1], pair[0]).detach()) == pytest.approx(math.log(2))
    assert float(kl(td.Bernoulli(probs=torch.tensor(1.0)), td.Bernoulli(probs=torch.tensor(0.0)))) == INF
    assert float(kl(freeze(pair[0]), td.Categorical(probs=old))) == 0.0


def test_our_distributions_are_registered_with_torch() -> None:
    old, new = MultiCategorical(torch.randn(4, 2, 3)), MultiCategorical(torch.randn(4, 2, 3))
    assert torch.equal(td.kl_divergence(old, new), kl(old, new))
    assert torch.allclose(kl(old, new), categorical_kl(old.logits, new.logits).sum(-1))


def test_a_joint_categorical_has_its_probabilities() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, -INF]]])
    assert torch.allclose(MultiCategorical(logits).probs, torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]))


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match="Normal and Categorical"):
        kl(td.Normal(torch.zeros(2), torch.ones(2)), td.Categorical(logits=torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="one shape"):
        kl(td.Categorical(logits=torch.zeros(2, 3)), td.Categorical(logits=torch.zeros(4, 3)))
    with pytest.raises(ValueError, match="one shape"):
        kl(td.Categorical(logits=torch.zeros(2, 1)), td.Categorical(logits=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="StudentT is not supported"):
        freeze(td.StudentT(torch.ones(1)))


def test_freeze_does_not_follow_the_weights_and_select_takes_rows() -> None:
    weights = torch.nn.Parameter(torch.zeros(3))
    mean = torch.arange(6.0).view(2, 3)
    dist = DiagonalNormal(mean, weights.expand_as(mean))
    frozen = freeze(dist)
    with torch.no_grad():
        weights += 1
    assert float(frozen.log_std.sum()) == 0.0
    assert not frozen.log_std.requires_grad
    assert torch.equal(select(dist, torch.tensor([1])).loc, mean[1:])
    assert torch.equal(concatenate([select(dist, slice(0, 1)), select(dist, slice(1, 2))]).loc, mean)


TORCHS: dict[str, Any] = {
    "one-hot": lambda x: td.OneHotCategorical(logits=x),
    "one-hot of probabilities": lambda x: td.OneHotCategorical(probs=x.exp()),
    "gamma": lambda x: joint(td.Gamma(x.exp(), 2 * x.exp())),
    "dirichlet": lambda x: td.Dirichlet(x.exp()),
    "laplace": lambda x: joint(td.Laplace(x, x.exp())),
    "cauchy": lambda x: joint(td.Cauchy(x, x.exp())),
    "exponential": lambda x: joint(td.Exponential(x.exp())),
    "poisson": lambda x: joint(td.Poisson(x.exp())),
    "log-normal": lambda x: joint(td.LogNormal(x, x.exp())),
    "low-rank normal": lambda x: td.LowRankMultivariateNormal(x, x.unsqueeze(-1), x.exp()),
}


@pytest.mark.parametrize("family", TORCHS)
def test_policies_of_torchs_other_families_are_held(family: str) -> None:
    make = TORCHS[family]
    weight = torch.randn(4, 3, generator=torch.manual_seed(0), requires_grad=True)
    before = make(weight.detach().clone())
    limit = KLLimit(at_most(0.01), on_overshoot="project")
    with limit.update(lambda: make(weight), [weight]) as move, torch.no_grad():
        weight += torch.linspace(0, 1, 3)
    assert kl(move.old, before).tolist() == [0.0] * 4
    assert move.report.attempted > 0.01 >= move.report.mean > 0.009
    halves = [select(move.new, slice(0, 2)), select(move.new, torch.tensor([2, 3]))]
    assert kl(concatenate(halves), move.new).tolist() == [0.0] * 4
    value = before.sample()
    assert torch.equal(move.old.log_prob(value), before.log_prob(value))


def test_a_subclass_of_torchs_has_its_kl_in_float64() -> None:
    class Portfolio(td.Dirichlet):
        pass

    concentration = 100 * torch.rand(4, 5, generator=torch.manual_seed(0)) + 1
    plain, own = td.Dirichlet(1.0001 * concentration), Portfolio(1.0001 * concentration)
    assert torch.equal(kl(td.Dirichlet(concentration), own), kl(td.Dirichlet(concentration), plain))
    assert float(kl(own, td.Dirichlet(concentration)).min()) > 0


def test_poissons_of_rate_zero_are_compared() -> None:
    old, new = td.Poisson(torch.tensor([0.0, 0.0, 2.0, 2.0])), td.Poisson(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    # b - a + a log(a / b)
    assert kl(old, new).tolist() == pytest.approx([1.0, 0.0, INF, 2 * math.log(2) - 1])


def test_what_a_frozen_policy_would_lose_is_refused_and_straight_through_gradients_are_kept() -> None:
    one = torch.ones(3)
    for dist in (td.Pareto(one, one), td.Weibull(one, one)):
        with pytest.raises(ValueError, match="is not supported"):
            freeze(dist)
    with pytest.raises(ValueError, match="a transform for each state"):
        select(td.TransformedDistribution(td.Gamma(one, one), [td.AffineTransform(0.0, torch.arange(1.0, 4.0))]), [0])
    assert freeze(td.OneHotCategoricalStraightThrough(logits=torch.zeros(2, 3))).rsample().shape == (2, 3)


def test_estimates_cover_the_exact_kl_and_k3_is_never_negative() -> None:
    torch.manual_seed(0)
    old, new = td.Normal(0.0, 1.0), td.Normal(0.1, 1.1)
    sample = old.sample((200_000,))
    log_ratio = new.log_prob(sample) - old.log_prob(sample)
    exact = float(td.kl_divergence(old, new))
    for kind in ("k1", "k3"):
        estimate = kl_estimate(log_ratio, kind)
        assert abs(estimate.value - exact) < 4 * estimate.stderr
    assert kl_estimate(log_ratio, "k3").stderr < kl_estimate(log_ratio, "k1").stderr
    assert kl_estimate(torch.tensor([0.1, -0.3]), "k2").value == pytest.approx(0.5 * (0.01 + 0.09) / 2)
    with pytest.raises(ValueError, match="kind"):
        kl_estimate(log_ratio, "k4")  # type: ignore[arg-type]


def test_track_measures_after_the_last_step() -> None:
    logits = torch.nn.Parameter(torch.zeros(4, 3))
    with track(lambda: td.Categorical(logits=logits), at_most(0.01)) as update:
        with pytest.raises(RuntimeError, match="after the with block"):
            _ = update.report
        with torch.no_grad():
            logits[:, 0] += 1.0
    expected = kl(td.Categorical(logits=torch.zeros(4, 3)), td.Categorical(logits=logits.detach()))
    report = update.report
    assert report.mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert report.of_limit == pytest.approx(report.mean / 0.01)
    assert report.reverse != report.mean
    assert report.entropy < report.entropy_before == pytest.approx(math.log(3))


def test_a_check_stops_an_update_and_leaves_the_random_numbers_alone() -> None:
    obs = torch.linspace(-1.0, 1.0, 100)[:, None]
    weights = torch.nn.Parameter(torch.zeros(1, 3))

    def policy(obs: torch.Tensor) -> td.Categorical:
        return td.Categorical(logits=obs @ weights)

    torch.manual_seed(0)
    with track(policy, at_most(0.01), obs=obs, subsample=10) as update:
        for epoch in range(100):  # noqa: B007
            with torch.no_grad():
                weights[:, 0] += 0.1
            if not update.check().of_limit < 1.0:
                break
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert 0 < epoch < 10
    assert update.report.mean > 0.01
    assert update.report.mean == update.check().mean
    whole = kl(td.Categorical(logits=torch.zeros(100, 3)), policy(obs)).detach()
    assert any(update.report.max == pytest.approx(float(x), rel=1e-6) for x in whole)
    assert float(whole.mean()) / 2 < update.report.mean < 2 * float(whole.mean())


def test_a_subsample_is_of_the_same_states_before_and_after() -> None:
    logits = torch.randn(50, 3)
    actions = td.Categorical(logits=logits).sample()
    with track(lambda: td.Categorical(logits=logits), actions=actions, subsample=7) as update:
        pass
    assert update.report.max == 0.0
    assert update.report.k1 is not None
    assert update.report.k1.value == 0.0
    with (
        pytest.raises(ValueError, match="between 1 and the 50 states, got 51"),
        track(lambda: td.Categorical(logits=logits), subsample=51),
    ):
        pass


def test_report_ignores_rows_that_only_reset() -> None:
    old = td.Categorical(logits=torch.zeros(3, 2))
    new = td.Categorical(logits=torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]]))
    assert measure(old, new, mask=torch.tensor([True, False, True])).max == 0.0
    assert measure(old, new).max > 1.0
    assert measure(old, old, at_most(0.0)).of_limit == 0.0
    assert measure(old, new, at_most(0.0)).of_limit == INF
    with pytest.raises(ValueError, match="no valid state"):
        measure(old, new, mask=torch.zeros(3, dtype=torch.bool))


def test_report_writes_its_tags_and_quantiles() -> None:
    rng = torch.Generator().manual_seed(0)
    old = td.Categorical(logits=torch.randn(101, 4, generator=rng))
    new = td.Categorical(logits=torch.randn(101, 4, generator=rng))
    actions = old.sample()
    report = measure(old, new, at_most(0.5), log_ratio=new.log_prob(actions) - old.log_prob(actions))
    ordered = kl(old, new).sort().values
    assert (report.p50, report.p95, report.max) == tuple(float(ordered[i]) for i in (50, 95, 100))
    written: dict[str, float] = {}
    report.write(written.__setitem__)
    assert {"kl/mean", "kl/max", "kl/p95", "kl/reverse", "kl/of_limit", "kl/coef", "kl/stopped_at"} <= set(written)
    assert {"kl/rolled_back", "entropy/mean", "kl/k1", "kl/k3", "kl/limit"} <= set(written)


def test_a_joint_distribution_is_asked_for_where_dimensions_are_left() -> None:
    dist = td.Normal(torch.zeros(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="joint"):
        measure(dist, dist)
