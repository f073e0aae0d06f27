"""Gymnasium environments for klrl: making vector environments, presets, and probes with known answers."""

from gymnasium import register

_PROBES = ("OneStep", "RewardByObservation", "RewardByAction", "RewardByBoth", "Discounting", "Truncation")
for _name in (*_PROBES, "Recall", "Catch"):
    register(f"klrl/{_name}-v0", entry_point=f"klrl.envs.probes:{_name}")
for _name, _steps in (("CartPole", 500), ("Pendulum", 200)):
    register(f"klrl/{_name}-v1", vector_entry_point=f"klrl.envs.native:{_name}", max_episode_steps=_steps)
