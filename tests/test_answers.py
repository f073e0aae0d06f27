"""What environments answer wrongly, or do where they should answer: one line that names which, and when."""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import klrl
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import EnvironmentFailedError, UsageError
from klrl.training.evaluation import run_episodes

SMALL: dict[str, Any] = {"n_envs": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 2, "quiet": True, "eval_every": 0}
OBS = np.zeros(2, np.float32)


class Answers(gym.Env[Any, Any]):
    """Answers its third step with ``at_three`` in place of what is right."""

    observation_space: Any = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, **at_three: Any) -> None:
        self.at_three, self.t = at_three, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t = 0
        return OBS, {}

    def step(self, action: Any) -> Any:
        self.t += 1
        right = {"obs": OBS, "reward": 1.0, "terminated": False, "truncated": self.t == 10, "info": {}}
        return tuple((right | self.at_three if self.t == 3 else right).values())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reward": np.ones(3)}, r"its reward is array\(.*\), not a number"),
    ({"reward": "1.5"}, "its reward is '1.5', not a number"),
    ({"reward": None}, "its reward is None, not a number"),
    ({"terminated": "False"}, "its terminated is 'False', not True or False"),
    ({"terminated": np.array([True, False])}, r"its terminated is array\(.*\), not True or False"),
    ({"truncated": 0.5}, "its truncated is 0.5, not True or False"),
    ({"truncated": None}, "its truncated is None, not True or False"),
    ({"obs": np.zeros(3)}, r"its observation has shape \(3,\), its space \(2,\)"),
    ({"obs": np.zeros((1, 2))}, r"its observation has shape \(1, 2\), its space \(2,\)"),
    ({"obs": np.zeros(2, complex)}, "its observation is of type complex128, its space of float32"),
    ({"obs": None}, r"its observation has shape \(\), its space \(2,\)"),
    ({"info": None}, "its info is None, not a dict"),
    ({"more": 1}, "step returned 6 values, not obs, reward, terminated, truncated, info"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_a_wrong_answer_is_named_and_may_count_as_truncated(wrong: dict[str, Any], said: str) -> None:
    envs = make_vector(lambda: Answers(**wrong), 2, EnvConfig())
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.zeros(2, np.int64))
    with pytest.raises(EnvironmentFailedError, match=f"^env 0 failed at step 3 of episode 0: ValueError: {said}$"):
        envs.step(np.zeros(2, np.int64))
    envs = make_vector(lambda: Answers(**wrong), 2, EnvConfig(on_error="restart"))
    envs.reset(seed=0)
    for t in range(1, 4):
        _, reward, terminated, truncated, info = envs.step(np.zeros(2, np.int64))
        assert truncated.tolist() == [t == 3] * 2
    assert terminated.tolist() == [False] * 2
    assert reward.tolist() == [0.0] * 2
    assert "env 1 failed at step 3 of episode 0" in info["klrl.restarted"][1]


def test_wrong_answers_are_named_in_processes_of_their_own_too() -> None:
    for wrong, said in ({"reward": "1.5"}, "its reward is '1.5'"), ({"info": None}, "its info is None"):
        envs = make_vector(lambda wrong=wrong: Answers(**wrong), 1, EnvConfig(vectorization="async"))  # type: ignore[misc]
        envs.reset(seed=0)
        for _ in range(2):
            envs.step(np.zeros(1, np.int64))
        with pytest.raises(EnvironmentFailedError, match=f"env 0 failed at step 3 of episode 0: ValueError: {said}"):
            envs.step(np.zeros(1, np.int64))
        envs.close()


@pytest.mark.parametrize(
    ("right", "reward"),
    [
        ({"reward": np.ones(1)}, 1.0),
        ({"reward": [2]}, 2.0),
        ({"reward": np.float32(0.5)}, 0.5),
        ({"reward": True}, 1.0),
    ],
)
def test_one_element_is_simply_taken(right: dict[str, Any], reward: float) -> None:
    ends = {"terminated": np.array([1]), "truncated": np.bool_(False), "obs": [0.5, 0.5]}
    with warnings.catch_warnings(action="error"):
        envs = make_vector(lambda: Answers(**right, **ends), 1, EnvConfig())
        envs.reset(seed=0)
        for _ in range(3):
            obs, rewards, terminated, *_ = envs.step(np.zeros(1, np.int64))
    assert (rewards.tolist(), terminated.tolist(), obs.tolist()) == ([reward], [True], [[0.5, 0.5]])


def test_what_a_reset_answers_wrongly_is_named() -> None:
    for answer, said in (
        (OBS, "reset returned a ndarray, not obs, info"),
        ((OBS, None), "its info is None"),
        ((np.zeros(3), {}), r"its observation has shape \(3,\)"),
    ):
        one = type("Odd", (Answers,), {"reset": lambda self, answer=answer, **_: answer})
        with pytest.raises(EnvironmentFailedError, match=f"env 0 failed at reset of episode 0: ValueError: {said}"):
            make_vector(one, 1, EnvConfig()).reset(seed=0)


def test_parts_and_choices_are_checked_as_well() -> None:
    class Parts(Answers):
        observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})

        def reset(self, **_: Any) -> Any:
            return self.at_three["obs"], {}

    for obs, said in (
        ({"a": OBS}, "its observation has no 'b', only a"),
        ({"a": OBS[:1], "b": 1}, r"its observation 'a' has shape \(1,\), its space \(2,\)"),
        ({"a": OBS, "b": 3}, r"its observation 'b' 3 lies outside of its space Discrete\(3\)"),
        (OBS, "its observation is a ndarray, not a dict of a, b"),
    ):
        with pytest.raises(EnvironmentFailedError, match=said):
            make_vector(lambda obs=obs: Parts(obs=obs), 1, EnvConfig()).reset(seed=0)  # type: ignore[misc]


