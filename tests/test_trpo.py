"""TRPO: its Fisher matrix against the Hessian of KL, its limit, and what may go wrong."""

import math
from dataclasses import fields, replace
from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import collect, make, train
from torch import Tensor
from torch.func import functional_call

from klrl.agents import trpo
from klrl.agents.limits import KLTarget
from klrl.agents.on_policy import Batch
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.config import build
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import NonFiniteError, SkippedUpdateError, UsageError
from klrl.kl import kl

SMALL = TRPOConfig(n_steps=32, batch_size=64, hidden_sizes=(8,))


ACTION_SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(3),
    spaces.MultiDiscrete([2, 4, 3]),
    spaces.MultiBinary(3),
    spaces.Box(-2.0, 6.0, (2,)),
]
SEEN = spaces.Dict({"number": spaces.Box(-1.0, 1.0, (2,)), "which": spaces.Discrete(2)})


def in_double(agent: TRPO) -> None:
    """The agent's networks in float64."""
    from klrl.policies.parameters import FlatParameters

    agent.policy_params = FlatParameters(agent.policy.double(), "policy")
    agent.critic_params = FlatParameters(agent.critic.double(), "critic")


def weights_are_finite(agent: TRPO) -> bool:
    return all(bool(params.flat.isfinite().all()) for params in (agent.policy_params, agent.critic_params))


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_fisher_product_is_that_of_the_explicit_hessian_of_kl(space: spaces.Space[Any], direction: str) -> None:
    agent = TRPO(SEEN, space, replace(SMALL, hidden_sizes=(4,), normalize_observation=False))
    in_double(agent)
    torch.manual_seed(0)
    agent.policy_params.flat.copy_(0.5 * torch.randn_like(agent.policy_params.flat))
    rows = [SEEN.sample() for _ in range(7)]
    obs = {key: np.stack([row[key] for row in rows]) for key in SEEN}
    inputs = {key: part.double() for key, part in agent.encoder(obs).items()}
    weight = torch.rand(7, dtype=torch.float64)
    old = agent.policy_at(inputs)
    action = old.sample()
    batch = Batch(inputs, old, action, weight, weight, weight, weight, weight)
    with torch.no_grad():
        product = agent.fisher(agent._linearize(batch))
        columns = torch.eye(len(agent.policy_params.flat), dtype=torch.float64)
        fisher = torch.stack([product(column) for column in columns])
    names, weights = zip(*agent.policy.named_parameters(), strict=True)
    flat = agent.policy_params.flat.clone()

    def mean_kl(vector: Tensor) -> Tensor:
        pieces = vector.split([w.numel() for w in weights])
        values = {n: p.view(w.shape) for n, p, w in zip(names, pieces, weights, strict=True)}
        new: Any = functional_call(agent.policy, values, (inputs,))
        return weight @ (kl(old, new) if direction == "forward" else kl(new, old))

    hessian = torch.autograd.functional.hessian(mean_kl, flat)
    assert float(hessian.abs().max()) > 0.01
    assert torch.allclose(fisher, hessian, rtol=1e-6, atol=1e-9)


