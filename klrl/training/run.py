"""Training runs: begun or gone on with, from options to a folder that holds the run."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import isabstract
from pathlib import Path
from typing import Any

import gymnasium as gym
import tomli_w

from klrl.agents import registry
from klrl.agents.base import Agent, check_widths
from klrl.config import (
    build,
    convert,
    field_types,
    merge,
    option,
    option_names,
    refuse_idle,
    to_dict,
)
from klrl.console import rank, say
from klrl.envs.make import (
    EnvConfig,
    EnvFactory,
    check_imported,
    env_name,
    import_packages,
    make_vector,
    module_of,
    preset,
    registered,
    settled,
)
from klrl.envs.pixels import say_seen
from klrl.errors import Interrupted, UsageError
from klrl.kl import ALONE, Ranks
from klrl.policies import spaces
from klrl.policies.networks import OwnNetwork, name_of_network, named_network
from klrl.rundir import checkpoint
from klrl.rundir.folder import locked, make_folder, replace_file
from klrl.spelling import suggest
from klrl.training.callbacks import callbacks_of
from klrl.training.episodes import Episodes
from klrl.training.evaluation import summary
from klrl.training.launch import interrupted, joined, mark
from klrl.training.loop import Loop
from klrl.training.options import ResumeConfig, RunConfig
from klrl.training.process import gpu_pays, own_device, pick_device, process_settings
from klrl.training.randomness import random_state_kept, scatter_random_state
from klrl.training.result import Run as Run
from klrl.training.saving import of_rank, saved_processes
from klrl.training.start import form_of, start_from
from klrl.training.state import restore
from klrl.training.trackers import check_installed


def train(
    agent: str | type[Agent],
    env: str | EnvFactory,
    /,
    *,
    network: str | OwnNetwork | None = None,
    callbacks: Iterable[object] = (),
    **config: Any,
) -> Run:
    """Train ``agent`` ("ppo", or a subclass of klrl.Agent) on ``env`` and return the run.

    env: a Gymnasium id, or a function that returns a new environment. ``config``: the command line's options as
    keywords, groups as dicts: ``train("ppo", "CartPole-v1", n_envs=8, kl={"target": 0.02})``. An id's preset applies
    underneath them. ``network``: one's own, from inputs to features [B, F]: an nn.Module, or a class that is called
    with the observation space. ``callbacks``: objects with any of the methods of klrl.Callback; each rank has its own.

    Raises UsageError (a ValueError) for bad input, before anything is written, NonFiniteError where training met a nan
    or infinity; the run's checkpoints then stay; and what a callback raises, once the run is saved.
    """
    import_packages(convert(tuple[str, ...], config.get("imports", ()), "imports"))
    agent_class = registry.find(agent, env) if isinstance(agent, str) else agent
    if not (isinstance(agent_class, type) and issubclass(agent_class, Agent)) or isabstract(agent_class):
        raise UsageError(f"{agent!r} is no agent: train takes a name, or a subclass of klrl.Agent with all its methods")
    if agent_class.name() in registry.BUILT_IN and registry.find(agent_class.name()) is not agent_class:
        raise UsageError(f"the name {agent_class.name()!r} is of an agent of klrl's: call {agent!r} otherwise")
    if network is not None:
        config["network"] = network if isinstance(network, str) else name_of_network(network)
    run_config, agent_config = resolve(agent_class, env, config)
    module = None if isinstance(network, str) else network
    return run_training(agent_class, env, run_config, agent_config, module, callbacks)


def resolve(
    agent_class: type[Agent], env: str | EnvFactory | None, options: Mapping[str, Any]
) -> tuple[RunConfig, Any]:
    """Defaults, then the preset, then the form of the networks that a new run starts from, then ``options``: the run's
    config and the agent's."""
    config_class = agent_class.Config
    mine, theirs = field_types(RunConfig), field_types(config_class)
    flat = {} if env is None else preset(agent_class.name(), env)
    if env is not None and options.get("init_from"):
        form = form_of(convert(str, options["init_from"], "init_from"))
        flat = merge(flat, {key: value for key, value in form.items() if key in mine or key in theirs})
    flat = merge(flat, options)
    for key in flat:
        if key not in mine and key not in theirs:
            known = [*option_names(RunConfig), *option_names(config_class)]
            raise UsageError(f"unknown option {key!r}{suggest(key, known)}")
    run_config = build(RunConfig, {k: v for k, v in flat.items() if k in mine})
    return run_config, build(config_class, {k: v for k, v in flat.items() if k in theirs})


