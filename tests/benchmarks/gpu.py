"""klrl on a GPU beside one CPU thread: rollouts, updates, and whether both learn the same. It has not run on a card.

    python tests/benchmarks/gpu.py [--device cuda] [--quick]

Steps per second of PPO on klrl/CartPole-v1 with 1 to 65,536 environments, which are on the card, too: of collecting,
and of both collecting and learning (``many_envs.py``). Updates and gradient steps per second on data that stay the
same: as they are, under ``--compile``, and as CUDA graphs, compiling and recording left out. The largest difference of
a weight between an update there and on the CPU, of the same weights and data. On one card it should take less than 8
minutes, most of them on the CPU; ``--quick`` is a trial of few and small parts.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from many_envs import rates

from klrl import PPO, SAC, TRPO, PPOConfig, SACConfig, TRPOConfig
from klrl.training.captured import captured
from klrl.training.compiled import compiled

BOX, ACTION = spaces.Box(-9, 9, (17,)), spaces.Box(-1, 1, (6,))
WAYS: dict[str, Callable[[Any], Any]] = {
    "as they are": lambda agent: nullcontext(),
    "compiled": lambda agent: compiled(agent, quiet=True),
    "CUDA graphs": captured,
}


def rollout(agent: Any) -> Any:
    """A full rollout of random observations and rewards, of 8 environments."""
    buffer, rng = agent.new_buffer(8), np.random.default_rng(0)
    obs, no = rng.normal(size=(agent.config.n_steps + 1, 8, 17)).astype(np.float32), np.zeros(8, bool)
    for t in range(agent.config.n_steps):
        buffer.add(obs[t], agent.act(obs[t]), rng.normal(size=8), no, no, obs[t + 1])
    return buffer


def replay(agent: Any) -> Any:
    """A replay buffer of 1,000 random transitions."""
    buffer, rng, no = agent.new_buffer(1), np.random.default_rng(0), np.zeros(1, bool)
    obs = rng.normal(size=(1001, 1, 17)).astype(np.float32)
    for t in range(1000):
        buffer.add(obs[t], agent.act(obs[t]), rng.normal(size=1), no, no, obs[t + 1])
    return buffer


def works(quick: bool) -> dict[str, tuple[Any, Any, Any, int]]:
    """Of each work: the agent, its options, what makes its data, and how much an update counts for."""
    steps, sizes = (10, (32, 32)) if quick else (100, (256, 256))
    small = PPOConfig(n_steps=32 if quick else 256, normalize_observation=False)
    large = PPOConfig(n_steps=64 if quick else 8192, batch_size=256 if quick else 8192, n_epochs=4)
    sac = SACConfig(learning_starts=1, gradient_steps=steps, hidden_sizes=sizes)
    return {
        f"PPO's updates of 8 x {small.n_steps} rows by {small.batch_size}, 10 epochs": (PPO, small, rollout, 1),
        f"PPO's updates of 8 x {large.n_steps} rows by {large.batch_size}, 4 epochs": (PPO, large, rollout, 1),
        f"SAC's gradient steps of {sac.batch_size} rows, {sizes[0]} x {sizes[1]}": (SAC, sac, replay, steps),
    }


def speed(work: tuple[Any, Any, Any, int], way: str, device: str, seconds: float) -> float:
    """How many a second."""
    kind, config, data, each = work
    agent = kind(BOX, ACTION, config, device=device)
    buffer, done = data(agent), 0
    with WAYS[way](agent):
        for _ in range(2):
            agent.update(buffer)  # which compiles and records
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            agent.update(buffer)  # which ends by reading what it did
            done += each
        return done / (time.perf_counter() - start)


def apart(kind: Any, config: Any, data: Any, device: str) -> float:
    """The largest difference of a weight after an update on ``device`` and on the CPU."""
    weights = []
    near = kind(BOX, ACTION, config)
    buffer = data(near)
    for where in ("cpu", device):
        agent = kind(BOX, ACTION, config, device=where)
        agent.load_state_dict(near.state_dict())
        with captured(agent):
            agent.update(buffer)
        weights.append(torch.cat([agent.policy_params.flat, agent.critic_params.flat]).cpu())
    return float((weights[0] - weights[1]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    device, quick, begun = given.device, given.quick, time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "again, on the CPU"
    print(f"| | one CPU thread | {name} |\n|---|---|---|", flush=True)
    for n_envs in (64,) if quick else (1, 64, 4096, 65_536):
        found = [rates(n_envs, where) for where in ("cpu", device)]
        for part, title in (("collecting", "collecting"), ("both", "collecting and learning")):
            both = " | ".join(f"{each[part]:,.0f}" for each in found)
            print(f"| {title}, {n_envs:,} environments, steps/s | {both} |", flush=True)
    for title, work in works(quick).items():
        for way in WAYS:
            found_at = []
            for where in ("cpu", device):
                on_gpu = where.startswith("cuda")
                # On the CPU nothing is recorded, and PPO's gradients are written out and not compiled.
                if (way == "CUDA graphs" and not on_gpu) or (
                    way == "compiled" and (quick or not (on_gpu or work[0] is SAC))
                ):
                    found_at.append("-")
                else:
                    found_at.append(f"{speed(work, way, where, 0.1 if quick else 5.0):,.1f}")
            print(f"| {title}, {way}, a second | {' | '.join(found_at)} |", flush=True)
    agreeing = {
        "an update of PPO's": (PPO, PPOConfig(n_steps=64, n_epochs=4), rollout),
        "an update of TRPO's": (TRPO, TRPOConfig(n_steps=64), rollout),
        "20 gradient steps of SAC's": (SAC, SACConfig(learning_starts=1, gradient_steps=20, batch_size=64), replay),
    }
    for title, (kind, config, data) in agreeing.items():
        print(f"| largest difference of a weight after {title} | 0 | {apart(kind, config, data, device):.1e} |")
    print(f"\nIn {time.perf_counter() - begun:.0f} s, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
