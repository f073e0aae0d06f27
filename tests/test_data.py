"""What flows from environments to agents: spaces, observations, buffers, advantages."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from klrl.buffers.returns import RewardScale, gae
from klrl.buffers.rollout import RolloutBuffer
from klrl.errors import NonFiniteError, UsageError
from klrl.policies import spaces as klrl_spaces
from klrl.policies.encoder import ObservationEncoder

CPU = torch.device("cpu")


def test_running_statistics_equal_those_of_all_data_and_skip_reset_rows() -> None:
    encoder = ObservationEncoder(spaces.Box(-np.inf, np.inf, (2,)), CPU, normalize=True)
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(300, 2)) * [1.0, 50.0] + [1e3, -2.0]).astype(np.float32)
    valid = torch.from_numpy(rng.random(300) < 0.8)
    for part in (slice(0, 100), slice(100, 300)):
        encoder.update(data[part], valid[part])
    kept = data[valid.numpy()].astype(np.float64)
    assert np.allclose(encoder.mean.numpy(), kept.mean(0), rtol=1e-5)
    assert np.allclose(encoder.var.numpy(), kept.var(0), rtol=1e-4)
    assert np.allclose(encoder.to_numpy(data), encoder(data)["vector"].numpy(), atol=1e-4)


def test_dict_observations_are_encoded_part_by_part() -> None:
    space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (40, 50, 3), np.uint8),
            "room": spaces.Discrete(3, start=1),
            "speed": spaces.Box(-1, 1, (2,)),
        }
    )
    encoder = ObservationEncoder(space, CPU, normalize=True)
    obs = {key: np.stack([part.sample() for _ in range(4)]) for key, part in space.spaces.items()}
    inputs = encoder(obs)
    assert inputs["image camera"].shape == (4, 3, 40, 50)
    assert inputs["vector"].shape == (4, 5)
    assert torch.equal(inputs["vector"][:, :3].argmax(1), torch.from_numpy(obs["room"]) - 1)
    turned = spaces.Dict([(key, space[key]) for key in ("speed", "room", "camera")])
    assert list(turned) != list(space)
    assert torch.equal(ObservationEncoder(turned, CPU, normalize=True)(obs)["vector"], inputs["vector"])


def test_spaces_survive_json_and_others_are_refused_with_a_remedy() -> None:
    everything = [
        spaces.MultiDiscrete([2, 4, 3]),
        spaces.MultiBinary(4),
        spaces.MultiBinary([2, 3]),
        spaces.Box(-np.inf, np.inf, (3,)),
        spaces.Box(np.float32([0, -1]), np.float32([1, np.inf])),
        spaces.Discrete(3, start=-1),
        spaces.Discrete(3, dtype=np.int32),
        spaces.MultiDiscrete([2, 3], dtype=np.int32),
        spaces.Box(-1, 1, ()),
        spaces.Dict({"a": spaces.Box(0, 255, (36, 36, 1), np.uint8), "b": spaces.Discrete(2)}),
    ]
    for space in everything:
        assert klrl_spaces.from_json(klrl_spaces.to_json(space)) == space
    for bad in (spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3), spaces.Graph(spaces.Discrete(2), None)):
        with pytest.raises(UsageError, match=r"gymnasium\.wrappers"):
            klrl_spaces.check_observation_space(bad)
        with pytest.raises(UsageError, match=r"gymnasium\.wrappers"):
            klrl_spaces.check_action_space(bad)


def test_gae_matches_a_hand_computed_example() -> None:
    reward = np.array([[1.0], [2.0], [3.0]], np.float32)
    value = np.array([[0.5], [1.0], [1.5], [4.0]], np.float32)
    no = np.zeros((3, 1), np.bool_)
    advantage, returns = gae(reward, value[:-1], value[1:], no, no, gamma=0.5, gae_lambda=0.5)
    # deltas: 1 + 0.5*1 - 0.5 = 1; 2 + 0.5*1.5 - 1 = 1.75; 3 + 0.5*4 - 1.5 = 3.5; decay 0.25
    assert advantage.flatten().tolist() == pytest.approx([1 + 0.25 * (1.75 + 0.25 * 3.5), 1.75 + 0.25 * 3.5, 3.5])
    assert returns.flatten().tolist() == pytest.approx((advantage + value[:-1]).flatten().tolist())


def test_truncation_bootstraps_final_value_and_termination_does_not() -> None:
    reward, value = (
        np.ones((2, 2), np.float32),
        np.array([[0.0, 0.0], [10.0, 10.0], [99.0, 99.0]], np.float32),
    )
    terminated = np.array([[True, False], [False, False]])
    truncated = np.array([[False, True], [False, False]])
    ended = terminated | truncated
    advantage, _ = gae(reward, value[:-1], value[1:], terminated, ended, gamma=0.9, gae_lambda=1.0)
    assert advantage[0].tolist() == pytest.approx([1.0, 1.0 + 0.9 * 10.0]), "and nothing leaks from the next episode"


def test_reward_scale_is_the_deviation_of_the_discounted_return() -> None:
    rng = np.random.default_rng(0)
    scale, gamma = RewardScale(0.9), 0.9
    reward = rng.normal(size=(50, 3)).astype(np.float32) * 7
    ended = rng.random((50, 3)) < 0.1
    running, seen = np.zeros(3), []
    for t in range(50):
        running = running * gamma + reward[t]
        seen.append(running.copy())
        running[ended[t]] = 0
    half = [
        scale(reward[:25], ended[:25], np.ones((25, 3), bool)),
        scale(reward[25:], ended[25:], np.ones((25, 3), bool)),
    ]
    assert np.allclose(half[1], reward[25:] / np.std(seen), rtol=1e-4)


@pytest.mark.parametrize("unit", [1e-12, 1e-5, 1e8])
def test_the_scale_of_rewards_does_not_depend_on_their_unit(unit: float) -> None:
    reward = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    ended, valid = np.zeros((50, 3), np.bool_), np.ones((50, 3), np.bool_)
    scaled = [RewardScale(0.9)((reward * factor).astype(np.float32), ended, valid) for factor in (1.0, unit)]
    assert np.allclose(scaled[1], scaled[0], rtol=1e-4)


def test_rewards_without_variance_are_left_alone() -> None:
    scale, ended = RewardScale(0.99), np.ones((5, 2), np.bool_)
    assert scale(np.ones((5, 2), np.float32), ended, ended).tolist() == [[1.0, 1.0]] * 5
    assert scale(np.ones((5, 3), np.float32), np.ones((5, 3), np.bool_), np.ones((5, 3), np.bool_)).shape == (5, 3)


def test_buffer_marks_the_rows_that_only_reset() -> None:
    env = gym.make_vec("klrl.envs:klrl/Truncation-v0", 1, vectorization_mode="sync")
    buffer = RolloutBuffer(env.single_observation_space, env.single_action_space, 8, 1)
    obs, _ = env.reset(seed=0)
    for _ in range(8):
        next_obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        buffer.add(obs, np.zeros((1, 1), np.int64), reward, terminated, truncated, next_obs)
        obs = next_obs
    assert buffer.valid[:, 0].tolist() == [True] * 5 + [False] + [True] * 2
    assert buffer.truncated[:, 0].tolist() == [False] * 4 + [True] + [False] * 3
    assert isinstance(buffer.obs, np.ndarray)
    assert buffer.obs[5, 0, 0] == 1.0, "row 5 shows the true final observation"
    assert buffer.obs[6, 0, 0] == -1.0, "row 6 the one after the reset"


def test_non_finite_facts_are_named() -> None:
    buffer = RolloutBuffer(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), 2, 3)
    zeros, no = np.zeros((3, 2), np.float32), np.zeros(3, np.bool_)
    for t in range(2):
        reward = np.array([0.0, 0.0, np.nan if t == 1 else 0.0])
        buffer.add(zeros, np.zeros((3, 1), np.int64), reward, no, no, zeros)
    with pytest.raises(NonFiniteError, match="reward is nan in env 2 at step 1"):
        buffer.check_finite()
    buffer.obs[2, 1, 0] = np.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="reward is nan in env 2 at step 1"):
        buffer.check_finite()
    buffer.obs[1, 1, 0] = np.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="observation is nan in env 1 at step 1"):
        buffer.check_finite()
    with pytest.raises(ValueError, match="action has shape"):
        buffer.add(zeros, np.zeros(3), np.zeros(3), no, no, zeros)