def resume(
    path: str | Path,
    env: EnvFactory | None = None,
    total_timesteps: int = 0,
    agent: type[Agent] | None = None,
    network: OwnNetwork | None = None,
    callbacks: Iterable[object] = (),
    **options: Any,
) -> Run:
    """Go on with the run in folder ``path``, in that folder, as if it had not stopped.

    From its newest whole checkpoint; rows logged after that are dropped. ``env``, ``agent``, ``network``: the factory,
    class and network of a run that was given such; ``callbacks``: as ``train``'s, of which a run keeps none.
    ``total_timesteps``: a new total, in place of the run's own; more than are done. ``options``: the command line's
    others, as keywords; the packages that the run names have to be among ``imports``, or imported already.

    A run that a callback stopped goes on towards its total; one that ``stop_at_return`` may have stopped, with another
    one. Raises UsageError without that, where packages are not imported, where the run is still running, where no
    checkpoint is whole, and where its steps are done.
    """
    given = build(ResumeConfig, {"total_timesteps": total_timesteps, **options})
    import_packages(given.imports)
    folder = Path(path).absolute()
    with joined() as ranks, contextlib.ExitStack() as stack:
        where, content = ranks.first(_saved(stack, folder) if ranks.rank == 0 else ("", {}))
        source = Path(where)
        with checkpoint.refusing_misfits(source):
            begun, state = content["state"]["options"], content["state"]["loop"]
            target, done = env or begun["env_id"], content["step"]
            check_imported([*begun["imports"], module_of(target) if isinstance(target, str) else ""], str(path))
            agent_class = agent or registry.find(begun["agent"])
            config, agent_config = config_of(agent_class, begun)
            check_widths(begun, content["state"]["agent"])
        if isinstance(target, str) and not registered(target):
            raise UsageError(f"{path} was trained on {target!r}, which is no env id here: give klrl.resume its factory")
        if total := given.total_timesteps:
            if total <= done:
                raise UsageError(f"--total-timesteps {total}: {path} has {done:,} steps already")
            config = replace(config, total_timesteps=total)
        config = replace(config, device=given.device or config.device, threads=given.threads or config.threads)
        if given.quiet or given.verbose:
            config = replace(config, quiet=given.quiet, verbose=given.verbose)
        had = saved_processes(content["state"])
        if ranks.size == 1 and rank() is None and (given.processes or had) > 1:
            raise UsageError(f"{path} has {had} ranks: klrl resume, or this by torchrun, or processes=1 for this alone")
        if state["complete"] and config.total_timesteps <= done:
            raise UsageError(f"{path} has its {config.total_timesteps:,} steps; --total-timesteps N trains it further")
        config = _past_its_stop(path, config, given, content["state"]["loop"])
        return _run(ranks, agent_class, target, config, agent_config, network, callbacks, folder, (source, content))


def _past_its_stop(path: str | Path, config: RunConfig, given: ResumeConfig, state: dict[str, Any]) -> RunConfig:
    """The config with which a run goes on; where a callback had stopped it, and it is to, that is struck off its state.

    One whose final evaluation was cut short only ends, unless it is asked to train on.
    """
    other = not math.isnan(given.stop_at_return)
    if state["progress"].get("stopped") and (state["complete"] or other or given.total_timesteps):
        if config.stop_at_return < math.inf and not other:
            raise UsageError(
                f"{path} stopped early, and has --stop-at-return {config.stop_at_return:g}: give another one, or inf"
            )
        state["progress"]["stopped"] = False
    return replace(config, stop_at_return=given.stop_at_return) if other else config


def processes_of(path: str | Path) -> int:
    """How many processes trained the run in a folder."""
    return saved_processes(checkpoint.newest(Path(path))[1]["state"])


