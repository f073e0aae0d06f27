"""Observations are of their space, in every form they come in, or refused in one line: by agents and by buffers."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK

import klrl
from klrl.buffers.replay import ReplayBuffer
from klrl.buffers.rollout import RolloutBuffer
from klrl.errors import UsageError
from klrl.policies import spaces as klrl_spaces
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.observations import Layout

BOX, TWO = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)
HWC = spaces.Box(0, 255, (40, 50, 3), np.uint8)
AGENTS: list[Any] = [klrl.PPO, klrl.TRPO, klrl.SAC]
KEYED = spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Discrete(3)})
NESTED = spaces.Dict(arm=spaces.Dict(at=spaces.Box(-1, 1, (3,)), on=spaces.MultiBinary(2)), which=spaces.Discrete(3))


def lines(space: Any, obs: Any, agent: Any = klrl.PPO) -> set[str]:
    """What act says to ``obs``, and predict if it says anything."""
    made = agent(space, TWO)
    with pytest.raises(UsageError) as said:
        made.act(obs)
    assert "\n" not in str(said.value)
    return {str(said.value)}


@pytest.mark.parametrize("agent", AGENTS)
def test_observations_of_another_shape_are_refused_and_both_shapes_named(agent: Any) -> None:
    made = agent(BOX, TWO)
    with pytest.raises(UsageError, match=r"observation has shape \(4,\), expected \(N, 4\).* predict alone takes one"):
        made.act(np.zeros(4, np.float32))
    for bad in (np.zeros((4, 1)), np.zeros((2, 8)), np.zeros(()), np.zeros((3, 2, 2))):
        for ask in (made.act, made.predict, made.distribution, made.value):
            with pytest.raises(UsageError, match=r"observation has shape .*, expected \(\.\.\., 4\)"):
                ask(bad)
    with pytest.raises(UsageError, match=r"observation has shape \(2, 3, 4\), expected \(N, 4\)"):
        made.predict(np.zeros((2, 3, 4)))
    assert made.distribution(np.zeros((2, 3, 4))).entropy().shape == (6,), "the encoder takes any leading shape"


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("space", [BOX, KEYED, NESTED, TWO], ids=["box", "dict", "nested", "discrete"])
def test_lists_and_tensors_are_taken_as_arrays(agent: Any, space: Any) -> None:
    def each(obs: Any, form: Any) -> Any:
        return {key: each(part, form) for key, part in obs.items()} if isinstance(obs, dict) else form(obs)

    made, one = agent(space, TWO), space.sample()
    action, _ = made.predict(one, deterministic=True)
    assert np.shape(action) == ()
    for form in (lambda x: np.asarray(x).tolist(), torch.tensor, lambda x: torch.tensor(np.array([x, x]))):
        given = made.predict(each(one, form), deterministic=True)[0]
        assert np.array_equal(np.broadcast_to(action, given.shape), given)


def test_what_are_no_numbers_of_the_space_is_refused() -> None:
    assert lines(BOX, [[0.0, 0, 0, 0], [0, 0]]).pop().startswith("observation is no array of numbers")
    assert lines(BOX, np.full((2, 4), "x")) == {
        "observation is of type <U1, expected numbers, as its space's float32",
    }
    assert "expected whole numbers" in lines(TWO, np.array([0.5])).pop()
    assert "lies outside of its space Discrete(2)" in lines(TWO, np.array([2])).pop()
    assert "lies outside of its space MultiDiscrete" in lines(spaces.MultiDiscrete([2, 3]), np.array([[2, 0]])).pop()
    assert lines(KEYED, {"a": np.zeros(2, int)}) == {"the observation has no 'b': expected a, b"}
    assert lines(KEYED, np.zeros((2, 2))) == {"an observation is a dict of a, b, got ndarray"}
    assert "different leading shapes" in lines(KEYED, {"a": np.zeros(2, int), "b": np.zeros((3, 2))}).pop()


@pytest.mark.parametrize("space", [HWC, spaces.Box(0, 255, (3, 40, 50), np.uint8)], ids=["HWC", "CHW"])
def test_an_image_with_its_channels_at_the_other_end_is_transposed_not_reshaped(space: Any) -> None:
    agent, image = klrl.PPO(space, TWO), space.sample()
    axes = (2, 0, 1) if space is HWC else (1, 2, 0)
    expected = agent.distribution(image[None]).logits
    assert torch.equal(agent.distribution(image.transpose(axes)[None]).logits, expected)
    assert torch.equal(agent.distribution(image.astype(np.int64)).logits, expected), "whole numbers are bytes, too"
    assert np.shape(agent.predict(image.transpose(axes))[0]) == ()
    assert np.shape(agent.predict(np.stack([image.transpose(axes)] * 2))[0]) == (2,)
    with pytest.raises(UsageError, match=r"observation has shape \(1, 50, 40, 3\), expected"):
        agent.act(np.zeros((1, 50, 40, 3), np.uint8))
    with pytest.raises(
        UsageError, match="observation is of type float32, expected whole numbers, as its space's uint8"
    ):
        agent.act(image[None] / np.float32(255))
    with pytest.raises(UsageError, match=r"observation lies in 0 to 256, expected 0 to 255"):
        agent.act(np.where(np.arange(image.size) == 7, 256, 0).reshape(1, *space.shape))


def test_bytes_whose_channels_stand_nowhere_are_a_vector_and_empty_spaces_are_refused() -> None:
    odd = spaces.Box(0, 255, (36, 3, 36), np.uint8)
    assert not klrl_spaces.is_image(odd)
    agent = klrl.PPO(odd, TWO)
    assert agent.encoder.features == 36 * 3 * 36
    assert np.shape(agent.predict(odd.sample())[0]) == ()
    for kind in AGENTS:
        with pytest.raises(UsageError, match=r"observation space Box\(.*\(0,\), float32\) is empty"):
            kind(spaces.Box(-1, 1, (0,)), TWO)


def test_choices_are_one_hot_as_gymnasium_flattens_them() -> None:
    for space in (spaces.MultiDiscrete([3, 4], start=[1, -2]), spaces.MultiBinary([2, 3]), spaces.Discrete(4, start=2)):
        some = np.stack([space.sample() for _ in range(20)])
        encoder = ObservationEncoder(space, torch.device("cpu"), normalize=True)
        expected = np.stack([spaces.flatten(space, one) for one in some])
        assert np.array_equal(encoder(some)["vector"].numpy(), expected)


class Seen(gym.Env[Any, Any]):
    """Shows what its space has, and rewards the first of two actions."""

    action_space = TWO

    def __init__(self, space: Any) -> None:
        self.observation_space = space
        self.t = 0

    def look(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.look(), float(action == 0), self.t == 7, False, {}


SPACES = {
    "multidiscrete": spaces.MultiDiscrete([3, 4], start=[1, -2]),
    "multibinary": spaces.MultiBinary([2, 3]),
    "nested": NESTED,
    "whole keys": spaces.Dict({0: spaces.Box(-1, 1, (2,)), 11: spaces.Discrete(4)}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "trpo": {"n_steps": 32},
    "sac": {"learning_starts": 40, "hidden_sizes": (8,), "batch_size": 16, "kl": {"every": 50}},
}


@pytest.mark.parametrize(
    ("agent", "kind"),
    [
        *((agent, "nested") for agent in OPTIONS),
        ("ppo", "multidiscrete"),
        ("trpo", "multibinary"),
        ("sac", "whole keys"),
    ],
)
def test_every_space_trains_predicts_and_resumes(agent: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = SPACES[kind]
    common: dict[str, Any] = {"n_envs": 2, "quiet": True, "eval_every": 0, **OPTIONS[agent]}
    run = klrl.train(agent, lambda: Seen(space), total_timesteps=150, **common)
    again = klrl.resume(run.folder, env=lambda: Seen(space), total_timesteps=250)
    assert "cannot be replayed" not in capsys.readouterr().err
    loaded = klrl.load(run.folder)
    assert loaded.observation_space == space
    one = space.sample()
    assert loaded.predict(one, deterministic=True)[0] == again.agent.predict(one, deterministic=True)[0]


def test_buffers_refuse_what_they_would_drop_or_broadcast() -> None:
    obs, no = np.zeros((4, 4), np.float32), np.zeros(4, bool)
    for buffer, action in (
        (RolloutBuffer(BOX, TWO, 8, 4), np.zeros((4, 1), np.int64)),
        (ReplayBuffer(BOX, 1, 100, 4, 0.9), np.zeros((4, 1), np.float32)),
    ):
        good: dict[str, Any] = {"obs": obs, "action": action, "reward": np.zeros(4)}
        good |= {"terminated": no, "truncated": no, "next_obs": obs}
        buffer.add(**good)
        buffer.add(**good | {"reward": [0, 0, 0, 1], "terminated": [0, 0, 0, 1], "obs": obs.tolist()})
        buffer.forget_unfinished()
        six = {key: np.concatenate([part, part[:2]]) for key, part in good.items()}
        with pytest.raises(UsageError, match=r"action has shape \(6, 1\), expected \(4, 1\)"):
            buffer.add(**six)
        for key, bad, said in (
            ("obs", obs[0], r"observation has shape \(4,\), expected \(4, 4\)"),
            ("obs", obs[:1], r"observation has shape \(1, 4\), expected \(4, 4\)"),
            ("next_obs", np.zeros((6, 4), np.float32), r"observation has shape \(6, 4\), expected \(4, 4\)"),
            ("reward", np.zeros((4, 1)), r"reward has shape \(4, 1\), expected \(4,\)"),
            ("reward", 1.0, r"reward has shape \(\), expected \(4,\)"),
            ("reward", np.full(4, "1.5"), "reward is of type <U3, expected numbers"),
            ("terminated", np.full(4, "False"), "terminated is of type <U5, expected numbers"),
            ("truncated", np.full(4, 0.5), "truncated is .*, expected True or False"),
        ):
            with pytest.raises(UsageError, match=said):
                buffer.add(**good | {key: bad})


def test_odd_autoreset_modes_devices_and_seeds_are_refused_in_one_line() -> None:
    for mode in ("same_step", "", None, 3):
        with pytest.raises(UsageError, match=r"autoreset must be an AutoresetMode or one of 'NextStep', 'SameStep'"):
            klrl.PPO(BOX, TWO).new_buffer(2, autoreset=mode)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"autoreset must be an AutoresetMode or one of"):
            klrl.SAC(BOX, TWO).new_buffer(2, autoreset=mode)  # type: ignore[arg-type]
    for agent in AGENTS:
        for device in ("gpu", 1.5, "cuda:99"):
            with pytest.raises(UsageError, match=f"--device {device} cannot be used"):
                agent(BOX, TWO, device=device)
        for seed in (-1, 1.5, "one", True):
            with pytest.raises(UsageError, match="--seed must be"):
                agent(BOX, TWO, seed=seed)
        assert (
            agent(BOX, TWO, seed=np.int64(3)).rng.bit_generator.state == agent(BOX, TWO, seed=3).rng.bit_generator.state
        )


def test_integers_that_their_space_cannot_hold_are_refused() -> None:
    agent = klrl.PPO(spaces.Box(-100, 100, (2,), np.int8), TWO)
    assert agent.act(np.array([[3, -100]])).shape == (1, 1)
    with pytest.raises(UsageError, match="observation lies in 0 to 180, expected -128 to 127"):
        agent.act(np.array([[0, 180]]))


def test_a_dict_whose_only_key_is_empty_resumes() -> None:
    class Nameless(gym.ObservationWrapper[Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(gym.make("CartPole-v1"))
            self.observation_space = spaces.Dict({"": self.env.observation_space})

        def observation(self, observation: Any) -> Any:
            return {"": observation}

    run = klrl.train("ppo", Nameless, **QUICK | {"total_timesteps": 300})
    assert klrl.resume(run.folder, env=Nameless, total_timesteps=600).score.mean > 0


@pytest.mark.parametrize(
    "space", [spaces.Discrete(2, dtype=np.int32, start=3), spaces.MultiDiscrete([3, 4], dtype=np.int8), TWO]
)
def test_actions_have_the_type_of_their_space(space: Any) -> None:
    agent = klrl.PPO(BOX, space)
    (taken,) = agent.env_action(agent.act(np.zeros((1, *BOX.shape), np.float32)))
    assert space.contains(taken)


@pytest.mark.parametrize(("action", "said"), [(0.5, "fractions"), (2, "lie in 2 to 2"), (-1, "lie in -1 to -1")])
def test_actions_that_a_space_does_not_have_are_refused(action: Any, said: str) -> None:
    agent = klrl.PPO(BOX, TWO, {"n_steps": 2})
    buffer, obs, no = agent.new_buffer(1), np.zeros((1, *BOX.shape), np.float32), np.zeros(1, bool)

    def learn() -> None:
        for _ in range(2):
            buffer.add(obs, np.array([[action]]), np.ones(1), no, no, obs)
        agent.update(buffer)

    with pytest.raises(UsageError, match=said):
        learn()


def test_a_batch_that_was_seen_before_is_still_counted() -> None:
    layout, six = Layout(BOX), np.zeros((6, *BOX.shape), np.float32)
    for _ in range(2):
        assert layout.batch(six) is six
        with pytest.raises(UsageError, match=r"observation has shape \(6, 4\), expected \(4, 4\)"):
            layout.batch(six, 4)
    with pytest.raises(UsageError, match=r"expected \(N, 4\)"):
        layout.batch(six[0])
