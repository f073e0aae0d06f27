"""klrl: reinforcement learning that always knows how far each update moved the policy.

Names are imported on first use, so that ``import klrl`` costs nothing and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from klrl.agents.base import Agent as Agent
    from klrl.agents.base import UpdateResult as UpdateResult
    from klrl.agents.bottleneck import BottleneckConfig as BottleneckConfig
    from klrl.agents.governed import Governed as Governed
    from klrl.agents.limits import KLConfig as KLConfig
    from klrl.agents.limits import KLTarget as KLTarget
    from klrl.agents.limits import OffPolicyKLConfig as OffPolicyKLConfig
    from klrl.agents.on_policy import OnPolicyAgent as OnPolicyAgent
    from klrl.agents.on_policy import OnPolicyConfig as OnPolicyConfig
    from klrl.agents.ppo import PPO as PPO
    from klrl.agents.ppo import PPOConfig as PPOConfig
    from klrl.agents.reference import ReferenceConfig as ReferenceConfig
    from klrl.agents.sac import SAC as SAC
    from klrl.agents.sac_options import SACConfig as SACConfig
    from klrl.agents.student import Student as Student
    from klrl.agents.student import StudentConfig as StudentConfig
    from klrl.agents.trpo import TRPO as TRPO
    from klrl.agents.trpo import TRPOConfig as TRPOConfig
    from klrl.analysis.export import export as export
    from klrl.buffers.replay import ReplayBuffer as ReplayBuffer
    from klrl.buffers.rollout import RolloutBuffer as RolloutBuffer
    from klrl.envs.masks import ActionMasks as ActionMasks
    from klrl.errors import EnvironmentFailedError as EnvironmentFailedError
    from klrl.errors import Interrupted as Interrupted
    from klrl.errors import NonFiniteError as NonFiniteError
    from klrl.errors import UsageError as UsageError
    from klrl.training.callbacks import Callback as Callback
    from klrl.training.callbacks import LiveRun as LiveRun
    from klrl.training.distill import distill as distill
    from klrl.training.load import load as load
    from klrl.training.result import Run as Run
    from klrl.training.run import resume as resume
    from klrl.training.run import train as train

_NAMES = {
    "klrl.agents.base": ["Agent", "UpdateResult"],
    "klrl.agents.bottleneck": ["BottleneckConfig"],
    "klrl.agents.governed": ["Governed"],
    "klrl.agents.limits": ["KLConfig", "KLTarget", "OffPolicyKLConfig"],
    "klrl.agents.on_policy": ["OnPolicyAgent", "OnPolicyConfig"],
    "klrl.agents.ppo": ["PPO", "PPOConfig"],
    "klrl.agents.reference": ["ReferenceConfig"],
    "klrl.agents.sac": ["SAC"],
    "klrl.agents.sac_options": ["SACConfig"],
    "klrl.agents.student": ["Student", "StudentConfig"],
    "klrl.agents.trpo": ["TRPO", "TRPOConfig"],
    "klrl.analysis.export": ["export"],
    "klrl.buffers.replay": ["ReplayBuffer"],
    "klrl.buffers.rollout": ["RolloutBuffer"],
    "klrl.envs.masks": ["ActionMasks"],
    "klrl.errors": ["EnvironmentFailedError", "Interrupted", "NonFiniteError", "UsageError"],
    "klrl.training.callbacks": ["Callback", "LiveRun"],
    "klrl.training.distill": ["distill"],
    "klrl.training.load": ["load"],
    "klrl.training.result": ["Run"],
    "klrl.training.run": ["resume", "train"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'klrl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
