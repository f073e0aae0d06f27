"""Environment wrappers: episodes that can be replayed, supervised workers, and NEXT_STEP autoreset for all."""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv, VectorWrapper

from klrl.errors import STOP_SIGNALS, EnvironmentFailedError, UsageError, one_line
from klrl.policies.encoder import replace_rows

T = TypeVar("T")


@dataclass(frozen=True)
class EpisodePosition:
    """An environment's episode by number, the actions taken in it so far, and the last observation."""

    episode: int
    actions: Any
    """[T, *action shape]: those taken in this episode."""
    obs: Any
    ended: bool
    """Whether the last action ended the episode, so that the next step only resets."""


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that seeds each episode from ``reset``'s seed, this environment's index and the episode's number.

    An environment therefore has no state to save: its ``EpisodePosition`` brings it back. The first ``reset`` replays
    ``position``. Where the replay ends at another observation, and where a step fails under ``on_error`` "restart",
    the episode is truncated at the last observation, and "restarted" in the info says why.
    """

    def __init__(
        self, env: gym.Env[Any, Any], index: int, on_error: str = "raise", position: EpisodePosition | None = None
    ) -> None:
        super().__init__(env)
        self.index, self.on_error, self.position = index, on_error, position
        self.seed, self.episode, self.steps = 0, 0, 0
        self.obs: Any = None
        self.next: Callable[[], tuple[Any, float, bool, bool, dict[str, Any]]] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode; with a seed, the first one, or the one at ``position``."""
        position, self.position, self.next, self.steps = self.position, None, None, 0
        if seed is None:
            self.episode += 1
        else:
            self.seed, self.episode = seed, position.episode if position else 0
        words = np.random.SeedSequence([self.seed, self.index, self.episode]).generate_state(1)
        try:
            self.obs, info = self.env.reset(seed=int(words[0]), options=options)
        except Exception as problem:
            raise self._failure(problem, "reset") from None
        if position is not None:
            self._replay(position)
        return self.obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.next is not None:
            special, self.next = self.next, None
            return special()
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as problem:
            failure = self._failure(problem, f"step {self.steps + 1}")
            if self.on_error == "raise":
                raise failure from None
            return self._truncate(str(failure))
        self.obs = obs
        self.steps += 1
        return obs, reward, terminated, truncated, info  # type: ignore[return-value]

    def _replay(self, position: EpisodePosition) -> None:
        ended = False
        try:
            for action in position.actions:
                self.obs, _, terminated, truncated, _ = self.env.step(action)
                ended = terminated or truncated
                self.steps += 1
            same = ended == position.ended and _same(self.obs, position.obs)
        except Exception:
            same = False
        self.obs = position.obs
        if position.ended:
            self.next = self._reset_row
        elif not same:
            self.next = lambda: self._truncate(f"env {self.index}: episode {self.episode} cannot be replayed")

    def _reset_row(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, info = self.reset()
        return obs, 0.0, False, False, info

    def _truncate(self, why: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.obs, 0.0, False, True, {"restarted": why}

    def _failure(self, problem: Exception, where: str) -> EnvironmentFailedError:
        what = f"env {self.index} failed at {where} of episode {self.episode}"
        return EnvironmentFailedError(f"{what}: {one_line(problem)}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return all(_same(a[key], part) for key, part in b.items())
    expected = np.asarray(b)
    shown = np.asarray(a).astype(expected.dtype)  # an environment may show float64 where its space says float32
    return np.array_equal(shown, expected, equal_nan=np.issubdtype(expected.dtype, np.inexact))


class WatchedWorkers(VectorWrapper):
    """An AsyncVectorEnv that raises EnvironmentFailedError where a worker dies or hangs, and can then be closed."""

    def __init__(self, env: AsyncVectorEnv, timeout: float, replayed: int = 0) -> None:
        """``timeout``: seconds that a step or reset may take; the first reset also replays ``replayed`` steps."""
        super().__init__(env)
        self.workers, self.timeout, self.replayed = env, timeout, replayed
        _open.add(self)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        timeout, self.replayed = self.timeout * (1 + self.replayed), 0
        return self._watch(lambda: self.workers.reset_async(**kwargs), lambda: self.workers.reset_wait(timeout))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self._watch(lambda: self.workers.step_async(actions), lambda: self.workers.step_wait(self.timeout))

    def _watch(self, send: Callable[[], None], wait: Callable[[], T]) -> T:
        level = gym.logger.min_level
        gym.logger.min_level = gym.logger.ERROR + 1  # it would print the worker's traceback
        try:
            send()
            return wait()
        except multiprocessing.TimeoutError:
            slow = [i for i, pipe in enumerate(self.workers.parent_pipes) if not pipe.poll(0)]
            raise EnvironmentFailedError(
                f"env {', '.join(map(str, slow))} gave no answer for {self.timeout:g} s (--env.timeout)"
            ) from None
        except (EOFError, OSError):
            processes = self.workers.processes
            for process in processes:  # the one that ended may take a moment to be seen as such
                if not process.is_alive():
                    break
                process.join(1.0 / self.num_envs)
            dead = [f"{i} (exit code {p.exitcode})" for i, p in enumerate(processes) if not p.is_alive()]
            raise EnvironmentFailedError(f"the worker of env {', '.join(dead) or '?'} died") from None
        finally:
            gym.logger.min_level = level

    def close(self, **kwargs: Any) -> None:
        """Ask the workers to end, and kill those that don't."""
        processes = self.workers.processes
        pipes = [pipe for pipe in self.workers.parent_pipes if pipe is not None and not pipe.closed]
        for pipe in pipes:
            try:
                pipe.send(("close", None))
            except OSError:
                continue
        for process in processes:
            process.join(1.0 / len(processes))
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        _open.discard(self)
        for pipe in pipes:
            pipe.close()
        self.workers.parent_pipes = [None] * len(processes)  # type: ignore[list-item]
        self.workers.closed = True

    def __del__(self) -> None:  # before AsyncVectorEnv's, whose signal the workers ignore
        if "workers" in vars(self) and not self.workers.closed:
            self.close()


# Those that nobody closed are closed when the interpreter exits, before multiprocessing waits for workers that ignore
# the signal with which it ends them: what is registered last runs first, and gymnasium.vector imported multiprocessing.
_open: weakref.WeakSet[WatchedWorkers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for envs in list(_open):
        envs.close()


def make_seeded(
    factory: Callable[[], gym.Env[Any, Any]], index: int, on_error: str, position: EpisodePosition | None
) -> SeededEpisodes:
    """Make a vector environment's ``index``-th environment, in a worker process or in this one."""
    if multiprocessing.parent_process() is not None:
        for signum in STOP_SIGNALS:  # a group's signal reaches all; the trainer decides when to end
            signal.signal(signum, signal.SIG_IGN)
    return SeededEpisodes(factory(), index, on_error, position)


class SameStepAsNextStep(VectorWrapper):
    """A SAME_STEP vector environment seen as NEXT_STEP: the true final observation, then a row that only resets.

    A SAME_STEP environment has already begun its next episode when the last one ends, and it cannot wait. Its first
    step of each episode therefore happens in the reset row, with an action that the agent chose for something else
    and a reward that nobody sees. Prefer NEXT_STEP where the environment offers it.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self._resetting = np.zeros(env.num_envs, np.bool_)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._resetting[:] = False
        return self.env.reset(**kwargs)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        # An episode that ends in its hidden first step is never seen: the row shows the start of the one after it.
        seen = ~self._resetting
        terminated, truncated, reward = terminated & seen, truncated & seen, np.where(seen, reward, 0.0)
        self._resetting = terminated | truncated
        if self._resetting.any():
            obs = replace_rows(obs, info["final_obs"], np.flatnonzero(self._resetting))
        return obs, reward, terminated, truncated, info


def next_step(env: VectorEnv[Any, Any, Any], name: str) -> VectorEnv[Any, Any, Any]:
    """``env`` in NEXT_STEP mode. Raises UsageError for one whose episodes must be reset by hand."""
    mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    if mode is AutoresetMode.DISABLED:
        raise UsageError(f"env {name} has autoreset disabled: make it with autoreset_mode NEXT_STEP")
    return SameStepAsNextStep(env) if mode is AutoresetMode.SAME_STEP else env
