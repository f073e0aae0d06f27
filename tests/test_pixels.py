"""Pixels: wrappers by name, Atari's signals and its exact resume, which observations are images, and learning from
them."""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK
from test_resume import check_same

import klrl
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector, preset
from klrl.envs.pixels import named_wrappers, say_seen, wrapped
from klrl.envs.probes import Catch
from klrl.envs.wrappers import LEARNED, as_learned
from klrl.errors import UsageError
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.spaces import Numbers, from_json, is_image, is_small_image, to_json

CPU, TWO = torch.device("cpu"), spaces.Discrete(2)
GREY = EnvConfig(wrappers=("grayscale", "resize:84", "stack:4"))


class Colours(gym.Env[Any, Any]):
    """Shows 100 x 120 x 3 pixels of one brightness, the number of steps."""

    observation_space, action_space = spaces.Box(0, 255, (100, 120, 3), np.uint8), TWO

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observe(), 1.0, self.steps == 200, False, {}

    def observe(self) -> Any:
        return np.full((100, 120, 3), self.steps, np.uint8)


class Halved(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return float(reward) / 2


def test_wrappers_are_gymnasiums_in_the_order_given_and_any_class_that_is_imported() -> None:
    with closing(make_vector(Colours, 2, GREY)) as envs:
        obs, _ = envs.reset(seed=0)
        assert (obs.shape, obs.dtype) == ((2, 4, 84, 84), np.uint8)
        for _ in range(101):
            obs, *_ = envs.step(np.zeros(2, np.int64))
    assert obs[:, :, 40, 40].tolist() == [[98, 99, 100, 101]] * 2, "the newest last"
    stacked = wrapped(Colours, named_wrappers(["stack:2"]))
    obs, _ = stacked.reset()
    obs, *_ = stacked.step(0)
    assert obs.shape == stacked.observation_space.shape == (100, 120, 6), "images of several channels stay images"
    assert obs[0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    with closing(make_vector("CartPole-v1", 1, EnvConfig(wrappers=(f"{__name__}:Halved", "stack:3")))) as envs:
        envs.reset(seed=0)
        obs, reward, *_ = envs.step(np.array([0]))
        assert (obs.shape, reward.tolist()) == ((1, 3, 4), [0.5])


@pytest.mark.parametrize(
    ("env", "config", "line"),
    [
        (
            "CartPole-v1",
            {"wrappers": ["grayscal"]},
            r"grayscal \(did you mean 'grayscale'\?\): one of atari, grayscale,",
        ),
        ("CartPole-v1", {"wrappers": ["stack"]}, "stack: give a number, as in stack:4"),
        ("CartPole-v1", {"wrappers": ["resize:0"]}, "resize:0: give a number, as in resize:84"),
        ("CartPole-v1", {"wrappers": ["atari"]}, "atari is for games of the Arcade Learning Environment"),
        ("CartPole-v1", {"wrappers": ["grayscale"]}, "cannot be made with --env.wrappers grayscale: ValueError"),
        (
            "CartPole-v1",
            {"wrappers": ["unheard.of:Wrapper"]},
            "no imported gymnasium.Wrapper class: --import unheard.of",
        ),
        ("CartPole-v1", {"wrappers": ["os:system"]}, "'os:system' is no imported gymnasium.Wrapper class"),
        ("CartPole-v1", {"wrappers": ["stack:2"], "vectorization": "vector"}, "wraps single environments"),
        ("klrl/CartPole-v1", {"wrappers": ["stack:2"]}, "offers only a vector of them"),
        ("ALE/Pung-v5", {}, r"did you mean 'ALE/Pong-v5'\?"),
    ],
)
def test_wrappers_that_do_not_fit_are_refused_in_one_line(env: str, config: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line) as said:
        klrl.train("ppo", env, env=config, **QUICK)
    assert "\n" not in str(said.value)
    assert not Path("runs").exists()


def test_a_game_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UsageError, match=r'this needs ale_py: pip install "klrl\[atari\]"'):
        klrl.train("ppo", "ALE/Pong-v5")


def test_wrappers_of_a_run_are_imported_only_where_the_command_line_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_wrappers.py").write_text("import gymnasium\nclass Same(gymnasium.Wrapper):\n    pass\n")
    monkeypatch.syspath_prepend(Path.cwd())
    quick = ["--total-timesteps", "64", "--n-steps", "8", "--final-episodes", "1", "--eval-every", "0"]
    main(["train", "ppo", "CartPole-v1", *quick, "--env.wrappers", "my_wrappers:Same", "stack:2", "--quiet"])
    folder = next(Path("runs").iterdir())
    monkeypatch.delitem(sys.modules, "my_wrappers")
    for command in (["eval", str(folder)], ["resume", str(folder), "--total-timesteps", "128"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert "--import my_wrappers, if you trust it" in capsys.readouterr().err
        assert "my_wrappers" not in sys.modules
    main(["eval", str(folder), "--episodes", "1", "--import", "my_wrappers"])


def test_what_is_shown_is_said_and_pixels_that_are_too_many_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    say_seen(spaces.Box(0, 255, (4, 84, 84), np.uint8), GREY.wrappers, "CarRacing-v3", False)
    said = capsys.readouterr()
    assert said.out == (
        "wrappers    grayscale resize:84 stack:4: shows 4 x 84 x 84 uint8; --env.wrappers takes others\n"
    )
    assert not said.err
    raw = spaces.Box(0, 255, (210, 160, 3), np.uint8)
    for space, env, option in (
        (raw, "ALE/Pong-v5", "atari"),
        (spaces.Dict(eye=raw), "Mine-v0", "grayscale resize:84 stack:4"),
    ):
        say_seen(space, (), env, True)
        said = capsys.readouterr()
        assert not said.out
        assert said.err == (
            "klrl: 210 x 160 x 3 pixels are slow to learn from, and show no motion: "
            f"--env.wrappers {option} mends both\n"
        )
    say_seen(spaces.Box(0, 255, (96, 96, 3), np.uint8), (), "CarRacing-v3", False)
    assert capsys.readouterr() == ("", "")


def breakout(vectorization: Any = "sync") -> Any:
    return make_vector("ALE/Breakout-v5", 2, EnvConfig(wrappers=("atari",), vectorization=vectorization))


def test_a_lost_life_is_an_end_to_learn_from_in_a_game_that_goes_on_and_fire_begins_the_next() -> None:
    pytest.importorskip("ale_py")
    with closing(breakout()) as envs:
        assert (envs.single_observation_space.shape, envs.single_observation_space.dtype) == ((4, 84, 84), np.uint8)
        game = envs.envs[0].unwrapped
        envs.reset(seed=0)
        ends = 0
        for _ in range(400):
            lives = game.ale.lives()
            _, reward, terminated, truncated, info = envs.step(np.array([2, 3]))
            learned, ended = as_learned(reward, terminated, info)
            assert np.isin(learned, (-1, 0, 1)).all()
            ends += int(ended[0])
            if ended[0] and not terminated[0]:
                assert game.ale.lives() == lives - 1 > 0
                assert not truncated[0]
            if terminated[0]:
                break
        assert game.ale.lives() == 0
        assert ends == 5, "Breakout's five lives, the last of which ends the game"
    assert as_learned(np.array([7.0, 8.0]), np.array([False, True]), {})[0].tolist() == [7.0, 8.0]
    told = {LEARNED: np.array([[1.0, 1.0], [0.0, 0.0]]), f"_{LEARNED}": np.array([True, False])}
    reward, ended = as_learned(np.array([7.0, 8.0]), np.array([False, True]), told)
    assert (reward.tolist(), ended.tolist()) == ([1.0, 8.0], [True, True])


def test_workers_tell_what_is_learned_from_as_this_process_does() -> None:
    pytest.importorskip("ale_py")
    seen = []
    for vectorization in ("sync", "async"):
        with closing(breakout(vectorization)) as envs:
            envs.reset(seed=0)
            rows = []
            for _ in range(60):
                obs, reward, terminated, _, info = envs.step(np.array([2, 3]))
                learned, ended = as_learned(reward, terminated, info)
                rows.append((obs.tobytes(), reward.tolist(), learned.tolist(), ended.tolist()))
            seen.append(rows)
    assert seen[0] == seen[1]
    assert any(any(ended) for *_, ended in seen[0]), "a life was lost"


def test_pong_takes_the_usual_preprocessing_by_the_preset_of_all_games(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ale_py")
    assert preset("ppo", "ALE/Pong-v5") == preset("ppo", "ALE/Breakout-v5")
    assert preset("ppo", "ALE/Pong-v5")["env"] == {"wrappers": ["atari"]}
    how = QUICK | {"total_timesteps": 16, "n_steps": 8, "n_envs": 2, "eval_every": 0, "final_episodes": 0}
    run = klrl.train("ppo", "ALE/Pong-v5", **{**how, "quiet": False})
    assert "wrappers    atari: shows 4 x 84 x 84 uint8; learns from rewards' signs" in capsys.readouterr().out
    assert run.config.env.wrappers == ("atari",)
    assert run.agent.config.clip_range == 0.1
    row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 16
    main(["list"])
    assert "not measured" in capsys.readouterr().out


def test_a_game_goes_on_bit_for_bit_within_a_life() -> None:
    pytest.importorskip("ale_py")
    how = {"n_envs": 2, "n_steps": 40, "batch_size": 40, "n_epochs": 1, "eval_every": 0, "histogram_every": 1}
    check_same("ppo", "ALE/Breakout-v5", 80, **how, final_episodes=0)


LARGE: list[tuple[tuple[int, ...], Any, float, tuple[int, ...]]] = [
    ((84, 84), np.uint8, 255, (1, 84, 84)),
    ((4, 84, 84), np.uint8, 255, (4, 84, 84)),
    ((40, 40, 6), np.bool_, 1, (6, 40, 40)),
    ((84, 84, 3), np.float32, 1, (3, 84, 84)),
    ((3, 40, 50), np.float32, 255, (3, 40, 50)),
]
SMALL = [((7, 7, 3), np.uint8, 255), ((10, 10, 6), np.bool_, 1), ((3, 14, 20), np.float32, 1)]
NONE = [((36, 3, 36), np.uint8, 255), ((8, 8, 3), np.float32, 2), ((10, 10), np.uint8, 255), ((6, 5, 9), np.float32, 1)]


@pytest.mark.parametrize(("shape", "dtype", "high", "channels_first"), LARGE)
def test_large_images_stay_as_they_are_until_the_network(
    shape: Any, dtype: Any, high: float, channels_first: Any
) -> None:
    space = spaces.Box(0, high, shape, dtype)
    assert is_image(from_json(json.loads(json.dumps(to_json(space)))))
    encoder = ObservationEncoder(space, CPU, normalize=True)
    image = encoder(np.stack([space.low, space.high]))["image "]
    floats = np.issubdtype(dtype, np.floating)
    assert (tuple(image.shape), image.dtype) == ((2, *channels_first), torch.float32 if floats else torch.uint8)
    assert [(part.min(), part.max()) for part in image] == [(0, 0), ((1, 1) if floats else (255, 255))]
    for agent in (klrl.PPO(space, TWO), klrl.SAC(space, TWO, {"buffer_size": 10})):
        assert np.shape(agent.predict(space.sample())[0]) == ()
        buffer, no = agent.new_buffer(1), np.zeros(1, bool)
        buffer.add(space.sample()[None], np.zeros((1, 1), np.int64), np.zeros(1), no, no, space.sample()[None])


@pytest.mark.parametrize(("shape", "dtype", "high"), SMALL)
def test_small_images_are_normalised_as_numbers_and_seen_by_a_small_convolutional_net(
    shape: Any, dtype: Any, high: float
) -> None:
    space = spaces.Box(0, high, shape, dtype)
    assert is_small_image(from_json(json.loads(json.dumps(to_json(space)))))
    both = spaces.Dict(a=spaces.Box(-1, 1, (2,)), eye=space, z=spaces.Discrete(3))
    agent, shown = klrl.PPO(both, TWO), both.sample()
    torso: Any = agent.policy.network.torso  # type: ignore[union-attr]
    inputs = agent.encoder({key: np.asarray(part)[None] for key, part in shown.items()})
    size = int(np.prod(shape))
    assert inputs["vector"].shape == (1, 2 + size + 3)
    seen = torso(inputs)
    assert seen.shape == (1, torso.width) == (1, 128 + 2 + 3)
    assert torch.equal(seen[:, 128:], inputs["vector"][:, [0, 1, -3, -2, -1]])
    image = inputs["vector"][:, 2 : 2 + size].reshape(1, *shape)
    first = image if shape[0] < shape[2] else image.permute(0, 3, 1, 2)
    assert torch.equal(seen[:, :128], torso.small_nets[0](first))
    assert not klrl.PPO(space, TWO).encoder.plain
    alone = klrl.PPO(space, TWO, {"normalize_observation": False})
    acted, seen_by = alone.policy.outputs(space.sample()[None]), alone.policy.network
    assert acted.shape == (1, 2)
    other = space.sample()[None]
    assert np.allclose(alone.policy.outputs(other), seen_by(alone.encoder(other)).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(("shape", "dtype", "high"), NONE)
def test_what_is_no_image_stays_a_vector(shape: Any, dtype: Any, high: float) -> None:
    space = spaces.Box(0, high, shape, dtype)
    assert not is_image(space)
    assert not is_small_image(space)
    assert klrl.PPO(space, TWO).policy.network.torso.is_plain  # type: ignore[union-attr]


def test_a_channels_last_image_is_seen_as_the_same_image_with_its_channels_first() -> None:
    rng = np.random.default_rng(0)
    for dtype, high, size in ((np.float32, 1, (40, 37)), (np.uint8, 255, (40, 37)), (np.uint8, 255, (12, 9))):
        last, first = (spaces.Box(0, high, shape, dtype) for shape in ((*size, 3), (3, *size)))
        image = (rng.random((5, *size, 3)) * high).astype(dtype)
        one = klrl.PPO(last, TWO).distribution(image).logits
        assert torch.allclose(one, klrl.PPO(first, TWO).distribution(image.transpose(0, 3, 1, 2)).logits, atol=1e-6)


class Before(Catch):
    """Catch as runs had it that took its 10 x 10 bytes for numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Numbers(0, 255, (10, 10, 1), np.uint8)


def test_runs_that_took_an_image_for_numbers_go_on_with_numbers() -> None:
    def plain(agent: Any) -> bool:
        return bool(agent.policy.network.torso.is_plain)

    how = {**QUICK, "total_timesteps": 256, "final_episodes": 1}
    assert not plain(klrl.train("ppo", Catch, **how).agent)
    run = klrl.train("ppo", Before, **how)
    assert plain(run.agent)
    assert plain(klrl.load(run.folder))
    resumed = klrl.resume(run.folder, Catch, total_timesteps=512)
    assert plain(resumed.agent)
    assert plain(klrl.load(resumed.folder))
    assert len(resumed.evaluate(episodes=2).returns) == 2


def test_catch_is_learned_from_five_by_five_pixels() -> None:
    small = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "eval_every": 0, "hidden_sizes": [32], "quiet": True}
    run = klrl.train("ppo", lambda: Catch(5), total_timesteps=5_000, **small)
    assert run.score.mean >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_catch_is_learned_from_pixels_as_large_as_atari_s(seed: int) -> None:
    settings = {"n_steps": 64, "batch_size": 128, "n_epochs": 4, "eval_every": 0, "hidden_sizes": [], "quiet": True}
    how = {"env": {"kwargs": {"cells": 7, "scale": 12}}, **settings}
    assert klrl.train("ppo", "klrl/Catch-v0", total_timesteps=20_000, seed=seed, **how).score.mean >= 0.9