def _saved(stack: contextlib.ExitStack, folder: Path) -> tuple[str, dict[str, Any]]:
    """The newest whole checkpoint in a run's folder, whose lock the stack then holds."""
    checkpoint.resolve(folder)
    if (folder / "manifest.json").exists():
        raise UsageError(f"resume takes a run's folder, not one of its checkpoints: {folder.parent.parent}")
    stack.enter_context(locked(folder))
    checkpoint.clean(folder / "checkpoints")
    source, content = checkpoint.newest(folder, with_rows=True)
    return str(source), content


def run_training(
    agent_class: type[Agent],
    env: str | EnvFactory,
    config: RunConfig,
    agent_config: Any,
    network: OwnNetwork | None = None,
    callbacks: Iterable[object] = (),
) -> Run:
    """Train in a new folder, with the ranks that this process was started as one of."""
    refuse_idle(agent_config)
    if math.isnan(config.stop_at_return):
        raise UsageError("--stop-at-return must be a number, or inf, got nan")
    if network is not None or config.network:
        usual = resolve(agent_class, env, {"init_from": config.init_from})[1]
        names = [name for name in agent_class.network_options if hasattr(usual, name)]
        unused = [name for name in names if getattr(agent_config, name) != getattr(usual, name)]
        if unused and getattr(agent_config, "critic", "point") == "point":
            raise UsageError(f"{option(unused[0])} does nothing beside --network, which has its own layers")
    with joined() as ranks:
        if config.processes > 1 and ranks.size == 1 and rank() is None:
            raise UsageError("processes: from Python, start the script by torchrun --nproc-per-node N")
        if before := ranks.first(interrupted(config.run_dir) if ranks.rank == 0 else ""):
            factory = env if callable(env) else None
            return resume(before, factory, 0, agent_class, network, callbacks, imports=config.imports)
        return _run(ranks, agent_class, env, config, agent_config, network, callbacks)


