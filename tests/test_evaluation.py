"""Evaluations: their seeds, rounds and cuts, what they leave alone, the final one; and the global generators."""

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK
from tensorboard.summary.writer import event_file_writer
from test_observations import BOX, TWO
from torch import nn

import klrl
from klrl.agents.sac import SAC
from klrl.analysis.compare import compare
from klrl.analysis.comparison import CompareConfig
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history
from klrl.rundir.logger import Console
from klrl.training.evaluation import Evaluation, evaluation_seed, run_episodes, summary


def test_no_two_evaluations_of_neighbouring_runs_share_an_episode() -> None:
    seen: set[int] = set()
    for run_seed in range(20):
        for seed in (
            run_seed,
            evaluation_seed("during", run_seed),
            evaluation_seed("final", run_seed),
            *(evaluation_seed("afterwards", run_seed, number) for number in range(5)),
        ):
            # The episodes of an id that offers only a vector environment have the seeds from this one on.
            episodes = set(range(seed, seed + 20)) if seed > 20 else {seed}
            assert not seen & episodes
            seen |= episodes
    assert max(seen) < 2**31 + 20


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_sampled_episodes_repeat_and_leave_the_agents_noise_alone(correlation: float) -> None:
    envs = make_vector("Pendulum-v1", 2, EnvConfig())
    agent = SAC(envs.single_observation_space, envs.single_action_space, {"noise_correlation": correlation})
    agent.n_updates = 1  # no longer at random
    obs = np.zeros((2, 3), np.float32)
    agent.act(obs)
    before = agent.state_dict()
    scores = [run_episodes(agent, envs, seed, deterministic=False, max_steps=20) for seed in (3, 3, 4)]
    assert scores[0] == scores[1] != scores[2]
    after = agent.state_dict()
    assert before["rng"] == after["rng"]
    assert str(before["noise"]) == str(after["noise"])


class Drawing(gym.Env[Any, Any]):
    """An environment that draws from the global generators."""

    observation_space = spaces.Box(-9, 9, (3,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = 10
        return self._see(), {}

    def _see(self) -> Any:
        return np.clip([np.random.normal(), random.gauss(0, 1), float(torch.randn(()))], -9, 9).astype(np.float32)

    def step(self, action: Any) -> Any:
        self.left -= 1
        return self._see(), random.random(), self.left == 0, False, {}


class Net(nn.Module):
    def __init__(self, space: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, inputs: Any) -> Any:
        return torch.tanh(self.layer(inputs))


def test_the_runs_seed_is_that_of_the_global_generators_too_and_they_are_put_back() -> None:
    runs = []
    for start in (1, 2):
        random.seed(start), np.random.seed(start), torch.manual_seed(start)
        runs.append(klrl.train("ppo", Drawing, network=Net, **QUICK))
        drawn = random.random(), np.random.random(), float(torch.rand(()))
        random.seed(start), np.random.seed(start), torch.manual_seed(start)
        assert drawn == (random.random(), np.random.random(), float(torch.rand(())))
    first, second = (torch.cat([p.flatten() for p in run.agent.policy.parameters()]) for run in runs)
    assert torch.equal(first, second)
    assert runs[0].score == runs[1].score
    other = klrl.train("ppo", Drawing, network=Net, seed=1, **QUICK)
    assert not torch.equal(torch.cat([p.flatten() for p in other.agent.policy.parameters()]), first)


def test_a_resumed_run_keeps_its_environments_name() -> None:
    run = klrl.train("ppo", lambda: gym.make("CartPole-v1"), **QUICK)
    klrl.resume(run.folder, env=lambda: gym.make("CartPole-v1"), total_timesteps=2000)
    named = klrl.train("ppo", "CartPole-v1", **QUICK)
    resumed = klrl.resume(named.folder, env=lambda: gym.make("CartPole-v1"), total_timesteps=2000)
    content = checkpoint.load(checkpoint.resolve(resumed.folder))
    assert content["state"]["options"]["env_id"] == "CartPole-v1"
    assert 'env_id = "CartPole-v1"' in (resumed.folder / "config.toml").read_text()
    klrl.resume(named.folder, total_timesteps=2500)


class Single(gym.Wrapper[Any, Any, Any, Any]):
    """An environment of which no two may be open."""

    open = 0

    def __init__(self) -> None:
        assert Single.open == 0, "another one is open"
        Single.open += 1
        super().__init__(gym.make("CartPole-v1"))

    def close(self) -> None:
        Single.open = 0
        super().close()


def test_a_task_of_which_one_instance_may_exist_is_trained_and_evaluated() -> None:
    Single.open = 0
    run = klrl.train("ppo", Single, **{**QUICK, "n_envs": 1, "eval_every": 0, "final_episodes": 3})
    assert len(run.score.returns) == 3
    assert Single.open == 0


def test_a_final_evaluation_that_fails_loses_nothing() -> None:
    class Fails(gym.Wrapper[Any, Any, Any, Any]):
        made = 0

        def __init__(self) -> None:
            Fails.made += 1
            if Fails.made > QUICK["n_envs"] + 1:
                raise RuntimeError("no more")
            super().__init__(gym.make("CartPole-v1"))

    options = {**QUICK, "eval_every": 0}
    whole = klrl.train("ppo", lambda: gym.make("CartPole-v1"), run_dir="whole", **options)
    with pytest.raises(Exception, match="no more"):
        klrl.train("ppo", Fails, run_dir="cut", **options)
    (cut,) = (whole.folder.parent.parent / "cut").iterdir()
    assert read_history(cut).state == "stopped"
    resumed = klrl.resume(cut, env=lambda: gym.make("CartPole-v1"))
    assert resumed.score == whole.score
    last = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (whole.folder, cut)]
    timed = {"wall", "time/fps", "time/collect_share"}
    assert {k: v for k, v in last[0].items() if k not in timed} == {k: v for k, v in last[1].items() if k not in timed}


def test_the_final_evaluation_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    run = klrl.train("ppo", "CartPole-v1", **{**QUICK, "final_episodes": 0, "eval_every": 0})
    assert run.score.returns == []
    assert "evaluation" not in capsys.readouterr().out
    history = read_history(run.folder)
    assert history.state == "finished"
    assert history.final_return > 0, "that of the last training episodes"
    with pytest.raises(klrl.UsageError, match="trains it further"):
        klrl.resume(run.folder)


def test_another_packages_event_writer_is_looked_up_when_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Watched(event_file_writer.EventFileWriter):
        def __init__(self, folder: str, *arguments: Any, **more: Any) -> None:
            made.append(folder)
            super().__init__(folder, *arguments, **more)

    monkeypatch.setattr(event_file_writer, "EventFileWriter", Watched)
    run = klrl.train("ppo", "CartPole-v1", **QUICK)
    assert made == [str(run.folder)]


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
    assert Counted.most == 5, "three to train in, and two to evaluate in; at the end three"
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


def test_the_final_evaluation_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(100)
    for done in range(3):
        console.evaluating(done, 3)  # once a minute
    assert capsys.readouterr().out == "evaluation: 0 of 3 episodes\n"


def test_an_evaluation_along_the_way_is_not_the_final_one() -> None:
    run = klrl.train("ppo", "CartPole-v1", **{**QUICK, "final_episodes": 0, "eval_every": 1})
    assert run.score.returns == []
    assert not read_history(run.folder).has("eval/final_return")
    assert read_history(run.folder).has("eval/mean_reward")
