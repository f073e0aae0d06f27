"""What measuring the exact KL costs: its share of a PPO update on CartPole-v1 (8 x 128 steps, minibatch 256, 4 epochs).

python tests/benchmarks/kl_cost.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch

from klrl import PPO, PPOConfig
from klrl.agents.base import KLConfig
from klrl.kl import Move


def shares(updates: int = 100) -> dict[str, float]:
    """Median share of an update's time that goes into measuring: once, after each epoch, and the whole report."""
    torch.set_num_threads(1)
    envs = gym.make_vec("CartPole-v1", 8, vectorization_mode="sync")
    result = {}
    for check, measured, name in (
        ("update", "kl", "once"),
        ("epoch", "kl", "after each epoch"),
        ("update", "end", "whole report"),
    ):
        config = PPOConfig(n_steps=128, batch_size=256, n_epochs=4, kl=KLConfig(stop=1e9, check=check))  # type: ignore[arg-type]
        agent = PPO(envs.single_observation_space, envs.single_action_space, config)
        buffer, (obs, _) = agent.new_buffer(8), envs.reset(seed=0)
        calls: list[float] = []
        totals = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Move, measured, _timed(getattr(Move, measured), calls))
            for _ in range(updates):
                while True:
                    action, before = agent.act(obs), obs
                    obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
                    buffer.add(before, action, reward, terminated, truncated, obs)
                    if buffer.full:
                        break
                start = time.perf_counter()
                agent.update(buffer)
                totals.append(time.perf_counter() - start)
                if name == "once":  # the report of such an update already holds it: measure it on its own
                    with agent.hold(agent.make_batch(buffer)) as move:
                        move.kl()
        times = config.n_epochs if name == "after each epoch" else 1
        result[name] = times * statistics.median(calls) / statistics.median(totals)
    return result


def _timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        into.append(time.perf_counter() - start)
        return result

    return timed


if __name__ == "__main__":
    for name, share in shares().items():
        print(f"exact KL {name:16} {100 * share:5.1f} % of an update")
