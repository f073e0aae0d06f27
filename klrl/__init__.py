"""klrl: reinforcement learning that always knows how far each update moved the policy.

Names are imported on first use, so that ``import klrl`` costs nothing and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from klrl.agents.base import Agent as Agent
    from klrl.agents.base import KLConfig as KLConfig
    from klrl.agents.base import KLTarget as KLTarget
    from klrl.agents.base import OffPolicyKLConfig as OffPolicyKLConfig
    from klrl.agents.base import UpdateResult as UpdateResult
    from klrl.agents.on_policy import OnPolicyAgent as OnPolicyAgent
    from klrl.agents.on_policy import OnPolicyConfig as OnPolicyConfig
    from klrl.agents.ppo import PPO as PPO
    from klrl.agents.ppo import PPOConfig as PPOConfig
    from klrl.agents.sac import SAC as SAC
    from klrl.agents.sac import SACConfig as SACConfig
    from klrl.agents.trpo import TRPO as TRPO
    from klrl.agents.trpo import TRPOConfig as TRPOConfig
    from klrl.buffers.replay import ReplayBuffer as ReplayBuffer
    from klrl.buffers.rollout import RolloutBuffer as RolloutBuffer
    from klrl.errors import EnvironmentFailedError as EnvironmentFailedError
    from klrl.errors import Interrupted as Interrupted
    from klrl.errors import NonFiniteError as NonFiniteError
    from klrl.errors import UsageError as UsageError
    from klrl.training.load import load as load
    from klrl.training.run import Run as Run
    from klrl.training.run import resume as resume
    from klrl.training.run import train as train

_HOME = {
    "Agent": "klrl.agents.base",
    "EnvironmentFailedError": "klrl.errors",
    "Interrupted": "klrl.errors",
    "KLConfig": "klrl.agents.base",
    "KLTarget": "klrl.agents.base",
    "NonFiniteError": "klrl.errors",
    "OffPolicyKLConfig": "klrl.agents.base",
    "OnPolicyAgent": "klrl.agents.on_policy",
    "OnPolicyConfig": "klrl.agents.on_policy",
    "PPO": "klrl.agents.ppo",
    "PPOConfig": "klrl.agents.ppo",
    "ReplayBuffer": "klrl.buffers.replay",
    "RolloutBuffer": "klrl.buffers.rollout",
    "Run": "klrl.training.run",
    "SAC": "klrl.agents.sac",
    "SACConfig": "klrl.agents.sac",
    "TRPO": "klrl.agents.trpo",
    "TRPOConfig": "klrl.agents.trpo",
    "UpdateResult": "klrl.agents.base",
    "UsageError": "klrl.errors",
    "load": "klrl.training.load",
    "resume": "klrl.training.run",
    "train": "klrl.training.run",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'klrl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
