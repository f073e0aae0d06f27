"""klrl's TRPO against sb3-contrib's on the same work, in alternation: steps per second of collecting and learning.

    python tests/benchmarks/trpo_vs_sb3.py [--rounds 5] [--work cartpole hopper]

Both: 64x64, at most 10 steps of conjugate gradient, 10 passes of the critic in minibatches of 128, one thread and
Gymnasium's own environments. Each measurement is a process of its own; what is timed begins after a warm-up of two
rollouts. klrl also measures and logs the exact KL and evaluates its curvature once more, SB3 logs nothing.
"""

from typing import Any

from versus import Work, compare, klrl_speed, sb3_speed

_BOTH = {"batch_size": 128, "n_critic_updates": 10}
WORK: Work = {
    "cartpole": {"env": "CartPole-v1", "n_envs": 2, "n_steps": 512, "steps": 40_960, **_BOTH},
    "hopper": {"env": "Hopper-v5", "n_envs": 1, "n_steps": 2048, "steps": 40_960, **_BOTH},
}


def klrl(**work: Any) -> float:
    return klrl_speed("trpo", warm_up=2 * work["n_envs"] * work["n_steps"], cg_max_steps=10, **work)


def sb3(**work: Any) -> float:
    from sb3_contrib import TRPO

    return sb3_speed(TRPO, warm_up=2 * work["n_envs"] * work["n_steps"], cg_max_steps=10, **work)


if __name__ == "__main__":
    compare(__file__, __doc__, WORK, klrl, sb3)
