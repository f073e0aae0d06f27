"""Runs that start from another: what they take over of it, and what begins anew."""

from pathlib import Path
from typing import Any

from klrl.agents import registry
from klrl.agents.base import Agent
from klrl.errors import UsageError

_OF_POLICIES = ("hidden_sizes", "activation", "layer_norm", "memory", "memory_size", "network", "head")
_FORM = (*_OF_POLICIES, "observation_keys", "critic", "critic_hidden_sizes", "critic_activation", "share_network")
_ANEW = ["optimizers", "coefficients", "learning rate", "counts", "buffers"]


def form_of(path: str | Path) -> dict[str, Any]:
    """The options that say which form a saved agent's networks have. Raises UsageError where there is none."""
    try:
        _, _, options, agent = registry.read(path)
    except UsageError as problem:
        raise UsageError(f"--from: {problem}") from None
    form = {name: options[name] for name in _FORM if options.get(name)}
    if size := options.get("bottleneck", {}).get("size"):
        form["bottleneck"] = {"size": size}
    return {**form, "normalize_observation": agent.encoder.normalize}


def start_from(agent: Agent, path: str | Path) -> dict[str, Any]:
    """Let ``agent`` take over what it can from a run or checkpoint, and say from where, what, and what begins anew.

    Raises UsageError where there is none, or where its policy is of another form than the agent's.
    """
    source, step, options, other = registry.read(path)
    try:
        taken = agent.load_policy(other)
    except UsageError as problem:
        raise UsageError(f"--from {path}: {problem}") from None
    about = {"run": str(path), "checkpoint": source.name, "step": step, "agent": other.name()}
    critics = [] if "critic" in taken else ["critic"]
    return {**about, "env_id": options.get("env_id", ""), "taken": taken, "anew": [*critics, *_ANEW]}
