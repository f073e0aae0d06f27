"""klrl's PPO against Stable-Baselines3's on the same work, in alternation: steps per second of collecting and learning.

    python tests/benchmarks/ppo_vs_sb3.py [--rounds 5] [--work cartpole halfcheetah]

Both run every epoch of every update (klrl's early stop is off, its penalty and its exact-KL report are on) with one
thread and Gymnasium's own environments. Each measurement is a process of its own; what is timed begins after a
warm-up of two rollouts, so imports and construction do not count. klrl also writes its logs, SB3 does not.
"""

from typing import Any

from versus import Work, compare, klrl_speed, sb3_speed

WORK: Work = {
    "cartpole": {"env": "CartPole-v1", "n_envs": 8, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "steps": 60_000},
    "halfcheetah": {
        "env": "HalfCheetah-v5",
        "n_envs": 1,
        "n_steps": 2048,
        "batch_size": 64,
        "n_epochs": 10,
        "steps": 20_480,
    },
}


def klrl(**work: Any) -> float:
    return klrl_speed("ppo", kl={"stop": 0.0, "check": "update"}, warm_up=2 * work["n_envs"] * work["n_steps"], **work)


def sb3(**work: Any) -> float:
    from stable_baselines3 import PPO

    return sb3_speed(PPO, warm_up=2 * work["n_envs"] * work["n_steps"], **work)


if __name__ == "__main__":
    compare(__file__, __doc__, WORK, klrl, sb3)
