"""Worker processes that each step several environments: what they answer is what the environments answer alone."""

import multiprocessing
import os
import signal
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from klrl.envs.make import EnvConfig, make_vector, worker_count
from klrl.envs.wrappers import RESTARTED
from klrl.errors import EnvironmentFailedError, UsageError


def rollout(env: Any, config: EnvConfig, n_envs: int, steps: int) -> list[Any]:
    envs = make_vector(env, n_envs, config)
    rng, (obs, info) = np.random.default_rng(0), envs.reset(seed=3)
    seen: list[Any] = [obs, info]
    assert envs.action_space.sample().shape == (n_envs, *(envs.single_action_space.shape or ()))
    for _ in range(steps):
        shape = (n_envs, *(envs.single_action_space.shape or ()))
        discrete = isinstance(envs.single_action_space, spaces.Discrete)
        seen += envs.step(rng.integers(2, size=shape) if discrete else rng.uniform(-1, 1, shape).astype(np.float32))
    envs.close()
    return seen


def take(envs: Any, action: Any, steps: int) -> None:
    for _ in range(steps):
        envs.step(action)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a.dtype.kind == b.dtype.kind and a.shape == b.shape and bool((a == b).all())


class Keyed(gym.Env[Any, Any]):
    """Observations of two parts; fails at the fifth step of an episode."""

    observation_space = spaces.Dict({"at": spaces.Box(-1, 1, (2,)), "which": spaces.Discrete(3)})
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return {"at": self.np_random.uniform(-1, 1, 2).astype(np.float32), "which": self.np_random.integers(3)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 5:
            raise RuntimeError("a fifth step")
        obs = {"at": np.asarray(action, np.float32), "which": self.np_random.integers(3)}
        return obs, float(action[0]), bool(self.np_random.random() < 0.3), False, {}


@pytest.mark.parametrize("workers", [2, 3, 6])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", Keyed], ids=str)
def test_workers_answer_as_one_process_does(env: Any, workers: int) -> None:
    alone = rollout(env, EnvConfig(on_error="restart"), 6, 60)
    config = EnvConfig(vectorization="async", workers=workers, on_error="restart")
    shared = rollout(env, config, 6, 60)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert any(RESTARTED in part for part in alone if isinstance(part, dict)) == (env is Keyed)


def test_a_workers_environments_are_named_together() -> None:
    envs = make_vector("CartPole-v1", 6, EnvConfig(vectorization="async", workers=2))
    envs.reset(seed=0)
    os.kill(envs.workers.processes[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFailedError, match=r"the worker of env 3 to 5 \(exit code -9\) died"):
        take(envs, np.zeros(6, np.int64), 3)
    envs.close()


def test_an_environment_that_fails_in_a_shared_worker_is_named() -> None:
    envs = make_vector(Keyed, 4, EnvConfig(vectorization="async", workers=2))
    envs.reset(seed=0)
    with pytest.raises(
        EnvironmentFailedError, match=r"env \d failed at step 5 of episode \d: RuntimeError: a fifth step"
    ):
        take(envs, np.zeros((4, 2), np.float32), 30)
    envs.close()


def test_each_worker_has_as_many_environments() -> None:
    assert [worker_count(n, 4) for n in (1, 2, 4, 6, 32, 33, 7)] == [1, 2, 4, 6, 4, 11, 7]
    assert worker_count(32, 1) == 1
    with pytest.raises(UsageError, match="1,021 environments make 1,021 processes"):
        worker_count(1021, 4)


def _stop_signals_after_making_workers(answers: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with closing(make_vector("CartPole-v1", 2, EnvConfig(vectorization="async"))):
        answers.put(signal.getsignal(signal.SIGTERM) == before)


def test_a_trainer_that_is_a_process_of_another_still_hears_signals() -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    trainer = context.Process(target=_stop_signals_after_making_workers, args=(answers,))
    trainer.start()
    assert answers.get(timeout=60)
    trainer.join(60)
