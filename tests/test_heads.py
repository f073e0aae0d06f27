"""Heads by name: the Beta of bounded actions, and a normal whose standard deviation depends on the state."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import train
from torch import Tensor
from torch import distributions as td

import klrl
from klrl.agents.fused import suits
from klrl.agents.ppo import PPOConfig
from klrl.agents.trpo import TRPOConfig
from klrl.errors import UsageError
from klrl.kl import fisher_vector_product, geometric_mean, kl, measure
from klrl.kl.parameters import parameters_of
from klrl.policies.beta import BetaHead, JointBeta
from klrl.policies.distributions import DiagonalNormal, uniform_like
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.heads import NormalHead, StateDependentNormalHead, make_head
from klrl.policies.networks import Network
from klrl.policies.policy import Policy

BOX = spaces.Box(-2.0, 6.0, (2,))


def beta(a: Any, b: Any) -> JointBeta:
    return JointBeta(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))


def quadrature(function: Any, a: float, b: float) -> float:
    """E[function(u)] of a Beta with whole concentrations over u = log(x / (1 - x)), by the trapezoidal rule."""
    u = np.linspace(-60, 60, 12_001)
    slope = np.exp(-np.logaddexp(0, -u) - np.logaddexp(0, u))  # dx / du = x (1 - x)
    return float(np.sum(np.exp(log_density(u, a, b)) * slope * function(u))) * float(u[1] - u[0])


def log_density(u: Any, a: float, b: float) -> Any:
    constant = math.log(math.factorial(a + b - 1) // math.factorial(a - 1) // math.factorial(b - 1))  # type: ignore[arg-type]
    return -(a - 1) * np.logaddexp(0, -u) - (b - 1) * np.logaddexp(0, u) + constant


def test_a_betas_figures_are_those_by_hand() -> None:
    """Beta(2, 3) has the density 12 x (1 - x)^2, the mean 2/5 and the variance 1/25."""
    one = beta([2.0, 2.0], [3.0, 3.0])
    x = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    assert one.log_prob(x).item() == pytest.approx(math.log(12 * 0.25 * 0.75**2) + math.log(12 * 0.5**3), rel=1e-12)
    assert one.mean.tolist() == [[pytest.approx(0.4)] * 2]
    assert one.stddev.tolist() == [[pytest.approx(0.2)] * 2]
    # psi(2) - psi(5) = -(1/2 + 1/3 + 1/4), psi(3) - psi(5) = -(1/3 + 1/4)
    by_hand = -math.log(12) + (1 / 2 + 1 / 3 + 1 / 4) + 2 * (1 / 3 + 1 / 4)
    assert one.entropy().item() == pytest.approx(2 * by_hand, rel=1e-12)
    assert beta([1.0], [1.0]).entropy().item() == pytest.approx(0.0, abs=1e-15)
    for outside in (0.0, 1.0, -0.5, 1.5):
        assert one.log_prob(torch.tensor([[0.5, outside]])).item() == -math.inf
    # KL(Beta(2, 3) || Beta(3, 2)) = E[log((1 - x) / x)] = psi(3) - psi(2) = 1/2
    assert kl(beta([2.0], [3.0]), beta([3.0], [2.0])).item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("old", [(2, 3), (1, 1), (9, 4), (30, 60)])
@pytest.mark.parametrize("new", [(2, 3), (5, 2), (40, 61)])
def test_a_betas_kl_and_entropy_are_their_integrals(old: Any, new: Any) -> None:
    p, q = (beta([float(a)], [float(b)]) for a, b in (old, new))
    found = kl(p, q).item()
    expected = quadrature(lambda u: log_density(u, *old) - log_density(u, *new), *old)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert (found == 0) is (old == new)
    entropy = quadrature(lambda u: -log_density(u, *old), *old)
    assert p.entropy().item() == pytest.approx(entropy, rel=1e-9, abs=1e-9)


def test_a_sharp_betas_numbers_hold_in_float32() -> None:
    torch.manual_seed(0)
    a, b = (1 + torch.rand(200, 2) * 10.0 ** torch.randint(0, 6, (200, 1)) for _ in range(2))
    policy, wide = JointBeta(a, b), JointBeta(a.double(), b.double())
    action = policy.sample()
    assert torch.allclose(policy.log_prob(action).double(), wide.log_prob(action.double()), rtol=1e-6, atol=1e-6)
    assert torch.allclose(policy.entropy().double(), wide.entropy(), rtol=1e-6, atol=1e-6)
    moved = JointBeta(a * (1 + 1e-4), b)
    divergence = kl(policy, moved)
    assert bool((divergence >= 0).all())
    assert bool((kl(policy, policy) == 0).all())
    exact = kl(JointBeta(a.double(), b.double()), JointBeta((a * (1 + 1e-4)).double(), b.double()))
    assert torch.allclose(divergence.double(), exact, rtol=1e-5)


def test_a_betas_derivatives_are_finite_differences() -> None:
    point = torch.tensor([[2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[3.0, 1.5]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: JointBeta(a, b).log_prob(x), (point, other))
    assert torch.autograd.gradcheck(lambda a, b: JointBeta(a, b).entropy(), (point, other))
    still = beta([2.5, 4.0], [2.0, 2.0])
    assert torch.autograd.gradcheck(lambda a, b: kl(still, JointBeta(a, b)), (point, other))
    assert torch.autograd.gradcheck(lambda a, b: kl(JointBeta(a, b), still), (point, other))


def test_a_betas_fisher_information_is_the_hessian_of_its_kl() -> None:
    a, b = torch.tensor([[2.0, 40.0]], dtype=torch.float64), torch.tensor([[3.0, 1.2]], dtype=torch.float64)
    old = JointBeta(a, b)

    def divergence(flat: Tensor) -> Tensor:
        return kl(old, JointBeta(flat[:2].view(1, 2), flat[2:].view(1, 2))).sum()

    hessian: Any = torch.autograd.functional.hessian(divergence, torch.cat([a, b], 1).flatten())
    vector = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.cat(fisher_vector_product(old, vector[None, :2], vector[None, 2:]), 1).flatten()
    assert torch.allclose(found, hessian @ vector, rtol=1e-6)


def test_the_geometric_mean_of_betas_is_a_beta_between() -> None:
    old, new, x = beta([2.0], [6.0]), beta([5.0], [3.0]), torch.tensor([[0.2]], dtype=torch.float64)
    mean = geometric_mean(old, new, torch.tensor([0.25], dtype=torch.float64))
    other = torch.tensor([[0.7]], dtype=torch.float64)
    mine = mean.log_prob(x) - mean.log_prob(other)
    theirs = 0.75 * (old.log_prob(x) - old.log_prob(other)) + 0.25 * (new.log_prob(x) - new.log_prob(other))
    assert torch.allclose(mine, theirs)


def test_a_beta_may_be_held_to_the_uniform_policy_and_a_normal_may_not() -> None:
    policy = beta([2.0, 3.0], [3.0, 1.5])
    assert torch.allclose(kl(policy, uniform_like(policy)), -policy.entropy())
    with pytest.raises(UsageError, match="a normal's KL to that is infinite"):
        uniform_like(DiagonalNormal(torch.zeros(1, 2), torch.zeros(1, 2)))


@pytest.mark.parametrize("kind", [BetaHead, StateDependentNormalHead])
def test_acting_in_numpy_samples_the_policy_that_is_learned(kind: Any) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), torch.device("cpu"), normalize=False)
    head = kind(BOX, -0.7)
    policy = Policy(encoder, Network(encoder, (8,), head.size, "tanh", 1.0, torch.Generator().manual_seed(0)), head)
    obs = np.repeat(np.array([[0.5, -0.2, 0.1]], np.float32), 40_000, axis=0)
    with torch.no_grad():
        dist: Any = policy(encoder(obs[:1]))
    sample = torch.from_numpy(policy.act(obs, np.random.default_rng(0)))
    assert sample.dtype == torch.float32
    std = dist.stddev if kind is BetaHead else dist.log_std.exp()
    assert torch.allclose(sample.mean(0), dist.mean[0], atol=0.05)
    assert torch.allclose(sample.std(0), std[0], rtol=0.02)
    assert torch.allclose(torch.from_numpy(policy.act(obs[:1], None)), dist.mode, atol=1e-5)
    taken = policy.head.to_env(policy.act(obs, np.random.default_rng(0)))
    assert all(BOX.contains(action) for action in taken[:100])
    assert bool(torch.isfinite(policy(encoder(obs)).log_prob(sample)).all())
    # Another state has another spread.
    there: Any = policy(encoder(-3 * obs[:1]))
    assert not torch.allclose(there.stddev if kind is BetaHead else there.log_std.exp(), std, rtol=1e-3)


@pytest.mark.parametrize(("log_std_init", "std"), [(-1.5, math.exp(-1.5)), (-0.9, math.exp(-0.9)), (0.0, 0.47747)])
def test_a_beta_begins_with_the_standard_deviation_that_is_asked_for(log_std_init: float, std: float) -> None:
    policy = BetaHead(BOX, log_std_init)(torch.zeros(1, 4))
    assert (2 * policy.stddev[0]).tolist() == [pytest.approx(std, rel=1e-4)] * 2
    assert policy.mode[0].tolist() == [0.5, 0.5]
    assert math.isfinite(BetaHead(BOX, -80)(torch.zeros(1, 4)).entropy().item())


def test_actions_at_the_very_edge_have_a_density() -> None:
    head = BetaHead(spaces.Box(-1, 1, (1,)))
    for output in ([[200.0, -200.0]], [[-200.0, 200.0]], [[-200.0, -200.0]]):
        action = head.sample(np.array(output * 500, np.float32), np.random.default_rng(0))
        assert 0 < action.min() <= action.max() < 1
        assert bool(torch.isfinite(head(torch.tensor(output)).log_prob(torch.from_numpy(action))).all())
        assert bool(torch.isfinite(head(torch.tensor(output)).mode).all())


def test_a_plain_normal_is_a_state_dependent_one_whose_outputs_are_zero() -> None:
    plain, other = NormalHead(BOX, -0.3), StateDependentNormalHead(BOX, -0.3)
    mean = torch.randn(5, 2)
    one, two = plain(mean), other(torch.cat([mean, torch.zeros(5, 2)], 1))
    assert torch.equal(one.loc, two.loc)
    assert torch.equal(one.log_std, two.log_std)
    wider = other(torch.cat([mean, torch.full((5, 2), 0.5)], 1))
    assert torch.allclose(wider.log_std, one.log_std + 0.5)


CONFIGS: list[Any] = [
    PPOConfig(n_steps=32, learning_rate=5e-3, n_epochs=6),
    PPOConfig(n_steps=32, learning_rate=3e-3, n_epochs=3, kl={"penalty": "adaptive", "per_state": "project"}),  # type: ignore[arg-type]
    TRPOConfig(n_steps=32, n_critic_updates=3),
]


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (CONFIGS[0], "state-dependent-std"),
        (CONFIGS[2], "beta"),
        *(pytest.param(CONFIGS[i], "beta", marks=pytest.mark.slow) for i in (0, 1)),
        pytest.param(CONFIGS[2], "state-dependent-std", marks=pytest.mark.slow),
    ],
    ids=["ppo-state", "trpo-beta", "ppo-beta", "ppo-project-beta", "trpo-state"],
)
def test_the_heads_learn_within_their_kl(head: str, config: Any) -> None:
    config = replace(config, head=head)
    agent, reports = train(config, "klrl/RewardByBoth-v0", 20, action="box")
    assert not suits(agent.policy, agent.policy_params)
    taken = agent.predict(np.array([[-1.0], [1.0]], np.float32), deterministic=True)[0]
    assert np.allclose(taken, [[0.0, 2.0], [2.0, 0.0]], atol=0.6)
    assert all(report.kl.mean <= config.kl.target * 1.0001 for report in reports)
    assert reports[-1].kl.entropy < reports[0].kl.entropy


@pytest.mark.parametrize("head", ["beta", "state-dependent-std"])
def test_trpos_quadratic_model_is_of_these_policies_too(head: str) -> None:
    _, reports = train(TRPOConfig(n_steps=64, head=head, cg_damping=1e-3), "klrl/RewardByBoth-v0", 3, action="box")
    for report in reports:
        assert report.metrics["train/accepted"] == 1
        assert report.kl.mean == pytest.approx(report.metrics["kl/predicted"], rel=0.25)


def test_a_head_that_does_not_suit_is_refused_in_a_line() -> None:
    for head in ("beta", "state-dependent-std"):
        with pytest.raises(UsageError, match=f"--head {head} makes no policy over the actions"):
            klrl.train("ppo", "CartPole-v1", head=head)
    with pytest.raises(UsageError, match="infinite bounds, and a Beta policy's are finite"):
        make_head(spaces.Box(-np.inf, np.inf, (1,)), name="beta")
    with pytest.raises(UsageError, match=r"--head must be .* or module:Class \(did you mean 'beta'\?\), got bta"):
        klrl.train("ppo", "Pendulum-v1", head="bta")
    with pytest.raises(UsageError, match="unknown option 'head'"):
        klrl.train("sac", "Pendulum-v1", head="beta")


def test_measures_and_torch_agree_on_betas() -> None:
    torch.manual_seed(0)
    a, b, c, d = (1 + 5 * torch.rand(50, 2) for _ in range(4))
    old, new = JointBeta(a, b), JointBeta(c, d)
    theirs = [td.Independent(td.Beta(x, y), 1) for x, y in ((a, b), (c, d))]
    x = theirs[0].sample()
    assert torch.allclose(old.log_prob(x), theirs[0].log_prob(x), atol=1e-4)
    assert torch.allclose(old.entropy(), theirs[0].entropy(), atol=1e-5)
    assert torch.allclose(kl(old, new), kl(*theirs), atol=1e-6)
    report = measure(old, new)
    assert report.mean == pytest.approx(float(kl(old, new).mean()), rel=1e-5)
    assert [p.shape for p in parameters_of(old)] == [(50, 2), (50, 2)]
