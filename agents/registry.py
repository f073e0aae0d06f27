"""The agents by the name that the command line gives them."""

from importlib import import_module
from typing import Any

from klrl.config import suggest
from klrl.errors import UsageError

AGENTS = {
    "ppo": ("klrl.agents.ppo", "PPO", "PPOConfig"),
    "sac": ("klrl.agents.sac", "SAC", "SACConfig"),
    "trpo": ("klrl.agents.trpo", "TRPO", "TRPOConfig"),
}


def find(name: str) -> tuple[Any, Any]:
    """The agent class and its config class. Raises UsageError for an unknown name."""
    if name not in AGENTS:
        raise UsageError(f"unknown agent {name!r}{suggest(name, AGENTS)}; known: {', '.join(AGENTS)}")
    module, agent, config = AGENTS[name]
    loaded = import_module(module)
    return getattr(loaded, agent), getattr(loaded, config)
