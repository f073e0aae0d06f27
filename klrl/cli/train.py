"""The commands that begin a run, whose options depend on its agent and env: ``klrl train`` and ``klrl distill``."""

import argparse
import tomllib
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from klrl.agents import registry
from klrl.agents.student import Student
from klrl.cli.options import parse, wants_help
from klrl.config import convert, merge, option
from klrl.console import rank
from klrl.envs.make import check, check_imported, import_module, import_packages, module_of
from klrl.envs.pixels import modules_of
from klrl.errors import UsageError, refusals
from klrl.policies.own import OPTIONS, names_in
from klrl.training.distill import DEFAULTS, say_sizes, taught_by
from klrl.training.launch import launch
from klrl.training.options import RayConfig, RunConfig
from klrl.training.run import resolve, run_training


def train(arguments: list[str]) -> None:
    """The command ``klrl train``."""
    help_wanted = wants_help(arguments)
    if help_wanted and (not arguments or arguments[0].startswith("-")):
        arguments = [registry.names()[0], *arguments]
    names = [word for word in arguments[:2] if not word.startswith("-")]
    if not names or (len(names) < 2 and not help_wanted):
        raise UsageError("train needs an agent and an env: klrl train ppo CartPole-v1")
    agent, env, options = names[0], (names[1] if len(names) == 2 else None), arguments[len(names) :]
    about = f"Agents: {', '.join(registry.names())}, and those that --import brings. These are the options of {agent}."
    _begin(["train", *arguments], agent, env, options, {}, f"klrl train {agent} {env or 'ENV'}", about)


def distill(arguments: list[str]) -> None:
    """The command ``klrl distill``."""
    runs = list(takewhile(lambda word: not word.startswith("-"), arguments))
    options, of_help = arguments[len(runs) :], wants_help(arguments) and not runs
    if runs and "--teachers" in options:
        raise UsageError("distill takes its teachers before the options: klrl distill RUN RUN, without --teachers")
    env, taken = (None, DEFAULTS) if of_help else taught_by(runs, _early(options)["--import"])
    about = "Train a student to act as trained agents do, in the environment of the first."
    run = _begin(["distill", *arguments], Student.name(), env, options, taken, "klrl distill RUN...", about)
    if run is not None and not run.config.quiet:
        say_sizes(run)


def _early(options: list[str]) -> dict[str, list[str]]:
    """The options that tyro's defaults depend on, each with what is given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--import", "--from", *map(option, OPTIONS)):
        spellings = {name, f"--{name[2:].replace('-', '_')}"}
        early.add_argument(*spellings, dest=name, nargs="?", action="append", default=[])
    early.add_argument("--env.wrappers", dest="--env.wrappers", nargs="*", action="extend", default=[])
    return {name: [word for word in words if word] for name, words in vars(early.parse_known_args(options)[0]).items()}


def _begin(
    command: list[str], agent: str, env: str | None, options: list[str], taken: dict[str, Any], usage: str, about: str
) -> Any:
    """Train with ``options``, whose defaults are ``taken`` where the config file says nothing; the run, where it is
    this process's."""
    found = _early(options)
    saved = merge(taken, _read_config(found["--config"][-1], agent) if found["--config"] else {})
    if found["--from"]:
        saved["init_from"] = found["--from"][-1]
    import_packages(found["--import"])
    for path in OPTIONS:
        for name in filter(module_of, found[option(path)]):
            import_module(module_of(name), f"{option(path)} {name}")
    for module in modules_of(found["--env.wrappers"]):
        import_module(module, "--env.wrappers")
    wanted = convert(tuple[str, ...], saved.pop("imports", ()), "imports")
    named = [name for path, name in names_in(saved).items() if not found[option(path)]]
    check_imported([*wanted, *map(module_of, named)], "".join(found["--config"][-1:]))
    agent_class = registry.find(agent, env)
    config_class = agent_class.Config
    run_config, agent_config = resolve(agent_class, env, saved)
    if env is not None:
        check(env)

    @dataclass(frozen=True)
    class TrainOptions:  # made here, because the agent decides the options and the preset their defaults
        config: Annotated[str, tyro.conf.arg(help="TOML file of options, such as a run's config.toml.")] = ""
        on: Literal["here", "ray"] = "here"
        """Start the processes on this machine, or as workers of Ray (the extra ray)."""
        ray: RayConfig = field(default_factory=RayConfig)
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = run_config
        agent: Annotated[config_class, tyro.conf.arg(name="")] = agent_config  # type: ignore[valid-type]

    given = parse(TrainOptions, options, usage, about)
    if given.on == "ray":
        from klrl.training.on_ray import train_on_ray

        train_on_ray(agent, env or "", given.run, given.agent, given.ray)
        return None
    if given.run.processes > 1 and rank() is None:
        launch(command, given.run.processes)
    return run_training(agent_class, env or "", given.run, given.agent)


def _read_config(path: str, agent: str) -> dict[str, Any]:
    with refusals(f"--config {path}"):
        content = Path(path).read_bytes()
    try:
        options = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"--config {path} is not valid TOML: {problem}") from None
    if str(options.pop("agent", agent)).lower() != agent.lower():
        raise UsageError(f"--config {path} is of another agent than {agent!r}")
    options.pop("env_id", None)
    return options
