"""Vector environments from an environment's id or factory, and the presets of ids."""

import importlib
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import resources
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro
from gymnasium import error
from gymnasium.vector import VectorEnv

import klrl.envs  # registers the probes
from klrl.config import Checked, Range, cores
from klrl.envs.guards import FAILURES, each_line_once
from klrl.envs.masks import masking, offers_masks
from klrl.envs.pixels import named_wrappers, wrapped
from klrl.envs.pool import Pool
from klrl.envs.sync import Sync
from klrl.envs.workers import Workers, make_one, make_seeded
from klrl.envs.wrappers import EpisodePosition, NamedFaults, SeededEpisodes, close_or_warn, next_step
from klrl.errors import UsageError, needs, one_line
from klrl.policies.spaces import check_observation_space
from klrl.spelling import suggest

_MOST_WORKERS = 512
EnvFactory = Callable[[], gym.Env[Any, Any]]
# An option of every command that makes environments; the words are its help.
Imports = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,  # one name each time, so that it does not take a run's folder after it for another
    tyro.conf.arg(
        name="import",
        metavar="PACKAGE",
        help="A package to import first, for what it registers and defines; give the option once for each.",
    ),
]


@dataclass(frozen=True)
class EnvConfig(Checked):
    group = "env."

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the environment, as name=value pairs: --env.kwargs continuous=true gravity=-8."""
    wrappers: tuple[str, ...] = ()
    """Wrappers of each environment, the innermost first: atari (the usual preprocessing), grayscale, resize:84, stack:4
    or module:Wrapper."""
    vectorization: Literal["auto", "sync", "async", "vector", "envpool"] = "sync"
    """Step the environments in this process, in worker processes (pays off where a step takes a millisecond), whichever
    of these is faster (auto), as the vector environment that the id itself offers, or as EnvPool's. A run on the last
    two is not resumed bit for bit: its open episodes begin anew."""
    workers: Annotated[int, Range(0, _MOST_WORKERS)] = 0
    """Worker processes of async, each with as many environments; 0: at least as many as there are cores."""
    on_error: Literal["raise", "restart"] = "raise"
    """What an exception or a wrong answer of an environment's step does: end the run, or truncate that episode."""
    action_masks: Literal["auto", "on", "off"] = "auto"
    """Let policies take only the actions that an environment allows, by its method action_masks() or its infos'
    action_mask. auto: where it has one of these, but of what a function makes, only the method, and not for agents that
    cannot, such as SAC. What observations show as action_mask is obeyed in any case."""
    timeout: Annotated[float, Range(0, 1e6, above=True)] = 60.0
    """Seconds that a step or reset may take in a process of its own."""


def make_vector(
    env: str | EnvFactory, n_envs: int, config: EnvConfig, positions: Sequence[EpisodePosition] = ()
) -> VectorEnv[Any, Any, Any]:
    """``n_envs`` copies of ``env`` as one vector environment in NEXT_STEP autoreset mode.

    env: a Gymnasium id (also "module:Env-v0"), or a function that returns a new environment. positions: where the
    first ``reset`` leads, one for each copy; an id that offers only a vector environment of its own starts over.
    Raises UsageError for an unknown id, a missing extra or arguments that the environment refuses.
    """
    config, hints = settled(env, n_envs, config), False
    wraps = named_wrappers(config.wrappers)
    if wraps and config.vectorization in ("vector", "envpool"):
        way = f"--env.vectorization {config.vectorization}"
        raise UsageError(f"--env.wrappers wraps single environments, which {way} has not: use sync or async")
    if isinstance(env, str):
        check(env)
        if config.action_masks == "on" and not _comes_apart(env, config):
            raise UsageError("--env.action-masks on goes with --env.vectorization sync and async")
        if _spec(env).entry_point is None or config.vectorization == "vector":
            if wraps:
                raise UsageError(f"--env.wrappers wraps single environments, and {env} offers only a vector of them")
            if _spec(env).vector_entry_point is None:
                raise UsageError(f"--env.vectorization vector: {env} offers no vector environment of its own; use sync")
            making: Any = partial(gym.make_vec, env, n_envs, vectorization_mode="vector_entry_point", **config.kwargs)
            return next_step(NamedFaults(_guard(env, config.kwargs, making), env), env)
        if config.vectorization == "envpool":
            making = partial(Pool, env.rpartition(":")[2], n_envs, **config.kwargs)
            return NamedFaults(_guard(env, config.kwargs, making), env)
        factory = _factory(env, config)
        # One environment made here turns what a worker process would bury into one line.
        SeededEpisodes(_guard(env, config.kwargs, factory, config.wrappers), 0).close()
    else:
        if not callable(env):
            raise UsageError(
                f"an env is an id, or a function that returns a new environment, not {env}: where that is one "
                "environment, give what makes it, as in lambda: gym.make(...)"
            )
        if config.vectorization in ("vector", "envpool"):
            raise UsageError(f"--env.vectorization {config.vectorization} goes with an env id, not with a factory")
        if config.kwargs:
            raise UsageError("--env.kwargs goes with an env id; give a factory its arguments yourself")
        hints = config.action_masks == "auto"
        factory, config = _asked(partial(wrapped, env, wraps) if wraps else env, config)
    if config.action_masks == "on":
        factory = partial(masking, factory)
    makers = [
        partial(make_seeded, factory, index, config.on_error, position, hints and index == 0)
        for index, position in enumerate(positions or [None] * n_envs)
    ]
    if config.vectorization == "sync":
        return next_step(Sync(makers), env_name(env))
    longest = max((len(position.actions) for position in positions), default=0)
    return Workers(makers, worker_count(n_envs, config.workers), config.timeout, longest)


