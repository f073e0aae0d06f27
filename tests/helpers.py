"""What the agents' tests share."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from klrl.agents.base import UpdateResult
from klrl.agents.limits import OffPolicyKLConfig
from klrl.agents.on_policy import OnPolicyAgent, OnPolicyConfig
from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.agents.trpo import TRPO
from klrl.buffers.rollout import RolloutBuffer
from klrl.envs.make import EnvConfig, make_vector


def collect(agent: OnPolicyAgent, env: Any, buffer: RolloutBuffer, obs: Any) -> Any:
    """Fill the buffer; returns the next observation."""
    while True:
        action = agent.collect(obs, buffer)
        next_obs, reward, terminated, truncated, _ = env.step(agent.env_action(action))
        buffer.add(obs, action, reward, terminated, truncated, next_obs)
        obs = next_obs
        if buffer.full:
            return obs


def make(config: OnPolicyConfig, env: Any, seed: int = 0) -> Any:
    """The agent that the config is of."""
    kind: Any = PPO if isinstance(config, PPOConfig) else TRPO
    return kind(env.single_observation_space, env.single_action_space, config, seed=seed)


def train(
    config: OnPolicyConfig, env_id: Any, updates: int, seed: int = 0, **kwargs: Any
) -> tuple[Any, list[UpdateResult]]:
    """The agent after some updates on eight environments, and their results."""
    env = make_vector(env_id, 8, EnvConfig(kwargs=kwargs))
    agent = make(config, env, seed)
    buffer = agent.new_buffer(8)
    obs, _ = env.reset(seed=seed)
    reports = []
    for _ in range(updates):
        obs = collect(agent, env, buffer, obs)
        reports.append(agent.update(buffer))
    env.close()
    return agent, reports


# A PPO run of about a second.
QUICK: dict[str, Any] = {
    "total_timesteps": 1500,
    "n_envs": 4,
    "n_steps": 64,
    "batch_size": 64,
    "n_epochs": 2,
    "eval_every": 2,
    "eval_episodes": 2,
    "quiet": True,
}
SMALL_SAC = SACConfig(
    gradient_steps=1,
    hidden_sizes=(32,),
    batch_size=64,
    learning_starts=64,
    learning_rate=3e-3,
    buffer_size=5_000,
    gamma=0.9,
    tau=0.05,
    ent_coef_lr=0.01,
    kl=OffPolicyKLConfig(every=50),
)


def train_sac(
    config: SACConfig, env_id: Any, steps: int, seed: int = 0, n_envs: int = 4, **kwargs: Any
) -> tuple[SAC, list[UpdateResult]]:
    """The agent after ``steps`` steps of each of its environments, and the results of its windows."""
    env = make_vector(env_id, n_envs, EnvConfig(kwargs=kwargs))
    agent = SAC(env.single_observation_space, env.single_action_space, config, seed=seed)
    buffer, reports = agent.new_buffer(n_envs), []
    obs, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(agent.env_action(action))
        buffer.add(obs, action, reward, terminated, truncated, next_obs)
        obs = next_obs
        if agent.ready(buffer) and (report := agent.update(buffer)) is not None:
            reports.append(report)
    env.close()
    return agent, reports


def within_a_window(rules: OffPolicyKLConfig) -> tuple[SAC, Any]:
    """SAC on Pendulum-v1 after 30 steps of a window of ``rules``, and a buffer for 30 more; its rewards are random."""
    agent, _ = train_sac(replace(SMALL_SAC, kl=rules), "Pendulum-v1", 40)
    buffer, rng, no = agent.new_buffer(1), np.random.default_rng(0), np.zeros(1, bool)
    for _ in range(100):
        obs = rng.normal(size=(1, 3)).astype(np.float32)
        buffer.add(obs, rng.uniform(-1, 1, (1, 1)).astype(np.float32), rng.normal(size=1), no, no, obs)
    agent.config = replace(agent.config, gradient_steps=30)
    agent.update(buffer)
    return agent, buffer


def benchmark(name: str) -> ModuleType:
    """The module ``name`` of tests/benchmarks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, but for times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "wall" and not k.startswith("time/")} for line in lines]
