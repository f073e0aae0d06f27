"""The agents by the name that the command line gives them: klrl's own, installed packages', and imported ones."""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from pathlib import Path
from typing import Any, NamedTuple

from klrl.agents.base import Agent
from klrl.errors import UsageError
from klrl.policies.networks import OwnNetwork
from klrl.rundir import checkpoint
from klrl.spelling import suggest

BUILT_IN = {
    "ppo": "klrl.agents.ppo:PPO",
    "sac": "klrl.agents.sac:SAC",
    "trpo": "klrl.agents.trpo:TRPO",
    "student": "klrl.agents.student:Student",
}


def find(name: str, env: object = None) -> type[Agent]:
    """The agent class called ``name``: klrl's, an entry point of group "klrl.agents", or a class that was imported.

    A class is called as itself; capitals do not matter. Raises UsageError for a name that is unknown, or borne by two,
    and says so where ``env``, which was given beside it, is an agent's.
    """
    given, name = name, name.lower()
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Agent] = getattr(import_module(module), attribute)
        return found
    for entry in _installed():
        if entry.name.lower() == name:
            loaded: type[Agent] = entry.load()
            return loaded
    # By where they are defined: of a class that was defined again, as in a notebook's cell, the newest.
    known_as = {(c.__module__, c.__qualname__): c for c in _subclasses(Agent) if c.name().lower() == name}  # type: ignore[type-abstract]
    imported = list(known_as.values())
    if len(imported) == 1:
        return imported[0]
    if imported:
        modules = ", ".join(cls.__module__ for cls in imported)
        raise UsageError(f"agent {name!r} is in each of {modules}: rename one")
    if isinstance(env, str) and env.lower() in names():
        raise UsageError(f"the agent comes first, then the env: {env} {given}, not {given} {env}")
    known = ", ".join(names())
    near = suggest(name, [*names(), *(c.name() for c in _subclasses(Agent))])  # type: ignore[type-abstract]
    raise UsageError(f"unknown agent {given!r}{near}; known: {known}, and those that --import brings")


class SavedAgent(NamedTuple):
    """An agent as a checkpoint holds it."""

    source: Path
    """The checkpoint."""
    step: int
    options: dict[str, Any]
    """The run's, or the agent's alone where ``Agent.save`` wrote it."""
    agent: Agent


def read(
    path: str | Path, which: str = "last", agent: type[Agent] | None = None, network: OwnNetwork | None = None
) -> SavedAgent:
    """The agent of a run's folder or checkpoint, or one that ``Agent.save`` wrote, on the CPU.

    ``agent``, ``network``: the class and network of one that was given such, where they are not imported already.
    Raises UsageError where there is none, and where a file is damaged.
    """
    source, content = checkpoint.newest(Path(path), which)
    with checkpoint.refusing_misfits(source):
        options = content["state"]["options"]
        found = (agent or find(options["agent"])).from_state(content["state"], network=network)
        return SavedAgent(source, content["step"], options, found)


def names() -> list[str]:
    """The agents that are known without importing anything: klrl's and those of installed packages."""
    return [*BUILT_IN, *sorted(entry.name for entry in _installed())]


def _installed() -> list[EntryPoint]:
    """The entry points of installed packages; what lies in the current folder, which may be anyone's, is not."""
    here = Path.cwd()
    known = entry_points(group="klrl.agents")
    return [entry for entry in known if entry.dist is None or Path(str(entry.dist.locate_file(""))).resolve() != here]


def _subclasses(cls: type[Agent]) -> Iterator[type[Agent]]:
    for subclass in cls.__subclasses__():
        if not isabstract(subclass):
            yield subclass
        yield from _subclasses(subclass)
