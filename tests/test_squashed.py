"""The squashed normal: its density, entropy, KL and samples are those of the actions; its head and its noise."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch import distributions as td

from klrl.errors import UsageError
from klrl.kl import concatenate, fisher_vector_product, freeze, kl, mc_kl, measure, reverse_kl, select
from klrl.policies.distributions import DiagonalNormal
from klrl.policies.squashed import CorrelatedNoise, SquashedHead, SquashedNormal


def some(rows: int = 50, dimensions: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> SquashedNormal:
    rng = torch.Generator().manual_seed(seed)
    mean, log_std = (torch.randn(rows, dimensions, generator=rng, dtype=dtype) for _ in range(2))
    return SquashedNormal(mean, 0.3 * log_std)


def torchs(dist: SquashedNormal) -> td.Distribution:
    return td.Independent(td.TransformedDistribution(td.Normal(dist.loc, dist.log_std.exp()), [td.TanhTransform()]), 1)


def test_the_density_is_torchs_at_any_action() -> None:
    dist = some()
    torch.manual_seed(0)
    action = 0.999 * (2 * torch.rand(50, 3, dtype=torch.float64) - 1)
    assert torch.allclose(dist.log_prob(action), torchs(dist).log_prob(action))
    assert dist.log_prob(action.expand(4, 50, 3)).shape == (4, 50)


def test_the_density_integrates_to_one_and_is_zero_outside() -> None:
    dist = some(20, 1)
    x = torch.tanh(torch.linspace(-12, 12, 20_001, dtype=torch.float64))  # dense where the density is: at the bounds
    density = dist.log_prob(x[:, None, None].expand(-1, 20, 1)).exp()
    assert torch.allclose(torch.trapezoid(density, x, dim=0), torch.ones(20).double(), atol=1e-4)
    outside = torch.tensor([[1.0], [-1.0], [1.5], [-7.0]], dtype=torch.float64)
    assert dist.log_prob(outside[:, None].expand(-1, 20, 1)).eq(-math.inf).all()


def test_a_squashed_action_has_the_density_of_its_sample_and_does_not_saturate() -> None:
    dist = some()
    torch.manual_seed(0)
    noise = torch.randn(50, 3, dtype=torch.float64)
    action, log_prob = dist.squash(noise)
    assert torch.allclose(action, torch.tanh(dist.loc + dist.log_std.exp() * noise))
    assert torch.allclose(log_prob, torchs(dist).log_prob(action), atol=1e-6)
    assert torch.allclose(log_prob, dist.log_prob(action), atol=1e-6)
    far = SquashedNormal(torch.tensor([[60.0], [-60.0]]), torch.zeros(2, 1))
    action, log_prob = far.squash(torch.zeros(2, 1))
    # log N(0) - 2 (log 2 - 60): where 1 - tanh^2 is 0 in float32
    assert log_prob.tolist() == pytest.approx([-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 60.0)] * 2, rel=1e-6)
    assert action.flatten().tolist() == [1.0, -1.0]


def test_the_gradient_of_a_squashed_sample_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    mean, log_std = (torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise, to_action = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    alpha = torch.rand(6, dtype=torch.float64)
    action, log_prob = SquashedNormal(mean, log_std).squash(noise)
    found = torch.autograd.grad((alpha * log_prob).sum() + (to_action * action).sum(), (mean, log_std))
    u = mean + log_std.exp() * noise
    density = (td.Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)
    expected = torch.autograd.grad((alpha * density).sum() + (to_action * torch.tanh(u)).sum(), (mean, log_std))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs)
    far = torch.tensor([[30.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(SquashedNormal(far, torch.zeros(1, 1)).squash(torch.zeros(1, 1))[1].sum(), far)
    assert gradient.item() == pytest.approx(2.0), "where 1 - tanh^2 is 0 in float32"


@pytest.mark.parametrize("log_std", [-3.0, 0.0, 1.0, 2.0])
def test_the_entropy_is_that_of_the_actions(log_std: float) -> None:
    mean = torch.tensor([[0.0, 0.5], [3.0, -1.0], [-0.1, 8.0]], dtype=torch.float64)
    dist = SquashedNormal(mean, torch.full_like(mean, log_std))
    torch.manual_seed(0)
    noise = torch.randn(200_000, 3, 2, dtype=torch.float64)
    samples = -dist.squash(noise)[1]
    stderr = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - dist.entropy()).abs() < 4.5 * stderr).all()
    assert (dist.entropy() <= 2 * math.log(2)).all(), "no more than that of the uniform distribution on -1 to 1"
    # The integral of -p log p over the action a, as one over u = atanh a; 1 - tanh(u)^2 = 1 / cosh(u)^2.
    u = torch.linspace(-100, 100, 400_001, dtype=torch.float64)
    log_normal = td.Normal(mean[0, 1], math.exp(log_std)).log_prob(u)
    log_density = log_normal + 2 * torch.log(torch.cosh(u))
    exact = float(torch.trapezoid(-log_normal.exp() * log_density, u))
    assert float(SquashedNormal(mean[:1, 1:], dist.log_std[:1, 1:]).entropy()) == pytest.approx(exact, abs=1e-4)


def test_the_entropys_gradient_is_finite_and_points_to_the_uniform() -> None:
    mean = torch.tensor([[0.5], [40.0], [0.0]], requires_grad=True)
    log_std = torch.tensor([[0.0], [-20.0], [2.0]], requires_grad=True)
    to_mean, to_log_std = torch.autograd.grad(SquashedNormal(mean, log_std).entropy().sum(), (mean, log_std))
    assert bool(to_mean.isfinite().all() and to_log_std.isfinite().all())
    assert float(to_mean[0]) < 0
    assert float(to_mean[1]) == pytest.approx(-2.0)
    assert float(to_log_std[2]) < 0, "a normal so wide is pressed against both bounds"


def test_the_kl_is_that_of_the_normals_and_of_the_actions() -> None:
    old, new = some(seed=0), some(seed=1)
    expected = kl(DiagonalNormal(old.loc, old.log_std), DiagonalNormal(new.loc, new.log_std))
    assert torch.equal(kl(old, new), expected)
    assert torch.equal(reverse_kl(old, new), kl(new, old))
    assert torch.equal(kl(old, old), torch.zeros(50).double())
    torch.manual_seed(0)
    near = SquashedNormal(old.loc + 0.2, old.log_std - 0.1)
    estimate = mc_kl(torchs(old), torchs(near), 20_000)
    assert ((estimate.value - kl(old, near)).abs() < 4.5 * estimate.stderr).all()
    assert float(kl(old, near).min()) > 0.05
    report = measure(old, new)
    assert report.mean == pytest.approx(float(expected.mean()))
    assert not report.estimated
    assert report.entropy == pytest.approx(float(new.entropy().mean()))
    assert report.entropy < float(new.base.entropy().mean())


def test_the_kl_is_differentiable_and_its_second_derivative_is_the_fisher_matrix() -> None:
    dist = some(4, 2)
    direction = [1e-4 * torch.randn(4, 2, dtype=torch.float64) for _ in range(2)]
    moved = SquashedNormal(dist.loc + direction[0], dist.log_std + direction[1])
    product = fisher_vector_product(dist, *direction)
    quadratic = sum((v * f).sum(-1) for v, f in zip(direction, product, strict=True)) / 2
    assert torch.allclose(kl(dist, moved), quadratic, rtol=1e-3)  # type: ignore[arg-type]
    mean = dist.loc.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(dist, SquashedNormal(mean + 0.1, dist.log_std)).sum(), mean)
    assert torch.allclose(gradient, 0.1 * torch.exp(-2 * dist.log_std))


def test_samples_are_within_the_bounds_and_those_of_the_normals() -> None:
    dist = some(5, 2, torch.float32)
    torch.manual_seed(0)
    sample = dist.sample((50_000,))
    assert sample.shape == (50_000, 5, 2)
    assert float(sample.abs().max()) <= 1.0
    u = torch.atanh(sample.clamp(-0.9999999, 0.9999999))
    assert torch.allclose(u.mean(0), dist.loc, atol=0.05)
    assert torch.allclose(u.std(0), dist.log_std.exp(), rtol=0.05)
    assert torch.allclose(dist.mode, torch.tanh(dist.loc))
    wide = SquashedNormal(torch.full((5, 2), 50.0), torch.full((5, 2), 2.0)).sample((1000,))
    assert bool((wide <= 1.0).all())
    mean = dist.loc.clone().requires_grad_()
    assert not SquashedNormal(mean, dist.log_std).sample().requires_grad
    SquashedNormal(mean, dist.log_std).rsample().sum().backward()
    assert mean.grad is not None
    assert bool((mean.grad > 0).all())


def test_it_freezes_is_selected_and_concatenated_as_itself() -> None:
    mean, log_std = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    dist = SquashedNormal(mean, log_std)
    frozen = freeze(dist)
    action = dist.sample()
    assert isinstance(frozen, SquashedNormal)
    assert not frozen.log_prob(action).requires_grad
    expected = frozen.log_prob(action).clone()
    with torch.no_grad():
        mean += 1.0
    assert torch.equal(frozen.log_prob(action), expected), "a frozen one is data"
    part = select(frozen, torch.tensor([4, 1]))
    assert isinstance(part, SquashedNormal)
    assert part.batch_shape == (2,)
    assert torch.equal(part.entropy(), frozen.entropy()[[4, 1]])
    assert torch.equal(part.log_prob(action[[4, 1]]), expected[[4, 1]])
    whole = concatenate([select(frozen, slice(0, 2)), select(frozen, slice(2, 6))])
    assert isinstance(whole, SquashedNormal)
    assert torch.equal(whole.log_prob(action), expected)
    assert torch.equal(kl(whole, frozen), torch.zeros(6))


def test_the_head_scales_to_the_bounds_and_cuts_widths_off() -> None:
    head = SquashedHead(spaces.Box(np.float32([-2.0, 0.0]), np.float32([6.0, 1.0])))
    assert head.size == 4
    dist = head(torch.tensor([[0.5, -0.5, 50.0, -50.0]]))
    assert isinstance(dist, SquashedNormal)
    assert dist.loc.tolist() == [[0.5, -0.5]]
    assert dist.log_std.tolist() == [[2.0, -20.0]]
    assert head.to_env(np.float32([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])).tolist() == [[-2, 0], [2, 0.5], [6, 1]]
    for bound in (np.inf, 3.4e38):
        with pytest.raises(UsageError, match=r"infinite bounds.*TransformAction"):
            SquashedHead(spaces.Box(np.float32(-bound), np.float32(bound), (2,)))


def test_correlated_noise_leaves_each_action_as_it_was() -> None:
    noise = CorrelatedNoise(np.random.default_rng(0), 0.9)
    x = np.stack([noise.standard_normal((50, 2)) for _ in range(4000)])
    assert x.dtype == np.float32
    assert x.mean() == pytest.approx(0, abs=0.02)
    assert x.std() == pytest.approx(1, abs=0.02)
    for lag in (1, 5):
        assert (x[lag:] * x[:-lag]).mean() == pytest.approx(0.9**lag, abs=0.02)
    assert (x[..., 0] * x[..., 1]).mean() == pytest.approx(0, abs=0.02)
    assert noise.standard_normal((3, 2)).shape == (3, 2), "another number of environments begins anew"
    uniform = np.stack([noise.uniform((3, 2)) for _ in range(20_000)])
    assert np.histogram(uniform, 10, (-1, 1))[0] / uniform.size == pytest.approx(0.1, abs=0.01)
    white, plain = CorrelatedNoise(np.random.default_rng(3), 0.0), np.random.default_rng(3)
    for _ in range(2):
        assert np.array_equal(white.standard_normal((4, 1)), plain.standard_normal((4, 1), dtype=np.float32))


def test_correlated_noise_goes_on_from_its_state() -> None:
    noise = CorrelatedNoise(np.random.default_rng(0), 0.9)
    noise.standard_normal((4, 2))
    rng, state = copy.deepcopy(noise.rng), noise.state_dict()
    expected: Any = [noise.standard_normal((4, 2)) for _ in range(3)]
    other = CorrelatedNoise(rng, 0.9)
    other.load_state_dict(state)
    assert np.array_equal([other.standard_normal((4, 2)) for _ in range(3)], expected)
    assert isinstance(state["last"], Tensor)