class Odd(gym.Wrapper[Any, Any, Any, Any]):
    """CartPole that leaves, moves, or does not let go."""

    def __init__(self, how: str) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.how, self.steps = how, 0
        if how == "exits when made":
            sys.exit(0)
        if how == "warns":
            os.write(2, b"the simulator has a remark\n")
            print("and another", file=sys.stderr)

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 9 and self.how == "exits":
            sys.exit(0)
        if self.steps == 9 and self.how == "moves":
            Path("elsewhere").mkdir(exist_ok=True)
            os.chdir("elsewhere")
        return super().step(action)

    def close(self) -> None:
        super().close()
        if self.how == "close raises":
            raise OSError("port is gone")
        if self.how == "close hangs":
            time.sleep(60)
        if self.how == "close never ends" and multiprocessing.parent_process() is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_environment_that_exits_is_a_fault_that_is_named_and_the_run_is_saved(kind: str) -> None:
    said = r"env [01] failed at step 9 of episode 0: SystemExit: 0; saved after 16 steps in .*, for klrl resume"
    with pytest.raises(EnvironmentFailedError, match=said):
        klrl.train("ppo", lambda: Odd("exits"), total_timesteps=500, env={"vectorization": kind}, **SMALL)
    (folder,) = Path("runs").iterdir()
    run = klrl.resume(folder, env=lambda: Odd(""), total_timesteps=128)
    assert run.folder == folder.absolute()


def test_the_command_names_an_environment_that_exits_with_the_code_of_a_fault(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for how, said in (("exits", "env 0 failed at step 9 of episode 0"), ("exits when made", "cannot be made")):
        gym.register("Exits-v0", lambda how=how: Odd(how))  # type: ignore[misc]
        with pytest.raises(SystemExit) as stop:
            main(["train", "ppo", "Exits-v0", "--total-timesteps", "500", "--quiet"])
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert "SystemExit: 0" in line
        assert stop.value.code == (1 if how == "exits" else 2)
        del gym.registry["Exits-v0"]
    with pytest.raises(EnvironmentFailedError, match="env 0 failed as it was made: SystemExit: 0"):
        make_vector(lambda: Odd("exits when made"), 1, EnvConfig())


def test_a_run_stays_in_one_folder_whatever_the_environment_does_to_the_directory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = Path.cwd()
    run = klrl.train("ppo", lambda: Odd("moves"), total_timesteps=200, save_every=64, **SMALL)
    os.chdir(start)
    (folder,) = start.glob("**/config.toml")
    assert folder.parent == run.folder
    assert [path.parent for path in start.glob("**/metrics.jsonl")] == [run.folder]
    assert (run.folder / "checkpoints").is_dir()
    assert f"run         {run.folder.relative_to(start)}" in capsys.readouterr().out, "as one types it"


def test_a_vector_environment_that_fails_or_answers_wrongly_is_named() -> None:
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    class Whole(CartPoleVectorEnv):
        def __init__(self, num_envs: int, how: str = "", **_: Any) -> None:
            super().__init__(num_envs)
            self.how = how

        def step(self, action: Any) -> Any:
            if self.how == "exits":
                sys.exit(0)
            obs, reward, *rest = super().step(action)
            return obs, reward[:, None], *rest

    gym.register("Whole-v0", vector_entry_point=Whole)
    for how, kind, said in (
        (
            "exits",
            EnvironmentFailedError,
            "env Whole-v0 failed at step after 1 steps: SystemExit: 0; saved after 0 steps",
        ),
        ("column", EnvironmentFailedError, r"its reward has shape \(2, 1\), not \(2,\); saved after 0 steps"),
    ):
        with pytest.raises(kind, match=said):
            klrl.train("ppo", "Whole-v0", total_timesteps=100, env={"kwargs": {"how": how}}, **SMALL)


class Telling(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose infos fit into no array, and use the name of one of klrl's."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        info = {"contacts": np.zeros(self.np_random.integers(1, 5)), "restarted": False}
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_infos_may_hold_anything(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    klrl.train("ppo", Telling, total_timesteps=300, env={"vectorization": kind}, **SMALL)
    assert capsys.readouterr().err == ""


def test_a_reward_after_an_episode_is_no_part_of_its_return() -> None:
    class Late(gym.Wrapper[Any, Any, Any, Any]):
        made = 0

        def __init__(self) -> None:
            Late.made += 1
            super().__init__(gym.make("CartPole-v1", max_episode_steps=3 if Late.made % 2 else 9))

        def reset(self, **kwargs: Any) -> Any:
            self.ended = self.ended + 1 if hasattr(self, "ended") else 0
            return super().reset(**kwargs)

        def step(self, action: Any) -> Any:
            obs, _, *rest = self.env.step(action)
            return obs, np.inf if self.ended else 1.0, *rest

    envs = make_vector(Late, 2, EnvConfig())
    score = run_episodes(klrl.PPO(envs.single_observation_space, envs.single_action_space), envs, 0)
    assert score.returns == score.lengths
    assert min(score.lengths) < max(score.lengths), "one goes on while the other has ended"


def test_an_environment_in_place_of_what_makes_it_is_refused_in_one_line() -> None:
    env = gym.make("CartPole-v1")
    for bad in (env, None, 3):
        with pytest.raises(UsageError, match=r"an env is an id, or a function that returns a new environment, not .*"):
            klrl.train("ppo", bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"returned 3, which is no gymnasium\.Env"):
        klrl.train("ppo", lambda: 3)  # type: ignore[arg-type, return-value]
    assert not Path("runs").exists()
