"""Environments in worker processes, several in each, which are supervised: one that dies or hangs is named."""

import atexit
import gc
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from klrl.console import warn
from klrl.envs.guards import CLOSE_SECONDS, each_line_once
from klrl.envs.sync import Sync
from klrl.envs.wrappers import LEARNED, RESTARTED, EpisodePosition, SeededEpisodes, as_learned
from klrl.errors import STOP_SIGNALS, EnvironmentFailedError, UsageError, one_line

T = TypeVar("T")
Maker = Callable[[], SeededEpisodes]
_REASONS = "klrl.reasons"


def make_seeded(
    factory: Callable[[], gym.Env[Any, Any]],
    index: int,
    on_error: str,
    position: EpisodePosition | None,
    hints: bool = False,
) -> SeededEpisodes:
    """Make a vector environment's ``index``-th environment, in a worker process or in this one."""
    return SeededEpisodes(make_one(factory, index), index, on_error, position, hints)


def make_one(factory: Callable[[], gym.Env[Any, Any]], index: int) -> gym.Env[Any, Any]:
    """Make an environment. Raises UsageError for what is none, and EnvironmentFailedError where it exits."""
    try:
        with each_line_once():
            env = factory()
    except SystemExit as problem:
        raise EnvironmentFailedError(f"env {index} failed as it was made: {one_line(problem)}") from None
    if not isinstance(env, gym.Env):
        raise UsageError(f"{factory} returned {env!r}, which is no gymnasium.Env")
    return env


