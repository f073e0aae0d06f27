"""The bottleneck's rate and information, and the critic that says how sure it is: against known answers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect, make
from torch import Tensor
from torch import distributions as td

import klrl
from klrl.agents.bottleneck import BottleneckConfig
from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.trpo import TRPO
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import UsageError
from klrl.kl import entropy, mutual_information
from klrl.policies.bayesian import BayesianCritic
from klrl.policies.bottleneck import BottleneckNetwork, rate
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.parameters import gradients

SEEN = spaces.Box(-1.0, 1.0, (3,))
SMALL = {"n_steps": 32, "hidden_sizes": (8,)}


def test_the_rate_of_a_hand_computed_code() -> None:
    mean, log_std = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(2.0)]])
    # KL(N(1, 1) || N(0, 1)) = 1/2, and KL(N(0, 4) || N(0, 1)) = (4 - 1)/2 - log 2
    assert torch.allclose(rate(mean, log_std), torch.tensor([0.0, 0.5 + 1.5 - math.log(2.0)]))


def test_mutual_information_is_what_actions_tell_of_states() -> None:
    sure = MultiCategorical(torch.tensor([[[0.0, -math.inf]], [[-math.inf, 0.0]]]))
    assert float(mutual_information(sure)) == pytest.approx(math.log(2))
    assert float(mutual_information(sure, "bits")) == pytest.approx(1.0)
    same = td.Categorical(logits=torch.tensor([[0.3, 1.0, -2.0]]).expand(5, 3))
    assert float(mutual_information(same)) == pytest.approx(0.0, abs=1e-12)
    policy = td.Categorical(logits=torch.randn(50, 4, generator=torch.manual_seed(0)))
    marginal = td.Categorical(probs=policy.probs.double().mean(0))
    expected = entropy(marginal) - entropy(policy).mean()
    assert float(mutual_information(policy)) == pytest.approx(float(expected), abs=1e-6)
    # Two choices that always agree: the joint knows as much as one of them, their sum twice that.
    both = MultiCategorical(torch.tensor([[[0.0, -math.inf]] * 2, [[-math.inf, 0.0]] * 2]))
    assert float(mutual_information(both)) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="discrete"):
        mutual_information(DiagonalNormal(torch.zeros(2, 1), torch.zeros(2, 1)))


def test_mutual_information_has_the_gradient_of_the_entropies() -> None:
    logits = torch.randn(50, 4, generator=torch.manual_seed(0), dtype=torch.float64).requires_grad_()
    p = logits[:, :3].softmax(-1)
    (expected,) = torch.autograd.grad((p * p.log()).sum(-1).mean() - (p.mean(0) * p.mean(0).log()).sum(), logits)
    policy = td.Categorical(logits=logits.masked_fill(torch.arange(4) == 3, -math.inf), validate_args=False)
    (found,) = torch.autograd.grad(mutual_information(policy), logits)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-1.0, 1.0, (2,))], ids=str
)
def test_a_policy_through_a_bottleneck_acts_by_the_code_s_mean_and_learns_with_its_noise(space: Any) -> None:
    agent = PPO(SEEN, space, {**SMALL, "bottleneck": {"size": 4}})
    network: Any = agent.policy.network
    assert isinstance(network, BottleneckNetwork)
    inputs = {"vector": torch.randn(6, 3, generator=torch.manual_seed(0))}
    mean, log_std = network.code(inputs)
    assert mean.shape == log_std.shape == (6, 4)
    policy, by_mean = agent.policy(inputs), agent.policy.head(network.output(mean))
    assert torch.equal(policy.mode, by_mean.mode)
    noisy, rates = agent.bottleneck.noisy(inputs)
    assert torch.allclose(rates, agent.bottleneck.limit.beta * rate(mean, log_std))
    again, _ = agent.bottleneck.noisy(inputs)
    assert not torch.equal(noisy.map_parameters(lambda p: p).log_prob(by_mean.mode), again.log_prob(by_mean.mode))
    assert gradients(rates.sum(), agent.policy_params).any()


def test_the_rate_is_held_at_its_target_and_a_run_resumes_bit_for_bit(tmp_path: Any) -> None:
    options: dict[str, Any] = {**QUICK, "bottleneck": {"size": 4, "target": 0.3, "coef": 0.1}, "learning_rate": 3e-3}
    whole = klrl.train("ppo", "CartPole-v1", **{**options, "total_timesteps": 4000}, run_dir=str(tmp_path / "a"))
    part = klrl.train("ppo", "CartPole-v1", **{**options, "total_timesteps": 2000}, run_dir=str(tmp_path / "b"))
    again = klrl.resume(part.folder, total_timesteps=4000)
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)
    assert whole.agent.bottleneck.state_dict() == again.agent.bottleneck.state_dict()
    more = klrl.train("ppo", "CartPole-v1", **QUICK, init_from=str(whole.folder), run_dir=str(tmp_path / "c"))
    assert isinstance(more.agent.policy.network, BottleneckNetwork)


def test_the_rate_answers_its_coefficient() -> None:
    env = make_vector("klrl/RewardByBoth-v0", 8, EnvConfig())
    reached = {}
    for target in (0.1, 5.0):
        bottleneck = BottleneckConfig(size=4, target=target, coef=1e-3)
        agent = make(PPOConfig(n_steps=32, hidden_sizes=(16,), learning_rate=1e-2, bottleneck=bottleneck), env)
        buffer, obs = agent.new_buffer(8), env.reset(seed=0)[0]
        for _ in range(40):
            obs = collect(agent, env, buffer, obs)
            metrics = agent.update(buffer).metrics
        reached[target] = metrics
    assert reached[0.1]["bottleneck/rate"] == pytest.approx(0.1, abs=0.1)
    assert reached[5.0]["bottleneck/rate"] > 2 * reached[0.1]["bottleneck/rate"]
    assert reached[5.0]["bottleneck/information"] > reached[0.1]["bottleneck/information"] > 0


def test_a_bottleneck_without_a_target_needs_a_schedule() -> None:
    with pytest.raises(UsageError, match=r"bottleneck\.target above 0"):
        PPO(SEEN, spaces.Discrete(2), {"bottleneck": {"size": 4, "target": 0.0}})
    PPO(SEEN, spaces.Discrete(2), {"bottleneck": {"size": 4, "target": 0.0, "rule": "cyclical"}})


def critic_of(agent: Any) -> BayesianCritic:
    assert isinstance(agent.critic, BayesianCritic)
    return agent.critic


@torch.no_grad()
def test_a_bayesian_critic_s_loss_is_the_expectation_that_quadrature_finds() -> None:
    agent = PPO(SEEN, spaces.Discrete(2), {**SMALL, "critic": "bayesian"})
    critic = critic_of(agent)
    critic.log_std.data.uniform_(-2.0, -0.5, generator=torch.manual_seed(0))
    inputs = {"vector": torch.randn(5, 3, generator=torch.manual_seed(1))}
    returns = torch.randn(5, generator=torch.manual_seed(2))
    mean, variance = critic(inputs), critic.variance(inputs)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    for i in range(5):
        values = float(mean[i]) + math.sqrt(float(variance[i])) * nodes
        expected = float((weights * (values - float(returns[i])) ** 2).sum() / weights.sum())
        assert float((mean[i] - returns[i]) ** 2 + variance[i]) == pytest.approx(expected, rel=1e-5)
    # V is normal with that mean and variance, as the weights are: by samples of the weights themselves.
    features = torch.tanh(critic.network(inputs))
    draws = critic.output.weight[0] + critic.log_std.exp() * torch.randn(40_000, 8, generator=torch.manual_seed(3))
    sampled = (draws @ features.T + critic.output.bias).detach()
    assert torch.allclose(sampled.mean(0), mean, atol=0.02)
    assert torch.allclose(sampled.var(0), variance, rtol=0.05)


@torch.no_grad()
def test_the_kl_of_a_bayesian_critic_to_its_prior_is_that_of_quadrature() -> None:
    critic = critic_of(PPO(SEEN, spaces.Discrete(2), {**SMALL, "critic": "bayesian"}))
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    total = 0.0
    for mean, log_std in zip(critic.output.weight[0].double(), critic.log_std.double(), strict=True):
        q, p = td.Normal(mean, log_std.exp()), td.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        density = q.log_prob(grid).exp()
        total += float((density * (q.log_prob(grid) - p.log_prob(grid))).sum() * (grid[1] - grid[0]))
    assert float(critic.kl()) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("kind", [PPO, TRPO])
def test_a_bayesian_critic_learns_and_grows_sure_with_data(kind: Any) -> None:
    env = make_vector("klrl/RewardByObservation-v0", 8, EnvConfig())
    config = {"n_steps": 64, "hidden_sizes": (16,), "learning_rate": 1e-2, "critic": "bayesian", "gamma": 0.9}
    agent = kind(env.single_observation_space, env.single_action_space, config)
    critic_of(agent).log_std.data.fill_(0.0)
    buffer, obs = agent.new_buffer(8), env.reset(seed=0)[0]
    before: float | None = None
    metrics: dict[str, float] = {}
    for _ in range(15):
        obs = collect(agent, env, buffer, obs)
        metrics = agent.update(buffer).metrics
        before = before or metrics["health/value_std"]
    assert metrics["train/explained_variance"] > 0.9
    assert before is not None
    assert metrics["health/value_std"] < 0.5 * before
    value: Tensor = agent.value(obs)
    assert value.shape == (8,)


def test_the_kl_to_the_prior_is_part_of_the_loss_by_its_weight_and_draws_the_weights_to_it() -> None:
    env = make_vector("klrl/RewardByObservation-v0", 8, EnvConfig())
    reached = []
    for weight in (0.0, 1.0):
        config = PPOConfig(n_steps=32, hidden_sizes=(8,), learning_rate=1e-2, critic="bayesian", critic_kl=weight)
        agent = make(config, env)
        buffer, obs = agent.new_buffer(8), env.reset(seed=0)[0]
        for _ in range(15):
            obs = collect(agent, env, buffer, obs)
            metrics = agent.update(buffer).metrics
        batch = agent.make_batch(buffer)
        expected = batch.weight @ agent.critic.variance(batch.inputs) + weight * batch.weight.sum() * agent.critic.kl()
        assert torch.allclose(agent.critic.cost(batch), expected)
        reached.append(metrics["health/critic_kl"])
    assert reached[1] < 0.5 * reached[0]
