"""Ways to step many environments: the id's own vector environment, EnvPool's, and whichever is faster."""

import gc
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import klrl
from klrl.envs.make import EnvConfig, make_vector, settled
from klrl.envs.sync import Sync
from klrl.envs.wrappers import SeededEpisodes
from klrl.errors import UsageError
from klrl.rundir.history import read_history

SMALL: dict[str, Any] = {"n_envs": 4, "n_steps": 64, "eval_every": 2, "quiet": True, "final_episodes": 4}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["vector", "envpool"])
def test_episodes_end_and_begin_as_next_step_autoreset_says(kind: Any) -> None:
    envs = make_vector("CartPole-v1", 4, EnvConfig(vectorization=kind))
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (4, 4)
    assert envs.single_observation_space.shape == (4,)
    ended = np.zeros(4, bool)
    for _ in range(60):  # always to the right: poles fall after about ten steps
        obs, reward, terminated, truncated, _ = envs.step(np.ones(4, np.int64))
        assert (reward == np.where(ended, 0.0, 1.0)).all(), "a row that only resets has no reward"
        assert (np.abs(obs[ended]) <= 0.05).all(), "and shows where the next episode begins"
        assert (np.abs(obs[terminated, 2]) > 0.2).all(), "after the last observation of the one before"
        ended = terminated | truncated
    envs.close()


@pytest.mark.parametrize("kind", ["vector", "envpool"])
def test_a_seed_says_how_every_episode_begins(kind: Any) -> None:
    envs = make_vector("CartPole-v1", 3, EnvConfig(vectorization=kind))
    first, again, other = (envs.reset(seed=seed)[0].copy() for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    envs.close()


@pytest.mark.parametrize(
    ("kind", "env"), [("vector", "CartPole-v1"), ("envpool", "CartPole-v1"), ("envpool", "Pendulum-v1")]
)
def test_a_run_is_trained_evaluated_and_gone_on_with(kind: Any, env: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = klrl.train("ppo", env, total_timesteps=600, env={"vectorization": kind}, **SMALL)
    assert len(run.score.returns) == 4
    assert read_history(run.folder).has("eval/mean_reward")
    assert klrl.resume(run.folder, total_timesteps=900).config.total_timesteps == 900
    assert "this environment's episodes cannot be replayed: they begin anew" in capsys.readouterr().err


def test_ways_that_an_environment_does_not_have_are_refused() -> None:
    for kind, env, said in (
        ("vector", "Acrobot-v1", "Acrobot-v1 offers no vector environment of its own; use sync"),
        ("envpool", "klrl/OneStep-v0", r"EnvPool [\d.]+ has no klrl/OneStep-v0; use sync"),
        ("vector", lambda: gym.make("CartPole-v1"), "vector goes with an env id, not with a factory"),
        ("envpool", lambda: gym.make("CartPole-v1"), "envpool goes with an env id, not with a factory"),
    ):
        with pytest.raises(UsageError, match=said):
            make_vector(env, 2, EnvConfig(vectorization=kind))  # type: ignore[arg-type]


def test_auto_takes_what_is_faster_and_says_so_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            time.sleep(0.01)
            return super().step(action)

    monkeypatch.setattr("klrl.envs.make.cores", lambda: 4)
    auto = EnvConfig(vectorization="auto")
    assert settled(lambda: Slow(gym.make("CartPole-v1")), 4, auto).vectorization == "async"
    assert settled("CartPole-v1", 4, auto).vectorization == "sync"
    assert settled(lambda: Slow(gym.make("CartPole-v1")), 1, auto).vectorization == "sync"
    assert settled("CartPole-v1", 521, auto).vectorization == "sync", "a prime number that no few workers can share"
    assert settled("klrl/CartPole-v1", 4, auto).vectorization == "sync", "which is stepped in one way only"
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=256, env={"vectorization": "auto"}, **SMALL)
    assert 'vectorization = "sync"' in (run.folder / "config.toml").read_text()


def test_workers_leave_the_trainers_garbage_alone(tmp_path: Path) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    class Collects(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **options: Any) -> Any:
            gc.collect()
            return super().reset(**options)

    gc.disable()
    try:
        Cycle()
        with closing(
            make_vector(lambda: Collects(gym.make("CartPole-v1")), 2, EnvConfig(vectorization="async"))
        ) as envs:
            envs.reset(seed=0)
            assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "klrl.envs:klrl/Truncation-v0"])
def test_environments_in_this_process_answer_as_gymnasiums_do(env: str) -> None:
    makers = [lambda i=i: SeededEpisodes(gym.make(env, max_episode_steps=9 + i), i) for i in range(3)]  # type: ignore[misc]
    pair = Sync(makers), SyncVectorEnv(makers)
    assert all(np.array_equal(*(envs.reset(seed=3)[0] for envs in pair)) for _ in range(2))
    pair[0].action_space.seed(0)
    kept = []
    for _ in range(40):
        action = pair[0].action_space.sample()
        mine, theirs = (envs.step(action.copy()) for envs in pair)
        for part, other in zip(mine[:4], theirs[:4], strict=True):
            assert part.dtype == other.dtype
            assert np.array_equal(part, other)
        assert mine[4] == theirs[4] == {}
        kept += [(part, part.copy()) for part in mine[:4]]
    assert all(np.array_equal(shown, before) for shown, before in kept), "each answer stays what it was"


def test_other_numbers_and_modes_are_gymnasiums() -> None:
    class Wide(gym.ObservationWrapper[Any, Any, Any]):
        def observation(self, observation: Any) -> Any:
            return observation.astype(np.float64)

    pair = [kind([lambda: Wide(gym.make("CartPole-v1"))] * 2) for kind in (Sync, SyncVectorEnv)]
    for envs in pair:
        envs.reset(seed=0)
    mine, theirs = (envs.step(np.array([1, 0]))[0] for envs in pair)
    assert mine.dtype == theirs.dtype == np.float32
    assert np.array_equal(mine, theirs)
    same = Sync([lambda: gym.make("CartPole-v1", max_episode_steps=1)] * 2, autoreset_mode="SameStep")
    same.reset(seed=0)
    assert "final_obs" in same.step(np.array([1, 0]))[4]


def test_infos_come_from_each_environment_by_itself() -> None:
    class Told(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            *answer, _ = super().step(action)
            return *answer, {"action": int(action)} if action else {}

    makers = [lambda: Told(gym.make("CartPole-v1"))] * 3
    pair = Sync(makers), SyncVectorEnv(makers)
    for envs in pair:
        envs.reset(seed=0)
    mine, theirs = (envs.step(np.array([1, 0, 1]))[4] for envs in pair)
    assert {key: part.tolist() for key, part in mine.items()} == {key: part.tolist() for key, part in theirs.items()}
    assert mine["_action"].tolist() == [True, False, True]
