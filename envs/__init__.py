"""Gymnasium environments for klrl: making vector environments, presets, and probes with known answers."""

from gymnasium import register

for _name, _class in {
    "klrl/OneStep-v0": "OneStep",
    "klrl/RewardByObservation-v0": "RewardByObservation",
    "klrl/RewardByAction-v0": "RewardByAction",
    "klrl/RewardByBoth-v0": "RewardByBoth",
    "klrl/Discounting-v0": "Discounting",
    "klrl/Truncation-v0": "Truncation",
}.items():
    register(_name, entry_point=f"klrl.envs.probes:{_class}")
