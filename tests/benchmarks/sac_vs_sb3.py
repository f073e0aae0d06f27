"""klrl's SAC against Stable-Baselines3's on the same work, in alternation: steps per second of collecting and learning.

    python tests/benchmarks/sac_vs_sb3.py [--rounds 5] [--work halfcheetah pendulum]

Both: 256x256, minibatches of 256, one gradient step for each environment step, float32, one thread and Gymnasium's own
environments. Each measurement is a process of its own; what is timed begins after 2000 steps. klrl also measures and
logs the policy's KL every 1000 gradient steps, SB3 logs nothing.
"""

from typing import Any

from versus import Work, compare, klrl_speed, sb3_speed

WORK: Work = {
    name: {"env": env, "n_envs": 1, "steps": 3000, "warm_up": 2000, "batch_size": 256, "learning_starts": 100}
    for name, env in (("halfcheetah", "HalfCheetah-v5"), ("pendulum", "Pendulum-v1"))
}


def klrl(**work: Any) -> float:
    return klrl_speed("sac", hidden_sizes=(256, 256), kl={"every": 1000}, **work)


def sb3(**work: Any) -> float:
    from stable_baselines3 import SAC

    return sb3_speed(SAC, **work)  # its policy's layers are 256x256 by default


if __name__ == "__main__":
    compare(__file__, __doc__, WORK, klrl, sb3)
