"""What measuring the exact KL and holding it cost: shares of a PPO update on CartPole-v1 (8 x 128 steps, minibatch 256,
4 epochs), and what each rule adds to an update there and on Hopper-v5 (4 x 512 steps, minibatch 128, 10 epochs).

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
from klrl.agents.limits import KLConfig
from klrl.kl import Move


def shares(updates: int = 100) -> dict[str, float]:
    """Median share of an update's time that goes into measuring: once, after each epoch, and the whole report."""
    torch.set_num_threads(1)
    envs = gym.make_vec("CartPole-v1", 8, vectorization_mode="sync")
    result = {}
    for check, measured, name in (
        ("update", "excess", "once"),
        ("epoch", "excess", "after each epoch"),
        ("update", "end", "whole report"),
    ):
        kl: Any = KLConfig(stop=1e9, check=check, on_overshoot="keep")  # type: ignore[arg-type]
        config = PPOConfig(n_steps=128, batch_size=256, n_epochs=4, kl=kl)
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
                        move.excess()
        times = config.n_epochs if name == "after each epoch" else 1
        result[name] = times * statistics.median(calls) / statistics.median(totals)
    return result


FREE: dict[str, Any] = {"clip_range": 0.0, "lr_schedule": "constant"}
RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "the default": {"clip_range": 0.2, "lr_schedule": "kl", "kl": {"on_overshoot": "project"}},
    "clip": {"clip_range": 0.2},
    "spo": {"clip_range": 0.2, "clip_rule": "spo"},
    "a penalty on the mean": {"kl": {"penalty": "adaptive"}},
    "gate": {"kl": {"per_state": "gate"}},
    "reverse": {"kl": {"per_state": "reverse"}},
    "project": {"kl": {"per_state": "project"}},
}


def costs(env: str, n_envs: int, rounds: int = 15, **settings: int) -> dict[str, float]:
    """Time of an update under each rule, over that of an update that nothing holds: medians, in alternation."""
    envs = gym.make_vec(env, n_envs, vectorization_mode="sync")
    filled = {}
    for name, rule in RULES.items():
        config = {**settings, **FREE, **rule, "kl": {"on_overshoot": "keep", **rule.get("kl", {})}}
        agent = PPO(envs.single_observation_space, envs.single_action_space, config)
        buffer, (obs, _) = agent.new_buffer(n_envs), envs.reset(seed=0)
        while not buffer.full:
            action, before = agent.act(obs), obs
            obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
            buffer.add(before, action, reward, terminated, truncated, obs)
        filled[name] = (agent, buffer)
    times: dict[str, list[float]] = {name: [] for name in RULES}
    for _ in range(rounds):
        for name, (agent, buffer) in filled.items():
            start = time.process_time()
            agent.update(buffer)
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) / statistics.median(times["nothing"]) for name, taken in times.items()}


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
    cartpole = costs("CartPole-v1", 8, n_steps=128, batch_size=256, n_epochs=4)
    hopper = costs("Hopper-v5", 4, n_steps=512, batch_size=128, n_epochs=10)
    for name in RULES:
        print(
            f"{name:22} CartPole-v1 {cartpole[name]:.2f}  Hopper-v5 {hopper[name]:.2f} of an update that nothing holds"
        )