class Share(gym.Env[Any, Any]):
    """A worker's share of the environments, k of them, as one environment whose observations, actions and all else have
    k rows; each resets itself, in NEXT_STEP mode."""

    def __init__(self, makers: Sequence[Maker], trainer: int) -> None:
        """``trainer``: the process that is no worker, which also makes one, to see its spaces."""
        if os.getpid() != trainer:
            gc.freeze()  # what the trainer left uncollected may hold threads, which only the trainer can join
            for signum in STOP_SIGNALS:  # a group's signal reaches all; the trainer decides when to end
                signal.signal(signum, signal.SIG_IGN)
        self.envs = Sync(makers, copy=False)
        self.observation_space, self.action_space = self.envs.observation_space, self.envs.action_space
        self.metadata = self.envs.metadata

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, _ = self.envs.reset(seed=seed, options=options)
        return obs, {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        *answer, info = self.envs.step(action)
        rows = np.flatnonzero(info[f"_{RESTARTED}"]) if RESTARTED in info else ()
        reasons = tuple((int(row), info[RESTARTED][row]) for row in rows)
        told: dict[str, Any] = {_REASONS: reasons} if reasons else {}
        if LEARNED in info:
            told[LEARNED] = np.stack(as_learned(answer[1], answer[2], info), axis=-1)
        return *answer, told

    def close(self) -> None:
        self.envs.close()


class Workers(VectorEnv[Any, Any, Any]):
    """Environments in processes, of which each steps as many as the others.

    Raises EnvironmentFailedError where a worker dies or hangs, and can then be closed.
    """

    def __init__(self, makers: Sequence[Maker], processes: int, timeout: float, replayed: int = 0) -> None:
        """``processes``: a divisor of the number of environments. ``timeout``: seconds that a step or reset of one may
        take; the first reset also replays ``replayed`` steps of each."""
        share = len(makers) // processes
        shares = [partial(Share, makers[i : i + share], os.getpid()) for i in range(0, len(makers), share)]
        # The workers reset their own; what AsyncVectorEnv has seen end is no single environment.
        self.workers = AsyncVectorEnv(shares, autoreset_mode=AutoresetMode.DISABLED)
        self.num_envs, self.share, self.timeout, self.replayed = len(makers), share, timeout * share, replayed
        self.failed = False
        one = makers[0]()
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        one.close()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**self.workers.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        _open.add(self)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        timeout, self.replayed = self.timeout * (1 + self.replayed), 0
        seeds: Any = None if seed is None else [seed + i for i in range(0, self.num_envs, self.share)]
        begin = partial(self.workers.reset_async, seed=seeds, options=options)
        obs, _ = self._watch(begin, lambda: self.workers.reset_wait(timeout))
        return self._flat(obs), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        shared = np.asarray(actions).reshape(len(self.workers.processes), self.share, *np.shape(actions)[1:])
        begin = partial(self.workers.step_async, shared)
        obs, reward, terminated, truncated, info = self._watch(begin, lambda: self.workers.step_wait(self.timeout))
        told = self._reasons(info)
        if LEARNED in info:
            told |= {LEARNED: info[LEARNED].reshape(-1, 2), f"_{LEARNED}": info[f"_{LEARNED}"].repeat(self.share)}
        return self._flat(obs), reward.reshape(-1), terminated.reshape(-1), truncated.reshape(-1), told

    def _flat(self, obs: Any) -> Any:
        """Observations [P, k, ...] as [N, ...]."""
        if isinstance(obs, dict):
            return {key: self._flat(part) for key, part in obs.items()}
        return obs.reshape(self.num_envs, *obs.shape[2:])

    def _reasons(self, info: dict[str, Any]) -> dict[str, Any]:
        if _REASONS not in info:
            return {}
        reasons = np.full(self.num_envs, None, object)
        for worker in np.flatnonzero(info[f"_{_REASONS}"]):
            for row, reason in info[_REASONS][worker]:
                reasons[worker * self.share + row] = reason
        return {RESTARTED: reasons, f"_{RESTARTED}": reasons != None}  # noqa: E711 (of each element)

    def _named(self, workers: Sequence[int]) -> str:
        """The environments of workers, by number."""
        first = [worker * self.share for worker in workers]
        return ", ".join(f"{i}" if self.share == 1 else f"{i} to {i + self.share - 1}" for i in first)

    def _watch(self, send: Callable[[], None], wait: Callable[[], T]) -> T:
        level = gym.logger.min_level
        gym.logger.min_level = gym.logger.ERROR + 1  # it would print the worker's traceback
        self.failed = True
        try:
            send()
            answer = wait()
            self.failed = False
            return answer
        except multiprocessing.TimeoutError:
            slow = [i for i, pipe in enumerate(self.workers.parent_pipes) if not pipe.poll(0)]
            raise EnvironmentFailedError(
                f"env {self._named(slow)} gave no answer for {self.timeout:g} s (--env.timeout)"
            ) from None
        except (EOFError, OSError):
            processes = self.workers.processes
            for process in processes:  # the one that ended may take a moment to be seen as such
                if not process.is_alive():
                    break
                process.join(1.0 / self.num_envs)
            dead = [f"{self._named([i])} (exit code {p.exitcode})" for i, p in enumerate(processes) if not p.is_alive()]
            raise EnvironmentFailedError(f"the worker of env {', '.join(dead) or '?'} died") from None
        finally:
            gym.logger.min_level = level

    def close(self, **kwargs: Any) -> None:
        """Ask the workers to end, and kill those that don't, which is said unless one has failed before."""
        processes = self.workers.processes
        pipes = [pipe for pipe in self.workers.parent_pipes if pipe is not None and not pipe.closed]
        for pipe in pipes:
            try:
                pipe.send(("close", None))
            except OSError:
                continue
        # They limit themselves, too: each environment's close by itself.
        deadline = time.monotonic() + (1.0 if self.failed else self.share * CLOSE_SECONDS + 1.0)
        for i, process in enumerate(processes):
            process.join(max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                if not self.failed:
                    warn(f"env {self._named([i])} did not close: its worker was killed")
            process.join()
        _open.discard(self)
        for pipe in pipes:
            pipe.close()
        self.workers.parent_pipes = [None] * len(processes)  # type: ignore[list-item]
        self.workers.closed = self.closed = True

    def __del__(self) -> None:  # before AsyncVectorEnv's, whose signal the workers ignore
        if "workers" in vars(self) and not self.workers.closed:
            self.close()


# Those that nobody closed are closed when the interpreter exits, before multiprocessing waits for workers that ignore
# the signal with which it ends them: what is registered last runs first, and gymnasium.vector imported multiprocessing.
_open: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for envs in list(_open):
        envs.close()