def settled(env: str | EnvFactory, n_envs: int, config: EnvConfig) -> EnvConfig:
    """The config with ``auto`` replaced: by whether an id's environments offer action masks, and by what steps the
    environments faster: this process, or workers."""
    if config.action_masks == "auto" and isinstance(env, str):
        config = replace(config, action_masks="on" if _offers_masks(env, config) else "off")
    if config.vectorization != "auto":
        return config
    ways = [replace(config, vectorization=way) for way in ("sync", "async")]
    if n_envs == 1 or cores() == 1:
        return ways[0]
    try:
        worker_count(n_envs, config.workers)
    except UsageError:
        return ways[0]
    seconds = []
    for way in ways:
        with closing(make_vector(env, n_envs, way)) as envs:
            if not can_replay(envs):  # such as klrl's own in torch, which are stepped in one way only
                return ways[0]
            seconds.append(_seconds_a_step(envs))
    return ways[0] if seconds[0] <= seconds[1] else ways[1]


def _factory(env: str, config: EnvConfig) -> EnvFactory:
    """What makes one of an id's environments, in the wrappers that the config names."""
    factory, wraps = partial(gym.make, env, **env_arguments(env, config)), named_wrappers(config.wrappers)
    return partial(wrapped, factory, wraps) if wraps else factory


def _offers_masks(env: str, config: EnvConfig) -> bool:
    """Whether an id's environments offer action masks, as far as one can be made; if not, ``make_vector`` says why."""
    if not registered(env) or not _comes_apart(env, config):
        return False
    try:
        with closing(SeededEpisodes(_guard(env, config.kwargs, _factory(env, config), config.wrappers), 0)) as one:
            check_observation_space(one.env.observation_space)  # of others, not even a reset is wanted
            return offers_masks(one.env, config.timeout)
    except UsageError:
        return False


def _asked(factory: EnvFactory, config: EnvConfig) -> tuple[EnvFactory, EnvConfig]:
    """The factory and the config once it is known whether the environments offer action masks by a method.

    In this process the one that was asked is the first that the result makes, as some tasks allow no second one. It is
    not reset, which some environments count.
    """
    if config.action_masks != "auto":
        return factory, config
    made = [make_one(factory, 0)]
    config = replace(config, action_masks="on" if offers_masks(made[0]) else "off")
    if config.vectorization == "sync":
        return lambda: made.pop() if made else factory(), config
    close_or_warn(made[0], 0)
    return factory, config


def _comes_apart(env: str, config: EnvConfig) -> bool:
    """Whether an id's environments are made one by one, and not as one vector environment."""
    return _spec(env).entry_point is not None and config.vectorization not in ("vector", "envpool")


def _seconds_a_step(envs: VectorEnv[Any, Any, Any]) -> float:
    """The median time of a step with random actions, over 300 steps or a second, whichever is shorter."""
    envs.reset(seed=0)
    envs.action_space.seed(0)
    seconds: list[float] = []
    while len(seconds) < 300 and sum(seconds) < 1.0:
        action, begun = envs.action_space.sample(), time.perf_counter()
        envs.step(action)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def worker_count(n_envs: int, wanted: int) -> int:
    """The number of worker processes: the smallest that is at least ``wanted``, or the cores, and divides ``n_envs``.

    Raises UsageError where that is too many.
    """
    least = min(wanted or cores(), n_envs)
    count = next(i for i in range(least, n_envs + 1) if n_envs % i == 0)
    if count > _MOST_WORKERS:
        raise UsageError(
            f"--env.vectorization async: {n_envs:,} environments make {count:,} processes, of at most {_MOST_WORKERS}: "
            "take a number of them that has a divisor near the cores'"
        )
    return count


def can_replay(envs: VectorEnv[Any, Any, Any]) -> bool:
    """Whether episodes of ``make_vector``'s environments can be had again: each was made and seeded by itself."""
    return isinstance(envs.unwrapped, Sync | Workers)


