"""Students: from trained runs to a run that learns to act as they do, in the environment of the first."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from klrl.agents.student import Student, family_of
from klrl.config import convert, merge, to_dict
from klrl.console import rank, say
from klrl.envs.make import EnvFactory, check_imported, import_packages, module_of, registered
from klrl.errors import UsageError
from klrl.policies.networks import OwnNetwork
from klrl.training.load import load_policy
from klrl.training.run import Run, train

DEFAULTS = {"total_timesteps": 200_000}
"""A student's options that are other than a run's."""


def distill(
    *teachers: str | Path,
    env: EnvFactory | None = None,
    network: str | OwnNetwork | None = None,
    **config: Any,
) -> Run:
    """Train a student of runs or checkpoints, and return its run: ``distill(run.folder, hidden_sizes=(16, 16))``.

    ``env``: the factory of a first run that was given such. ``network``, ``config``: as ``train``'s. Raises UsageError
    for bad input, before anything is written.
    """
    imports = convert(tuple[str, ...], config.get("imports", ()), "imports")
    env_id, taken = taught_by(list(map(str, teachers)), imports, anywhere=env is not None)
    run = train(Student, env or env_id, network=network, **merge(taken, config))
    if not run.config.quiet:
        say_sizes(run)
    return run


def taught_by(teachers: list[str], imports: Iterable[str] = (), anywhere: bool = False) -> tuple[str, dict[str, Any]]:
    """The environment in which a student of runs or checkpoints learns, and its options: as the first teacher has them.

    ``imports``: packages to import first. Raises UsageError where there is no teacher, where the first's environment
    takes packages that are not imported, and, but for ``anywhere``, where its id is not known here.
    """
    if not teachers:
        raise UsageError("distill needs a run folder or checkpoint: klrl distill runs/ppo-CartPole-v1-0-...")
    import_packages(imports)
    first = load_policy(teachers[0])
    config, agent = first.config, first.agent
    check_imported(config.imports, teachers[0])  # which would be imported otherwise because a file says so
    if not anywhere:
        check_imported([module_of(first.env)], teachers[0])
        if not registered(first.env):
            raise UsageError(
                f"{teachers[0]} was trained on {first.env!r}, which is no env id here: --import its package"
            )
    options = {
        "teachers": teachers,
        "head": family_of(agent.policy.head),
        "normalize_observation": agent.encoder.normalize,
        "gamma": getattr(agent.config, "gamma", Student.Config.gamma),
        **DEFAULTS,
        "n_envs": config.n_envs,
        "imports": config.imports,
        "env": to_dict(config.env),
    }
    return first.env, options


def say_sizes(run: Run) -> None:
    """Print how large a student's policy is beside its largest teacher's."""
    if rank():
        return
    assert isinstance(run.agent, Student)
    mine, *theirs = (
        sum(weights.numel() for weights in agent.policy.parameters())
        for agent in (run.agent, *(teacher.agent for teacher in run.agent.teachers))
    )
    say(f"weights     {mine:,} of the teacher's {max(theirs):,} ({mine / max(theirs):.1%})")
