"""Evaluations: their seeds, what they leave alone, and the final one; and the generators that everyone shares."""

import json
import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK
from tensorboard.summary.writer import event_file_writer
from torch import nn

import klrl
from klrl.agents.sac import SAC
from klrl.envs.make import EnvConfig, make_vector
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history
from klrl.training.evaluation import evaluation_seed, run_episodes


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
