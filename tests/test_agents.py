"""What every on-policy agent must do: solve the probes, repeat itself from a seed, and continue from its state."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import collect, train

from klrl.agents.limits import KLConfig
from klrl.agents.on_policy import OnPolicyConfig
from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.kl import kl

_COMMON: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 64,
    "gamma": 0.9,
    "gae_lambda": 1.0,
    "normalize_reward": False,
    "normalize_observation": False,
    "hidden_sizes": (32,),
}
AGENTS = [
    PPOConfig(**_COMMON, n_epochs=4, learning_rate=3e-3, kl=KLConfig(target=0.05)),
    TRPOConfig(**_COMMON, learning_rate=3e-3, kl=replace(TRPOConfig().kl, target=0.05)),
]
CASES = [
    ("OneStep", "discrete", "box", 30),
    ("RewardByObservation", "discrete", "box", 40),
    ("RewardByAction", "discrete", "box", 40),
    ("RewardByBoth", "discrete", "box", 60),
    ("Discounting", "discrete", "box", 40),
    ("Truncation", "discrete", "box", 40),
    ("RewardByBoth", "box", "box", 100),
    ("RewardByBoth", "multidiscrete", "box", 60),
    ("RewardByBoth", "multibinary", "box", 60),
    ("RewardByBoth", "discrete", "dict", 40),
    ("RewardByBoth", "discrete", "discrete", 40),
    pytest.param("RewardByBoth", "multibinary", "image", 20, marks=pytest.mark.slow),
    ("Truncation", "box", "dict", 40),
]


@pytest.mark.parametrize("config", AGENTS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize(("name", "action", "observation", "updates"), CASES)
def test_probes_are_solved_and_valued_as_their_closed_form_says(
    name: str, action: str, observation: str, updates: int, config: OnPolicyConfig
) -> None:
    agent, _ = train(config, f"klrl/{name}-v0", updates, action=action, observation=observation)
    probe: Any = gym.make(f"klrl/{name}-v0", action=action, observation=observation).unwrapped
    reached = (0, 1) if name in ("RewardByObservation", "RewardByBoth", "Discounting", "Truncation") else (0,)
    for bit in reached:
        probe.bit = bit
        shown = probe.observe()
        batch = (
            {k: np.asarray(v)[None] for k, v in shown.items()} if isinstance(shown, dict) else np.asarray(shown)[None]
        )
        # The policy still samples: with a Box it loses its variance, so its value lies a little below the optimum.
        tolerance = 0.1 if action == "box" else 0.02
        assert agent.value(batch).item() == pytest.approx(probe.value(bit, 0.9), rel=tolerance)
        if name in ("RewardByAction", "RewardByBoth"):
            chosen, _ = agent.predict(shown, deterministic=True)
            assert probe.match(chosen, 1 if name == "RewardByAction" else bit) > 0.97


@pytest.mark.parametrize("kind", [PPOConfig, TRPOConfig])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_one_seed_gives_one_run(env_id: str, kind: type[OnPolicyConfig]) -> None:
    config = kind(n_steps=64, batch_size=128)
    (first, reports), (second, again) = (train(config, env_id, 3, seed=5) for _ in range(2))
    assert torch.equal(first.policy_params.flat, second.policy_params.flat)
    assert torch.equal(first.critic_params.flat, second.critic_params.flat)
    assert reports == again
    other, _ = train(config, env_id, 3, seed=6)
    assert not torch.equal(first.policy_params.flat, other.policy_params.flat)


@pytest.mark.parametrize(
    "config",
    [PPOConfig(n_steps=32, batch_size=64, n_epochs=2, lr_schedule="kl"), TRPOConfig(n_steps=32, fisher_fraction=0.5)],
    ids=lambda config: type(config).__name__,
)
def test_state_continues_bit_for_bit(config: OnPolicyConfig) -> None:
    agent, _ = train(config, "Pendulum-v1", 3)
    copy = type(agent)(agent.observation_space, agent.action_space, config, seed=99)
    copy.load_state_dict(agent.state_dict())
    env = make_vector("Pendulum-v1", 8, EnvConfig())
    results = []
    for one in (agent, copy):
        buffer = one.new_buffer(8)
        collect(one, env, buffer, env.reset(seed=7)[0])
        results.append(one.update(buffer))
    assert results[0] == results[1]
    assert torch.equal(agent.policy_params.flat, copy.policy_params.flat)
    assert torch.equal(agent.critic_params.flat, copy.critic_params.flat)


def test_one_module_for_all_is_copied_so_that_policy_and_critic_share_nothing() -> None:
    shared = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh())
    env = make_vector("CartPole-v1", 8, EnvConfig())
    config = TRPOConfig(n_steps=32, learning_rate=1e-2)
    agent = TRPO(env.single_observation_space, env.single_action_space, config, network=lambda space: shared)
    buffer = agent.new_buffer(8)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        obs = collect(agent, env, buffer, obs)
        inputs = agent.encoder(buffer.obs_before_steps())
        before = agent.policy_at(inputs)
        report = agent.update(buffer).kl
        after = kl(before, agent.policy_at(inputs))[torch.from_numpy(buffer.valid).flatten()]
        assert report.mean == pytest.approx(float(after.double().mean()), rel=1e-6)
        assert 0 < report.mean <= 0.01


def test_what_acts_is_what_learns_where_a_layer_is_no_plain_one() -> None:
    class Mirror(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    for change in ("subclass", "hook", "parametrization", "no bias"):
        agent = PPO(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2))
        layers: Any = agent.policy.network.mlp.layers  # type: ignore[union-attr]
        torch.nn.init.normal_(layers[-1].weight)
        if change == "subclass":
            layers[-1] = Mirror(64, 2)
        elif change == "hook":
            layers[-1].register_forward_hook(lambda module, given, output: -output)
        elif change == "parametrization":
            torch.nn.utils.parametrizations.weight_norm(layers[-1])
        else:
            layers[-1] = torch.nn.Linear(64, 2, bias=False)
        acted = agent.predict(obs, deterministic=True)[0]
        assert (acted == agent.distribution(obs).mode[:, 0].numpy()).all(), change


def test_a_frozen_policy_stands_still_and_its_critic_learns() -> None:
    for kind in (PPO, TRPO):
        env = make_vector("CartPole-v1", 8, EnvConfig())
        agent = kind(env.single_observation_space, env.single_action_space, {"n_steps": 32})
        agent.policy.requires_grad_(False)
        critic, buffer = agent.critic_params.flat.clone(), agent.new_buffer(8)
        collect(agent, env, buffer, env.reset(seed=0)[0])
        assert agent.update(buffer).kl.max == 0.0
        assert not torch.equal(agent.critic_params.flat, critic)
