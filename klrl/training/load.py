"""Trained policies: from a run's folder or checkpoint to an agent, and environments to see it in."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from klrl.agents import registry
from klrl.agents.base import Agent
from klrl.envs.make import check_imported, import_packages, make_vector, module_of, registered
from klrl.errors import UsageError
from klrl.policies.networks import OwnNetwork
from klrl.policies.spaces import check_same_spaces
from klrl.rundir import checkpoint
from klrl.training.loop import Envs
from klrl.training.options import RunConfig
from klrl.training.run import config_of


@dataclass(frozen=True)
class LoadedPolicy:
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

    def make_envs(self, count: int, env: str = "", /, **kwargs: Any) -> Envs:
        """``count`` environments, but no more than the run had, with its arguments and ``kwargs``: its id, or ``env``.

        Raises UsageError for an id that is not known here, for one with other spaces than the agent's, and where the
        run's own environment takes packages that are not imported.
        """
        if not env:
            check_imported([*self.config.imports, module_of(self.env)], self.path)
        if not env and not registered(self.env):
            raise UsageError(
                f"{self.path} was trained on {self.env!r}, which is no env id here: name one, or --import its package"
            )
        name = env or self.env
        count = min(count, self.config.n_envs)
        envs = make_vector(name, count, replace(self.config.env, kwargs={**self.config.env.kwargs, **kwargs}))
        try:
            check_same_spaces(self.agent, envs, f"{self.path} was trained on {self.env}: {name}'s")
        except UsageError:
            envs.close()
            raise
        return envs


def load(
    path: str | Path,
    which: Literal["last", "best"] = "last",
    agent: type[Agent] | None = None,
    network: OwnNetwork | None = None,
    imports: Iterable[str] = (),
) -> Agent:
    """The agent of a run folder or checkpoint, or one that ``Agent.save`` wrote, with its normaliser, on the CPU.

    ``path`` may be "hf:user/name" or "hf:user/name@revision", which ``klrl push`` wrote to the Hugging Face Hub.

    ``agent``, ``network``: the class and network of a run that was given such, where they are not imported already;
    ``imports``: packages to import first, for those. What the run itself names is not imported.
    Raises UsageError where ``path`` is no such thing, or where a file is missing, truncated or altered.
    """
    return load_policy(path, which, imports, agent, network).agent


def load_policy(
    path: str | Path,
    which: str = "last",
    imports: Iterable[str] = (),
    agent: type[Agent] | None = None,
    network: OwnNetwork | None = None,
) -> LoadedPolicy:
    """The policy of a run folder or checkpoint, as ``load``, once ``imports`` are imported."""
    import_packages(imports)
    source, step, options, trained = registry.read(path, which, agent, network)
    with checkpoint.refusing_misfits(source):
        config, _ = config_of(type(trained), options)
        return LoadedPolicy(str(path), source, step, trained, config, options.get("env_id", ""))
