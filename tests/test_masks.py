"""Action masks: what an environment forbids is never done, and masks are a part of all that is kept."""

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from masked import Picky
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env
from test_ranks import ENV
from test_ranks import klrl as command
from test_resume import check_same

import klrl
from klrl import PPO, ActionMasks, EnvironmentFailedError, UsageError
from klrl.analysis.record import RecordConfig, record
from klrl.envs.make import EnvConfig, make_vector, settled
from klrl.rundir import checkpoint

QUICK: dict[str, Any] = {
    "n_envs": 4,
    "n_steps": 64,
    "learning_rate": 3e-3,
    "hidden_sizes": (16,),
    "eval_every": 4,
    "eval_episodes": 2,
    "final_episodes": 6,
    "quiet": True,
}
WAYS: dict[str, dict[str, Any]] = {
    "method": {},
    "info": {"says": "info"},
    "obs": {"says": "obs"},
    "several": {"sizes": (4, 3), "says": "info"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_ends_an_episode_with_a_penalty_is_never_done(way: str) -> None:
    Picky.crimes = 0
    run = klrl.train("ppo", "Picky-v0", total_timesteps=2000, **QUICK, env={"kwargs": WAYS[way]})
    run.evaluate(4, deterministic=False)
    record(str(run.folder), RecordConfig(episodes=1, overlay=True))
    assert Picky.crimes == 0
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["rollout/ep_len_mean"] for row in logged if row["step"] > 100} == {20.0}
    assert run.score.mean > 11, "and what is allowed is learned: by chance it were about 7 of 20"


def test_without_masks_it_is_done() -> None:
    Picky.crimes = 0
    run = klrl.train("ppo", "Picky-v0", total_timesteps=500, **QUICK, env={"action_masks": "off"})
    assert run.agent.observation_space == Picky().observation_space
    assert Picky.crimes > 50


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "trpo"])
def test_taxi_is_learned_with_masks_where_it_is_not_without(agent: str) -> None:
    options: dict[str, Any] = {"total_timesteps": 100_000, "eval_every": 0, "quiet": True}
    masked, other = (
        klrl.train(agent, "Taxi-v4", **options, env={"action_masks": way}).score.mean for way in ("auto", "off")
    )
    assert masked > other + 20


@pytest.mark.parametrize(
    "env",
    [
        lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
        lambda: InvalidActionEnvMultiDiscrete(dims=[4, 8], n_invalid_actions=6),
        lambda: InvalidActionEnvMultiBinary(dims=3, n_invalid_actions=2),
    ],
)
def test_environments_and_evaluation_of_sb3_contrib(env: Any) -> None:
    run = klrl.train("ppo", env, total_timesteps=2500, **QUICK | {"eval_every": 0, "final_episodes": 2})
    envs, agent = make_vec_env(env, n_envs=2), run.agent
    returns, lengths = evaluate_policy(agent, envs, n_eval_episodes=2, return_episode_rewards=True)  # type: ignore[arg-type]
    assert lengths == [100] * 2
    assert min(run.score.mean, np.mean(returns)) > 40


def test_a_run_says_what_it_took_and_an_older_one_took_none() -> None:
    run = klrl.train("ppo", "Picky-v0", total_timesteps=300, **QUICK, env={"action_masks": "off"})
    source, content = checkpoint.newest(run.folder)
    assert content["state"]["options"]["env"].pop("action_masks") == "off"
    older = Path("older/checkpoints") / source.name
    checkpoint.write(older, content["state"])
    assert klrl.load(older.parent.parent).observation_space == Picky().observation_space
    assert klrl.train("ppo", "Picky-v0", total_timesteps=300, **QUICK).config.env.action_masks == "on"


def test_a_run_goes_on_bit_for_bit() -> None:
    check_same("ppo", Picky, 700, env={"action_masks": "auto"}, save_every=100)


def test_workers_see_the_same_masks() -> None:
    here, there = (
        klrl.train("trpo", "Picky-v0", total_timesteps=500, env={"vectorization": way}, **QUICK)
        for way in ("sync", "async")
    )
    assert here.score.returns == there.score.returns
    assert there.config.env.action_masks == "on"


@pytest.mark.slow
def test_ranks_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setitem(ENV, "PYTHONPATH", os.pathsep.join(path))
    small = ["--n-envs", "2", "--n-steps", "64", "--total-timesteps", "500", "--final-episodes", "4", "--quiet"]
    code, out, err = command("train", "ppo", "masked:Picky-v0", "--processes", "2", *small)
    assert (code, err) == (0, ""), out + err
    assert "4 of 4 cut at the time limit" in out


def test_one_sees_all_else_as_before() -> None:
    made = [Picky(), ActionMasks(Picky())]
    shown = [env.reset(seed=1)[0] for env in made]
    assert (shown[1]["observation"] == shown[0]).all()
    assert shown[1]["action_mask"].tolist() == [int(allowed) for allowed in made[0].mask]
    for _ in range(20):
        action = int(np.flatnonzero(made[0].mask)[0])
        (one, *facts, _), (other, *same, _) = (env.step(action) for env in made)
        assert (other["observation"] == one).all()
        assert facts == same
    assert other["action_mask"].all(), "as no action is taken after the end"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([True] * 5, "has 5 entries, its actions 6 choices"),
        ([False] * 6, "allows no action"),
        ([0, 1, 2, 0, 0, 0], "others than 0 and 1"),
        (None, "neither action_masks\\(\\) nor info\\['action_mask'\\]"),
    ],
)
def test_a_wrong_mask_names_environment_and_step(wrong: Any, says: str) -> None:
    class Wrong(Picky):
        def step(self, action: Any) -> Any:
            *answer, _ = super().step(action)
            return *answer, {} if wrong is None else {"action_mask": wrong}

    envs = make_vector(lambda: Wrong(says="info"), 2, EnvConfig(action_masks="on"))
    obs, _ = envs.reset(seed=0)
    with pytest.raises(EnvironmentFailedError, match=f"env 0 failed at step 1 of episode 0: ValueError: .*{says}"):
        envs.step(obs["action_mask"].argmax(-1))


