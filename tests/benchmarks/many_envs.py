"""PPO on klrl/CartPole-v1 with 8 to 65,536 environments on one CPU thread: what a step costs, and what limits it.

    python tests/benchmarks/many_envs.py [--environments 8 512 4096 65536]

Steps per second of the environment alone; of collecting (acting, stepping and storing); of updates (2 epochs of
minibatches of a quarter of the rollout, at most 8192 rows); and of both together. On a GPU, where ``gpu.py`` asks for
it, rollouts stay on the device, and the environment alone is not measured.
"""

import argparse
import time
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch

from klrl import PPO, PPOConfig
from klrl.agents.device import on_device
from klrl.envs.make import EnvConfig, make_vector
from klrl.training.captured import captured
from klrl.training.device import moved
from klrl.training.episodes import Episodes


def rates(n_envs: int, device: str = "cpu") -> dict[str, float]:
    """Steps per second, by what is done: the best of three rollouts after the first."""
    n_steps = max(16, 4096 // n_envs)
    envs: Any = make_vector("klrl/CartPole-v1", n_envs, EnvConfig())
    config = PPOConfig(n_steps=n_steps, batch_size=min(8192, n_envs * n_steps // 4), n_epochs=2)
    agent = PPO(envs.single_observation_space, envs.single_action_space, config, device)
    buffer, stays = agent.new_buffer(n_envs), agent.device.type != "cpu"
    found: dict[str, list[float]] = {"environment": [], "collecting": [], "updates": [], "both": []}
    with closing(envs), captured(agent), ExitStack() as stack:
        if stays:
            envs, buffer, _ = moved(agent, envs, Episodes(n_envs))
            stack.enter_context(on_device(agent))
        obs, _ = envs.reset(seed=0)
        for _ in range(4):
            stepping = 0.0
            start = time.perf_counter()
            for _ in range(n_steps):
                action = agent.collect(obs, buffer)
                before = time.perf_counter()
                after, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
                stepping += time.perf_counter() - before
                buffer.add(obs, action, reward, terminated, truncated, after)
                obs = after
            if stays:
                torch.cuda.synchronize(agent.device)
            collected = time.perf_counter()
            agent.update(buffer)
            done = time.perf_counter()
            seconds = (stepping, collected - start, done - collected, done - start)
            for part, taken in zip(found.values(), seconds, strict=True):
                part.append(n_envs * n_steps / taken)
    return {part: float(np.max(each[1:])) for part, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, nargs="+", default=[8, 512, 4096, 65_536])
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.empty(30_000_000, dtype=torch.uint8)  # as klrl train: glibc then keeps what an update frees
    print("| environments | the environment alone | collecting | updates | both |\n|---|---|---|---|---|")
    for n_envs in parser.parse_args().environments:
        print(f"| {n_envs:,} | {' | '.join(f'{rate:,.0f}' for rate in rates(n_envs).values())} |", flush=True)


if __name__ == "__main__":
    main()
