"""Trained policies: from a run's folder or checkpoint to an agent, and environments to see it in."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from klrl.agents import registry
from klrl.agents.base import Agent
from klrl.envs.make import import_module, make_vector, registered
from klrl.errors import UsageError
from klrl.policies import spaces
from klrl.rundir import checkpoint
from klrl.training.loop import Envs
from klrl.training.run import RunConfig, config_of, fitting


@dataclass(frozen=True)
class Trained:
    """An agent as a checkpoint holds it."""

    path: str
    """As it was asked for."""
    folder: Path
    """The checkpoint."""
    step: int
    agent: Agent
    config: RunConfig
    env: str
    """The environment it was trained on."""

    def make_envs(self, count: int, env: str = "", imports: Iterable[str] = (), **kwargs: Any) -> Envs:
        """``count`` environments with the run's arguments and ``kwargs``: its own id, or ``env``.

        Raises UsageError for an id that is not known here, and for one with other spaces than the agent's.
        """
        for package in [*self.config.imports, *imports]:
            import_module(package, f"--import {package}")
        if not env and not registered(self.env):
            raise UsageError(
                f"{self.path} was trained on {self.env!r}, which is no env id here: name one, or --import its package"
            )
        name = env or self.env
        envs = make_vector(name, count, replace(self.config.env, kwargs={**self.config.env.kwargs, **kwargs}))
        for part in ("observation_space", "action_space"):
            mine, theirs = getattr(self.agent, part), getattr(envs, f"single_{part}")
            if mine != theirs:
                envs.close()
                raise UsageError(f"{self.path} was trained on {self.env} with {part} {mine}, but {name} has {theirs}")
        return envs


def load(path: str | Path, which: Literal["last", "best"] = "last") -> Agent:
    """The agent of a run folder or checkpoint, with its normaliser, on the CPU.

    Raises UsageError where ``path`` is neither, or where a file is missing, truncated or altered.
    """
    return open_policy(path, which).agent


def open_policy(path: str | Path, which: str = "last") -> Trained:
    """The policy of a run folder or checkpoint, as ``load``."""
    source, content = checkpoint.newest(Path(path), which)
    with fitting(source):
        options, state = content["state"]["options"], content["state"]["agent"]
        config, agent_config = config_of(options)
        agent_class, _ = registry.find(options["agent"])
        observation_space, action_space = (
            spaces.from_json(content["state"][key]) for key in ("observation_space", "action_space")
        )
        agent: Agent = agent_class(observation_space, action_space, agent_config, "cpu", config.seed)
        agent.load_state_dict(state)
        return Trained(str(path), source, content["step"], agent, config, options["env_id"])