def test_a_mask_that_leaves_one_of_several_without_a_choice_names_it() -> None:
    env = ActionMasks(Picky((2, 3, 2), says="info"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="allows no action of categorical 1"):
        env._mask({"action_mask": (np.ones(2), np.zeros(3), np.ones(2))})


@pytest.mark.parametrize(
    ("env", "options", "says"),
    [
        ("Pendulum-v1", {"action_masks": "on"}, "masks are of discrete actions"),
        ("klrl/CartPole-v1", {"action_masks": "on"}, "goes with --env.vectorization sync"),
        (lambda: Picky(says="obs"), {"action_masks": "on"}, "have a part 'action_mask' already"),
    ],
)
def test_masks_that_cannot_be_had_are_refused(env: Any, options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        klrl.train("ppo", env, env=options, quiet=True, total_timesteps=100)
    with pytest.raises(UsageError, match=r"SAC takes no action masks: --env\.action-masks off"):
        klrl.train("sac", "Picky-v0", env={"action_masks": "on"}, quiet=True, total_timesteps=100)
    assert not Path("runs").exists()


def test_an_agent_that_takes_no_masks_goes_without_by_default() -> None:
    run = klrl.train("sac", "Picky-v0", quiet=True, total_timesteps=100, learning_starts=50, final_episodes=1)
    assert run.agent.observation_space == Picky().observation_space


def test_environments_without_masks_are_asked_once() -> None:
    made: list[Any] = []

    class Watched(gym.Wrapper[Any, Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(gym.make("CartPole-v1"))
            self.seeds: list[Any] = []
            made.append(self)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.seeds.append(seed)
            return super().reset(seed=seed, options=options)

    make_vector(Watched, 2, EnvConfig()).reset(seed=0)
    assert [len(env.seeds) for env in made] == [1, 1], "no other was made, and none was reset before"
    for env in ("CartPole-v1", "klrl/CartPole-v1", "Pendulum-v1"):
        assert settled(env, 2, EnvConfig()).action_masks == "off"


def test_of_what_a_function_makes_infos_are_obeyed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for way, obeys, said in (("auto", False, 1), ("off", False, 0), ("on", True, 0)):
        envs = make_vector(lambda: Picky(says="info"), 2, EnvConfig(action_masks=way))  # type: ignore[arg-type]
        envs.reset(seed=0)
        envs.reset(seed=1)
        assert isinstance(envs.single_observation_space, spaces.Dict) is obeys
        assert capsys.readouterr().err.count("--env.action-masks on lets policies obey them") == said


def test_asking_leaves_global_random_states_alone() -> None:
    class Drawing(Picky):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            obs, info = super().reset(seed=seed)
            return obs + np.float32(np.random.random()), info

    gym.register("Drawing-v0", Drawing, kwargs={"says": "info"})
    shown = []
    for way in ("auto", "on"):
        np.random.seed(0)
        shown.append(make_vector("Drawing-v0", 2, EnvConfig(action_masks=way)).reset(seed=0)[0])  # type: ignore[arg-type]
    assert (shown[0]["observation"] == shown[1]["observation"]).all()


def test_ones_own_loop() -> None:
    envs = gym.make_vec("Picky-v0", 4, vectorization_mode="sync", wrappers=[ActionMasks])
    agent = PPO(envs.single_observation_space, envs.single_action_space, {"n_steps": 32})
    buffer, results, Picky.crimes = agent.new_buffer(4, envs.metadata["autoreset_mode"]), [], 0
    obs, _ = envs.reset(seed=0)
    for _ in range(128):
        action, last = agent.act(obs), obs
        obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
        buffer.add(last, action, reward, terminated, truncated, obs)
        results += [agent.update(buffer)] if buffer.full else []
    assert len(results) == 4
    assert Picky.crimes == 0


def test_predict_takes_masks_in_both_ways() -> None:
    env = ActionMasks(Picky())
    agent = PPO(env.observation_space, env.action_space)
    raw, mask = np.random.default_rng(0).normal(size=(50, 3)), np.eye(6, dtype=bool)[np.arange(50) % 6]
    for masks in (mask, mask.tolist()):
        assert agent.predict(raw, action_masks=masks)[0].tolist() == mask.argmax(-1).tolist()
    assert agent.predict({"observation": raw, "action_mask": mask})[0].tolist() == mask.argmax(-1).tolist()
    one, _ = agent.predict(raw[0], None, None, True, action_masks=mask[4])
    assert one == 4
    with pytest.raises(UsageError, match="an observation is a dict of action_mask, observation"):
        agent.predict(raw)
    with pytest.raises(UsageError, match="different leading shapes"):
        agent.predict(raw, action_masks=mask[:3])
    other = PPO(Picky().observation_space, env.action_space)
    with pytest.raises(UsageError, match="action_masks: this agent was made for an environment without"):
        other.predict(raw, action_masks=mask)


class Seen(torch.nn.Linear):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space.shape[0], 8)


def test_a_network_of_ones_own_is_shown_the_rest() -> None:
    options = {name: value for name, value in QUICK.items() if name != "hidden_sizes"}
    run = klrl.train("ppo", "Picky-v0", total_timesteps=300, network=Seen, **options)
    assert klrl.load(run.folder).encoder.space == Picky().observation_space