def test_the_fisher_product_of_an_image_network_is_that_of_the_hessian() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 1), np.uint8), "speed": spaces.Box(-1, 1, (2,))})
    agent = TRPO(space, spaces.Discrete(3), replace(SMALL, hidden_sizes=(4,), normalize_observation=False))
    inputs = agent.encoder({key: np.stack([part.sample() for _ in range(3)]) for key, part in space.spaces.items()})
    old, weight = agent.policy_at(inputs), torch.ones(3)
    batch = Batch(inputs, old, old.sample(), weight, weight, weight, weight, weight)
    torch.manual_seed(0)
    parameters = list(agent.policy.parameters())
    v = torch.randn(len(agent.policy_params.flat))
    mean_kl = kl(old, agent.policy(inputs)).sum()
    gradient = torch.autograd.grad(mean_kl, parameters, create_graph=True)
    along = sum(
        (g.flatten() @ part) for g, part in zip(gradient, v.split([p.numel() for p in parameters]), strict=True)
    )
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(along, parameters)])
    with torch.no_grad():
        product = agent.fisher(agent._linearize(batch))
        for _ in range(2):  # it can be asked again
            assert torch.allclose(
                product(v.double()).float(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_within_the_limit_after_every_update_and_as_predicted(env_id: str, direction: Any) -> None:
    config = replace(SMALL, kl=replace(SMALL.kl, target=0.004, direction=direction))
    _, reports = train(config, env_id, 20)
    assert all(report.kl.limited <= 0.004 for report in reports)
    taken = [report for report in reports if report.metrics["train/accepted"]]
    assert len(taken) >= 18
    assert fmean(report.kl.of_limit for report in taken) > 0.8, "and no further inside than needed"
    for report in taken:
        assert report.metrics["train/improvement"] > 0.0
        assert report.kl.limited == pytest.approx(report.metrics["kl/predicted"], rel=0.3)
        assert report.metrics["train/improvement"] == pytest.approx(
            report.metrics["train/predicted_improvement"], rel=0.5
        )
        assert 0 < report.metrics["train/cg_iterations"] <= 10
        assert 0.0 <= report.metrics["train/cg_residual"] < 1.0


LIMITS: list[dict[str, Any]] = [
    {"max_target": 0.05},
    {"max_target": 0.02, "direction": "reverse"},
    {"of": "p95"},
    {"of": "max"},
    {"of": "p95", "max_target": 0.012},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_a_quantile_and_the_largest_kl_of_a_state_are_within_their_limits_after_every_update(
    env_id: str, limits: dict[str, Any]
) -> None:
    wide = replace(SMALL, hidden_sizes=(32, 32), log_std_init=-1.0)
    config = KLTarget(target=0.01, **limits)
    free, held = (train(replace(wide, kl=kl), env_id, 12)[1] for kl in (KLTarget(target=0.01), config))
    assert max(result.kl.max for result in free) > 0.1, "by the mean alone, some states go far"
    for report in (result.kl for result in held):
        assert report.per_state is not None
        moved = report.per_state.double()
        figures = {"mean": moved.mean(), "p95": moved.quantile(0.95, interpolation="nearest"), "max": moved.max()}
        if config.direction == "forward":
            assert report.limited == pytest.approx(float(figures[config.of]), rel=1e-6)
            assert report.furthest == pytest.approx(float(figures["max"]), rel=1e-6)
        assert report.limited <= 0.01
        assert report.furthest <= (config.max_target or math.inf)
        assert report.excess > 0.8, "and no further inside than needed"
    assert all(result.metrics["train/accepted"] for result in held)


def test_the_reported_kl_is_that_of_the_policy_afterwards() -> None:
    env = make_vector("CartPole-v1", 8, EnvConfig())
    agent = make(SMALL, env)
    buffer = agent.new_buffer(8)
    collect(agent, env, buffer, env.reset(seed=3)[0])
    inputs = agent.encoder(buffer.obs_before_steps())
    before = agent.policy_at(inputs)
    report = agent.update(buffer)
    after = kl(before, agent.policy_at(inputs))[torch.from_numpy(buffer.valid).flatten()]
    assert float(after.double().mean()) == pytest.approx(report.kl.mean, rel=1e-6)
    assert report.kl.mean > 0.0


class Dimensions(gym.Env[Any, Any]):
    """One step; ``n`` action dimensions that are rewarded alike and independently."""

    def __init__(self, n: int) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,))
        self.action_space = spaces.Box(-1.0, 1.0, (n,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), -float(np.square(action - 0.5).sum()), True, False, {}


def test_the_limit_is_on_the_joint_kl_whatever_the_number_of_action_dimensions() -> None:
    realised = {}
    for n in (1, 6):
        _, reports = train(SMALL, lambda n=n: Dimensions(n), 10)
        assert all(report.kl.mean <= 0.01 for report in reports)
        realised[n] = fmean(report.kl.mean for report in reports)
    assert realised[6] == pytest.approx(realised[1], rel=0.15)


def test_a_share_of_the_states_gives_about_the_same_step() -> None:
    _, whole = train(SMALL, "CartPole-v1", 5)
    _, some = train(replace(SMALL, fisher_fraction=0.25), "CartPole-v1", 5)
    assert all(report.metrics["train/accepted"] for report in some)
    assert fmean(r.kl.attempted for r in some) == pytest.approx(fmean(r.kl.attempted for r in whole), rel=0.5)
    assert some[0].kl.mean != whole[0].kl.mean


def broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault into one update."""
    real = trpo.natural_step

    def altered(factor: float) -> Any:
        def step(*arguments: Any) -> Any:
            found = real(*arguments)
            return None if found is None or factor == 0.0 else found._replace(step=factor * found.step)

        return step

    factors = {"kl": 1e4, "no_improvement": -1.0, "curvature": 0.0, "nonfinite": math.inf}
    monkeypatch.setattr(trpo, "natural_step", altered(factors[name]))


@pytest.mark.parametrize("name", ["kl", "no_improvement", "curvature", "nonfinite"])
def test_a_refused_update_leaves_the_policy_says_why_and_training_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_vector("CartPole-v1", 8, EnvConfig())
    agent = make(replace(SMALL, line_search_max_iter=3), env)
    buffer = agent.new_buffer(8)
    obs = collect(agent, env, buffer, env.reset(seed=0)[0])
    policy, critic = agent.policy_params.flat.clone(), agent.critic_params.flat.clone()
    with monkeypatch.context() as patch:
        broken(name, patch)
        report = agent.update(buffer)
    assert torch.equal(agent.policy_params.flat, policy)
    assert not torch.equal(agent.critic_params.flat, critic), "the critic is fitted all the same"
    assert report.kl.mean == report.kl.max == report.kl.reverse == 0.0
    assert report.kl.rolled_back == 1.0
    assert report.metrics["train/accepted"] == 0.0
    rejected = {key for key, value in report.metrics.items() if key.startswith("health/rejected_") and value}
    assert rejected == {f"health/rejected_{name}"}
    collect(agent, env, buffer, obs)
    assert agent.update(buffer).metrics["train/accepted"] == 1.0


def test_constant_rewards_and_advantages_of_zero_move_nothing() -> None:
    agent, reports = train(replace(SMALL, gae_lambda=0.0, gamma=0.0), "klrl/OneStep-v0", 40)
    assert all(report.kl.mean <= 0.01 for report in reports)
    assert weights_are_finite(agent)


def test_a_policy_too_narrow_for_float32_is_named() -> None:
    env = make_vector("Pendulum-v1", 8, EnvConfig())
    agent = make(replace(SMALL, log_std_init=-80.0), env)
    collect(agent, env, buffer := agent.new_buffer(8), env.reset(seed=0)[0])
    buffer.action += 1e-6  # as where acting rounds otherwise than learning, which not every processor's does
    with pytest.raises(SkippedUpdateError, match="the policy's gradient is not finite in update 1"):
        agent.update(buffer)


@pytest.mark.parametrize("log_std", [-30.0, 40.0])
def test_a_deterministic_or_flat_policy_never_gives_weights_that_are_not_finite(log_std: float) -> None:
    agent, reports = train(replace(SMALL, log_std_init=log_std), "Pendulum-v1", 3)
    assert weights_are_finite(agent)
    assert all(report.kl.limited <= 0.01 for report in reports)


def test_saturated_categoricals_and_one_state_batches_never_crash() -> None:
    env = make_vector("klrl/RewardByBoth-v0", 1, EnvConfig())
    agent = make(replace(SMALL, n_steps=2, batch_size=1), env)
    agent.policy.network.mlp.layers[-1].bias.data[0] = 300.0
    buffer = agent.new_buffer(1)
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        obs = collect(agent, env, buffer, obs)
        report = agent.update(buffer)
        assert report.kl.mean == 0.0
        assert report.metrics["health/rejected_no_improvement"] == 1.0
    assert weights_are_finite(agent)


@pytest.mark.parametrize(
    ("spoiled", "said"), [("advantage", "the policy's gradient is not finite in"), ("reward", "value_loss is")]
)
def test_an_update_that_is_not_finite_is_undone_and_a_nan_reward_is_named(
    spoiled: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_vector("CartPole-v1", 8, EnvConfig())
    agent = make(replace(SMALL, normalize_reward=spoiled == "advantage"), env)
    buffer = agent.new_buffer(8)
    obs = collect(agent, env, buffer, env.reset(seed=0)[0])
    before = agent.snapshot()
    with monkeypatch.context() as patch:
        if spoiled == "reward":
            buffer.reward[3, 2] = 1e30
        else:
            patch.setattr("klrl.agents.on_policy.gae", lambda reward, *rest: (np.full_like(reward, math.nan), reward))
        with pytest.raises(SkippedUpdateError, match=said):
            agent.update(buffer)
    after = agent.snapshot()
    for part in ("policy", "critic"):
        assert all(torch.equal(after[part][name], tensor) for name, tensor in before[part].items())
    assert after["reward_scale"] == before["reward_scale"]
    collect(agent, env, buffer, obs)
    assert agent.update(buffer).metrics["train/accepted"] == 1.0
    collect(agent, env, buffer, obs)
    buffer.reward[3, 2] = math.nan
    with pytest.raises(NonFiniteError, match="reward is nan in env 2 at step 3"):
        agent.update(buffer)


def test_it_has_no_option_that_its_line_search_leaves_no_room_for() -> None:
    assert {field.name for field in fields(TRPOConfig().kl)} == {"target", "of", "max_target", "direction"}
    with pytest.raises(UsageError, match=r"unknown option 'kl\.penalty'"):
        build(TRPOConfig, {"kl": {"penalty": "fixed"}})


def test_a_limit_is_needed() -> None:
    with pytest.raises(UsageError, match="needs one"):
        TRPO(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), replace(SMALL, kl=replace(SMALL.kl, target=0.0)))