def _run(
    ranks: Ranks,
    agent_class: type[Agent],
    env: str | EnvFactory,
    config: RunConfig,
    agent_config: Any,
    network: OwnNetwork | None = None,
    callbacks: Iterable[object] = (),
    folder: Path | None = None,
    saved: tuple[Path, dict[str, Any]] | None = None,
) -> Run:
    """Train in a new folder, or go on in ``folder``, whose lock is held, from the checkpoint and content ``saved``."""
    if config.quiet and config.verbose:
        raise UsageError("--quiet and --verbose contradict each other: give one of them")
    callbacks = callbacks_of(callbacks, config)
    if saved is None:
        check_installed(config.log)
    name, here = agent_class.name(), Path.cwd()  # which an environment may leave
    if network is None and config.network:
        network = named_network(config.network)
    if config.env.action_masks == "auto" and not agent_class.takes_masks:
        config = replace(config, env=replace(config.env, action_masks="off"))
    if getattr(agent_config, "memory", "none") != "none" and "atari" in config.env.wrappers:
        advice = "take --env.wrappers grayscale resize:84 stack:4"
        raise UsageError(f"--memory goes without --env.wrappers atari, which learns from lives as episodes: {advice}")
    took = ranks.first(to_dict(settled(env, config.n_envs, config.env)) if ranks.rank == 0 else {})
    config = replace(config, env=build(EnvConfig, took), processes=ranks.size)  # a run says what it took
    device = pick_device(config.device, lambda: gpu_pays(shown_by(env, config.env), agent_config, config.n_envs))
    if device.startswith("cuda") and ranks.size > 1:
        device = own_device()
    # A resumed run keeps its name, whatever the factory that it is given is called.
    env_id = env_name(env) if saved is None else saved[1]["state"]["options"]["env_id"]
    try:
        options = {"agent": name, "env_id": env_id, **to_dict(config), **to_dict(agent_config)}
        toml = tomli_w.dumps(options)
        json.dumps(options)  # a checkpoint's form, which holds less
    except TypeError as problem:
        raise UsageError(f"--env.kwargs holds a value that a config file or checkpoint cannot: {problem}") from None
    episodes, positions = Episodes(config.n_envs), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept(config.seed))
        if saved is not None:
            with checkpoint.refusing_misfits(saved[0]):
                state = _own_loop(saved[1]["state"], ranks)
                shown = {key: part.numpy() for key, part in state["obs"].items()}
                keyed = isinstance(spaces.from_json(saved[1]["state"]["observation_space"]), gym.spaces.Dict)
                if saved_processes(saved[1]["state"]) == ranks.size:
                    positions = episodes.load_state_dict(state["episodes"], shown if keyed else shown[""])
                else:
                    episodes.count(state["episodes"], saved[1]["step"] if ranks.rank == 0 else 0)
        envs = stack.enter_context(contextlib.closing(make_vector(env, config.n_envs, config.env, positions)))
        stack.enter_context(process_settings(config))
        spaces.check_observation_space(envs.single_observation_space)
        spaces_of = _seen_before(envs.single_observation_space, saved), envs.single_action_space
        agent = agent_class(*spaces_of, agent_config, device, config.seed, network)
        if saved is None:
            agent.prepare()
        began = start_from(agent, config.init_from) if config.init_from and saved is None else None
        agent.join(ranks)
        stack.callback(agent.join, ALONE)  # whoever has it afterwards trains it without the others
        if ranks.rank:
            scatter_random_state(config.seed, ranks.rank)
        loop = Loop(agent, env, envs, episodes, config, options, ranks, callbacks)
        if saved is not None:
            with checkpoint.refusing_misfits(saved[0]):
                restore(loop, *saved)
        if folder is None:
            if ranks.rank == 0:
                folder = make_folder(config.run_dir, f"{name}-{env_id}-{config.seed}", here)
                stack.enter_context(locked(folder))
            folder = Path(ranks.first(str(folder)))
        if ranks.rank == 0:
            replace_file(folder / "config.toml", toml)
            mark(folder)
            if saved is None:
                say_seen(envs.single_observation_space, config.env.wrappers, env_id, config.quiet)
            if began is not None:
                replace_file(folder / "from.toml", tomli_w.dumps(began))
                if not config.quiet:
                    say(f"from        {began['run']}: {', '.join(began['taken'])}; anew: {', '.join(began['anew'])}")
        named = folder.relative_to(here) if folder.is_relative_to(here) else folder
        try:
            score = loop.run(folder)
        except Interrupted:
            if ranks.rank == 0:
                say(f"stopped after {loop.steps:,} steps; go on with: klrl resume {named}", "stderr")
            raise
    run = Run(agent, folder, env, config, score, loop.steps)
    if ranks.rank:
        return run
    if loop.stopped_by and not config.quiet:
        say(f"stopped     after {loop.steps:,} steps, by {loop.stopped_by}")
    if score.returns:
        say(f"evaluation  {summary(score)}")
    say(f"run         {named}")
    say(f"watch       tensorboard --logdir {config.run_dir}")
    return run


def _own_loop(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The saved loop that this rank goes on from: its own, or rank 0's where another number of ranks saved it."""
    loop: dict[str, Any] = of_rank(state, ranks.rank if saved_processes(state) == ranks.size else 0)["loop"]
    return loop


def _seen_before(space: gym.Space[Any], saved: tuple[Path, dict[str, Any]] | None) -> gym.Space[Any]:
    """The environment's observation space, as the run that is ``saved`` has it, which says what is an image to it."""
    before = space if saved is None else spaces.from_json(saved[1]["state"]["observation_space"])
    return before if before == space else space


def config_of(agent_class: type[Agent], options: Mapping[str, Any]) -> tuple[RunConfig, Any]:
    """The run's and the agent's config from the options in a checkpoint; one that says nothing of masks had none."""
    given = merge({"env": {"action_masks": "off"}}, options)
    return resolve(agent_class, None, {k: v for k, v in given.items() if k not in ("agent", "env_id")})


def shown_by(env: str | EnvFactory, config: EnvConfig) -> gym.Space[Any]:
    """The space of the environment's observations."""
    probe = make_vector(env, 1, config)
    probe.close()
    return probe.single_observation_space