def env_name(env: str | EnvFactory) -> str:
    """The environment's name in folder names and checkpoints."""
    return env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__).strip("<>")


def check(env_id: str) -> None:
    """Raise UsageError unless ``env_id`` is registered, or can be once its module is imported."""
    module = module_of(env_id)
    if module or env_id.startswith(":"):
        import_module(module, f"env {env_id!r}")
    if env_id.startswith("ALE/"):
        with needs("atari", "ale_py"):
            import ale_py
        gym.register_envs(ale_py)
    try:
        _spec(env_id)
    except error.DeprecatedEnv as problem:
        raise UsageError(f"env {env_id!r} is out of date: {problem}") from None
    except error.Error:
        known = suggest(env_id, gym.registry)
        raise UsageError(f"unknown env {env_id!r}{known}; --import PACKAGE registers a package's envs") from None


def registered(env_id: str) -> bool:
    """Whether Gymnasium knows the id, its module imported where it names one."""
    try:
        check(env_id)
    except UsageError:
        return False
    return True


def import_packages(names: Iterable[str]) -> None:
    """Import what --import names. Raises UsageError where that fails."""
    for name in names:
        import_module(name, f"--import {name}")


def import_module(name: str, wanted_by: str) -> None:
    """Import a module for the environments it registers. Raises UsageError where that fails, naming ``wanted_by``."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as problem:
        raise UsageError(f"{wanted_by}: no module named {problem.name!r} is installed") from None
    except FAILURES as problem:
        raise UsageError(f"{wanted_by}: importing {name!r} failed: {one_line(problem)}") from None


def module_of(name: str) -> str:
    """The module that an env id or network of the form ``module:Name`` takes; "" where it takes none."""
    return name.rpartition(":")[0]


def check_imported(modules: Iterable[str], source: str) -> None:
    """Raise UsageError, with the option that helps, unless all ``modules`` that a file names are imported already.

    Whoever wrote a run's folder or a config file could have any code run, were it imported because the file says so.
    """
    for module in modules:
        if module and module not in sys.modules:
            raise UsageError(
                f"{source} takes code from {module!r}, which is imported only where you name it: --import {module}, "
                "if you trust it"
            )


def _spec(env_id: str) -> Any:
    return gym.spec(env_id.rpartition(":")[2])


def env_arguments(env_id: str, config: EnvConfig) -> dict[str, Any]:
    """The environment's arguments: with ``atari``, which skips frames itself and looks at the screen itself, one of
    ALE's has to skip none, and need not colour any."""
    ale = "atari" in config.wrappers and str(_spec(env_id).entry_point).startswith("ale_py")
    return {"frameskip": 1, "obs_type": "grayscale", **config.kwargs} if ale else config.kwargs


def _guard(env_id: str, kwargs: dict[str, Any], make: Callable[[], Any], wrappers: Sequence[str] = ()) -> Any:
    try:
        with each_line_once():
            return make()
    except (error.DependencyNotInstalled, ImportError) as problem:
        if "opencv" in str(problem):
            raise UsageError(f"--env.wrappers {' '.join(wrappers)} needs an extra: pip install 'klrl[atari]'") from None
        for extra in ("mujoco", "box2d"):
            if isinstance(problem, error.DependencyNotInstalled) and extra in str(_spec(env_id).entry_point):
                raise UsageError(f"env {env_id!r} needs an extra: pip install 'klrl[{extra}]'") from None
        raise UsageError(f"env {env_id!r} needs a package that is not installed: {one_line(problem)}") from None
    except UsageError:
        raise
    except FAILURES as problem:
        blamed = f"--env.kwargs {kwargs} does not fit {env_id}" if kwargs else f"env {env_id!r} cannot be made"
        blamed += f" with --env.wrappers {' '.join(wrappers)}" if wrappers else ""
        raise UsageError(f"{blamed}: {one_line(problem)}") from None


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Every preset by env id, or by the namespace of ids: a table per agent with "config", "source" and what was
    "measured", if anything was.

    There may be "scores", too: what was measured with other rules, by what these are to be called.
    """
    folder = resources.files(klrl.envs) / "presets"
    found = [(f.name, f) for f in folder.iterdir()] + [(f"klrl/{f.name}", f) for f in (folder / "klrl").iterdir()]
    return {n[:-5]: tomllib.loads(f.read_text()) for n, f in sorted(found, key=lambda x: x[0]) if n.endswith(".toml")}


def preset(agent: str, env: str | EnvFactory) -> dict[str, Any]:
    """The options that suit ``agent`` on ``env``, by its id or else its namespace; empty where there is no preset, so
    that the defaults hold."""
    if not isinstance(env, str):
        return {}
    env_id = env.rpartition(":")[2]
    found = presets().get(env_id) or presets().get(env_id.partition("/")[0], {})
    return found.get(agent, {}).get("config", {})
