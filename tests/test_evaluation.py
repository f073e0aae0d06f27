"""Evaluation: the same episodes however many run side by side, no more environments than the run had, cuts counted."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers import QUICK
from test_observations import BOX, TWO

import klrl
from klrl.analysis.compare import CompareConfig, compare
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.training.evaluation import Evaluation, run_episodes, summary


class Counted(gym.Wrapper[Any, Any, Any, Any]):
    """Environments that count how many of them are open."""

    now, most = 0, 0

    def __init__(self, *_: Any) -> None:
        super().__init__(gym.make("CartPole-v1", max_episode_steps=20))
        Counted.now += 1
        Counted.most = max(Counted.now, Counted.most)

    def close(self) -> None:
        Counted.now -= 1
        super().close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_episodes_are_the_same_however_many_run_side_by_side(kind: Any) -> None:
    agent, scores = klrl.PPO(BOX, TWO, seed=1), []
    for width in (7, 3, 1) if kind == "sync" else (3,):
        envs = make_vector("CartPole-v1", width, EnvConfig(vectorization=kind))
        scores += [run_episodes(agent, envs, 5, episodes=7) for _ in range(2)]
        envs.close()
    assert all(score == scores[0] for score in scores)
    assert len(set(scores[0].lengths)) > 1
    at_once = make_vector("CartPole-v1", 7, EnvConfig())
    assert run_episodes(agent, at_once, 5) == scores[0], "as ever"
    at_once.close()


def test_a_run_and_its_evaluations_open_no_more_environments_than_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    gym.register("Counted-v0", Counted)
    run = klrl.train("ppo", "Counted-v0", **QUICK | {"n_envs": 3, "total_timesteps": 600, "eval_every": 1})
    assert Counted.most == 6, "three to train in, and three to evaluate in"
    assert Counted.now == 0
    Counted.most = 0
    run.evaluate(20)
    compare(str(run.folder), str(run.folder), CompareConfig(episodes=5, steps=30))
    capsys.readouterr()
    main(["eval", str(run.folder)])
    assert Counted.most == 3
    assert Counted.now == 0
    assert capsys.readouterr().out.startswith(f"{run.evaluate().mean:.1f} +- ")


def test_episodes_that_did_not_end_by_themselves_are_counted() -> None:
    agent = klrl.PPO(BOX, TWO)
    envs = make_vector("CartPole-v1", 2, EnvConfig(kwargs={"max_episode_steps": 15}))
    score = run_episodes(agent, envs, 3, deterministic=False, episodes=20)
    for length, terminated in zip(score.lengths, score.terminated, strict=True):
        assert terminated or length == 15
    assert 0 < score.terminated.count(False) < 20
    cut = run_episodes(agent, envs, 3, max_steps=4, episodes=3)
    assert cut.lengths == [4] * 3
    assert cut.terminated == [False] * 3
    assert cut.returns == [4.0] * 3
    envs.close()


def test_the_summary_says_how_many_episodes_were_cut() -> None:
    both = Evaluation(-27000.0, 0.0, [-27000.0] * 2, [27000] * 2, [False, False])
    assert summary(both) == "-27000.0 +- 0.0 over 2 episodes (2 of 2 cut at the time limit)"
    one = both._replace(terminated=[True, False])
    assert summary(one, " of X") == "-27000.0 +- 0.0 over 2 episodes of X (1 of 2 cut at the time limit)"
    assert summary(both._replace(terminated=[True, True])) == "-27000.0 +- 0.0 over 2 episodes"


def test_an_environment_that_comes_as_a_vector_alone_is_evaluated_in_rounds() -> None:
    entry_point = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
    gym.register("VectorAlone-v0", vector_entry_point=entry_point, kwargs={"max_episode_steps": 500})
    envs = make_vector("VectorAlone-v0", 2, EnvConfig())
    score = run_episodes(klrl.PPO(BOX, TWO), envs, 0, episodes=5)
    assert len(score.returns) == 5
    assert np.all(np.array(score.lengths) > 5)
    envs.close()


def test_a_recording_has_a_video_for_each_episode_of_each_round(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    from imageio_ffmpeg import count_frames_and_secs

    from klrl.analysis.record import RecordConfig, record

    run = klrl.train("ppo", "CartPole-v1", **QUICK | {"n_envs": 2, "total_timesteps": 128, "eval_every": 0})
    score = run.evaluate(3)
    paths = record(str(run.folder), RecordConfig(episodes=3, output=str(tmp_path / "videos")))
    assert [count_frames_and_secs(path)[0] for path in paths] == [length + 1 for length in score.lengths]
