"""What limits the works of versus.py: steps per second that the environment alone allows, and the arithmetic alone.

    python tests/benchmarks/limits.py

The environment alone: gymnasium's SyncVectorEnv, or its own vector environment, with actions drawn beforehand. The
arithmetic alone: the matrix products of the networks, forwards and backwards, and nothing else, on one thread. Both:
one after the other, which a loop in one process and thread, with these environments, networks and minibatches, cannot
pass by much: klrl steps small environments in a sixth less time than Gymnasium's does.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
from threadpoolctl import threadpool_limits
from versus import WORKS, title


def environment(env: str, n_envs: int, mode: str, steps: int = 4000) -> float:
    """Seconds for a step of one environment."""
    envs = gym.make_vec(env, n_envs, mode)
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(64)]
    start = time.perf_counter()
    for i in range(steps // n_envs):
        envs.step(actions[i % 64])
    seconds = time.perf_counter() - start
    envs.close()
    return seconds / (steps // n_envs * n_envs)


def products(sizes: list[int], rows: int, backwards: str = "") -> float:
    """Seconds for an MLP's matrix products: forwards, and ``backwards`` to its "weights" or "inputs"."""
    rng = np.random.default_rng(0)
    done: list[Callable[[], Any]] = []
    for layer, (n, m) in enumerate(pairwise(sizes)):
        x, w, y = (rng.standard_normal(shape, np.float32) for shape in ((rows, n), (m, n), (rows, m)))
        done.append(lambda x=x, w=w: x @ w.T)  # type: ignore[misc]
        if backwards == "weights":
            done.append(lambda x=x, y=y: y.T @ x)  # type: ignore[misc]
        if backwards == "inputs" or (backwards and layer > 0):
            done.append(lambda y=y, w=w: y @ w)  # type: ignore[misc]
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        for product in done:
            product()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def arithmetic(work: dict[str, Any]) -> float:
    """Seconds for the products of one environment step's learning."""
    envs = gym.make_vec(work["env"], 1, "sync")
    inputs = int(np.prod(envs.single_observation_space.shape))
    actions = int(getattr(envs.single_action_space, "n", 0) or np.prod(envs.single_action_space.shape))
    envs.close()
    acting, batch = work["n_envs"], work["batch_size"]
    if work["agent"] == "sac":
        policy, critic = [inputs, 256, 256, 2 * actions], [inputs + actions, 256, 256, 1]
        critics = 2 * (products(critic, batch) + products(critic, batch, "weights") + products(critic, batch, "inputs"))
        return products(policy, acting) + products(policy, batch) + products(policy, batch, "weights") + critics
    policy, critic = [inputs, 64, 64, actions], [inputs, 64, 64, 1]
    rows = work["n_envs"] * work["n_steps"]
    once = products(policy, acting) / acting + (2 * products(policy, rows) + products(critic, rows)) / rows
    if work["agent"] == "ppo":
        steps = products(policy, batch, "weights") + products(critic, batch, "weights")
        return once + work["n_epochs"] * steps / batch
    # A product with the Fisher matrix is a push forwards, two products a layer, and a pull.
    fisher = work["cg_max_steps"] * (2 * products(policy, rows) + products(policy, rows, "weights")) / rows
    return once + fisher + work["n_critic_updates"] * products(critic, batch, "weights") / batch


def main() -> None:
    print("| work | the environment alone | the arithmetic alone | both |\n|---|---|---|---|")
    with threadpool_limits(1):
        for name, work in WORKS.items():
            if name.endswith("compiled"):  # of the same arithmetic
                continue
            mode = "vector_entry_point" if name.endswith("vector") else "sync"
            stepping, learning = environment(work["env"], work["n_envs"], mode), arithmetic(work)
            rates = (1 / each for each in (stepping, learning, stepping + learning))
            print(f"| {title(name)} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main()
