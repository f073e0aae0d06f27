"""Whatever environments do at an episode's end, the same episodes give the same advantages and the same transitions."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.buffers.replay import ReplayBuffer
from klrl.buffers.rollout import RolloutBuffer

MODES = ["NextStep", "SameStep", "Disabled"]
LENGTHS = (3, 5, 1, 4)  # of the episodes, in turn
N_ENVS, STEPS = 3, 40
Moment = tuple[int, int, int]
"""Environment, episode, step: what an observation tells."""


class Episodes(gym.Env[Any, Any]):
    """Says in every observation which episode and step it is, whatever is done; every other episode terminates, the
    others are truncated."""

    action_space = spaces.Discrete(2)

    def __init__(self, number: int, kind: str = "box") -> None:
        self.number, self.kind, self.episode, self.t = number, kind, -1, 0
        moment = spaces.Box(-100, 100, (3,), np.float32)
        self.observation_space: Any = {
            "box": moment,
            "dict": spaces.Dict({"a": moment, "b": spaces.Discrete(8)}),
            "discrete": spaces.Discrete(3 * 40 * 8),
        }[kind]

    def look(self) -> Any:
        moment = np.array([self.number, self.episode, self.t], np.float32)
        code = (self.number * 40 + self.episode) * 8 + self.t
        return {"box": moment, "dict": {"a": moment, "b": self.t}, "discrete": code}[self.kind]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.t == LENGTHS[(self.episode + self.number) % len(LENGTHS)]
        terminates = self.episode % 2 == 1
        return self.look(), float(np.sin(7 * self.episode + self.t)), over and terminates, over and not terminates, {}


def moments(obs: Any) -> list[Moment]:
    """What observations [..., *shape] tell."""
    if isinstance(obs, dict):
        assert np.array_equal(obs["a"][..., 2], obs["b"])
        obs = obs["a"]
    elif obs.dtype == np.int64:
        obs = np.stack([obs // 320, obs // 8 % 40, obs % 8], axis=-1)
    return [tuple(map(int, row)) for row in obs.reshape(-1, 3)]  # type: ignore[misc]


def length(moment: Moment) -> int:
    return LENGTHS[(moment[1] + moment[0]) % len(LENGTHS)]


def play(mode: str, kind: str, agent: Any, buffer: Any, steps: int) -> None:
    """Steps of real environments in that mode, as a loop of one's own makes them."""
    envs = SyncVectorEnv(
        [lambda i=i: Episodes(i, kind) for i in range(N_ENVS)],  # type: ignore[misc]
        autoreset_mode=AutoresetMode(mode),
    )
    obs, _ = envs.reset(seed=0)
    for _ in range(steps):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, info = envs.step(agent.env_action(action))
        final_obs = info.get("final_obs") if mode == "SameStep" else None
        buffer.add(obs, action, reward, terminated, truncated, next_obs, final_obs)
        ended = terminated | truncated
        if mode == "Disabled" and ended.any():
            next_obs, _ = envs.reset(options={"reset_mask": ended})
        obs = next_obs
    envs.close()


SPACES = {kind: Episodes(0, kind).observation_space for kind in ("box", "dict", "discrete")}


def on_policy(kind: str, agent: Any = PPO, config: Any = PPOConfig) -> Any:
    plain = dict.fromkeys(("normalize_advantage", "normalize_observation", "normalize_reward"), False)
    options = config(n_steps=STEPS, gamma=0.9, gae_lambda=0.8, hidden_sizes=(8,), **plain)
    return agent(SPACES[kind], spaces.Discrete(2), options, seed=0)


def advantages(mode: str, kind: str) -> dict[Moment, float]:
    """The advantage of each step of the episodes that ended."""
    agent = on_policy(kind)
    buffer = RolloutBuffer(agent.observation_space, agent.action_space, STEPS, N_ENVS, autoreset=mode)
    play(mode, kind, agent, buffer, STEPS)
    batch = agent.make_batch(buffer)
    seen = moments(buffer.obs_before_steps())
    assert batch.mask.tolist() == buffer.valid.flatten().tolist()
    rows = zip(seen, batch.advantage.tolist(), batch.mask.tolist(), strict=True)
    found = [(moment, advantage) for moment, advantage, counts in rows if counts]
    assert len(dict(found)) == len(found), "each step counts once"
    return {moment: x for moment, x in found if (*moment[:2], length(moment) - 1) in dict(found)}


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_the_same_episodes_have_the_same_advantages(kind: str) -> None:
    found = {mode: advantages(mode, kind) for mode in MODES}
    shared = found["NextStep"]
    assert len(shared) > 60
    assert {moment[1] for moment in shared} >= {0, 1, 2, 3, 4, 5, 6, 7}
    for mode in MODES[1:]:
        assert shared.keys() <= found[mode].keys(), "and more of them where no row is spent on resets"
        assert len(found[mode]) > len(shared)
        for moment, advantage in shared.items():
            assert found[mode][moment] == pytest.approx(advantage, abs=1e-5)
    assert found["SameStep"] == pytest.approx(found["Disabled"], abs=1e-5)
    # And they are right: those of the last steps are r - V(s) + gamma V(s'), V(s') being 0 after a termination.
    agent = on_policy("box")
    if kind == "box":
        for moment, advantage in shared.items():
            env, episode, t = moment
            if t == length(moment) - 1:
                here, final = agent.value(np.array([moment, (env, episode, t + 1)], np.float32)).tolist()
                bootstrap = 0.0 if episode % 2 == 1 else 0.9 * final
                assert advantage == pytest.approx(np.sin(7 * episode + t + 1) + bootstrap - here, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_a_mode_that_spends_rows_on_resets_masks_them(mode: str) -> None:
    agent = on_policy("box")
    buffer = RolloutBuffer(agent.observation_space, agent.action_space, STEPS, N_ENVS, autoreset=mode)
    play(mode, "box", agent, buffer, STEPS)
    assert bool(buffer.valid.all()) == (mode != "NextStep")
    obs: Any = buffer.obs
    starts = obs[:-1, :, 2] == 0
    assert buffer.valid[starts].all()
    ended = buffer.terminated | buffer.truncated
    after = np.zeros_like(ended)
    after[1:] = ended[:-1]
    assert np.array_equal(buffer.valid, ~after) == (mode == "NextStep")


@pytest.mark.parametrize("mode", MODES)
def test_a_half_full_buffer_goes_on_from_its_state(mode: str) -> None:
    agent = on_policy("box")
    whole, half = (
        RolloutBuffer(agent.observation_space, agent.action_space, STEPS, N_ENVS, autoreset=mode) for _ in range(2)
    )
    play(mode, "box", agent, whole, 17)
    half.load_state_dict(whole.state_dict())
    assert torch.equal(torch.tensor(half.valid[:17]), torch.tensor(whole.valid[:17]))
    value = np.arange((STEPS + 1) * N_ENVS, dtype=np.float32).reshape(STEPS + 1, N_ENVS)
    both = [each.values_of_next(value, lambda obs: obs[:, 1] * 1000) for each in (whole, half)]
    assert np.array_equal(*both)
    assert (both[0] >= 1000).any() == (mode != "NextStep")
    assert np.array_equal(whole._ended, half._ended)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("agent", "config"), [(PPO, PPOConfig), (TRPO, TRPOConfig)])
def test_agents_learn_from_either(agent: Any, config: Any, mode: str) -> None:
    learner = on_policy("dict", agent, config)
    buffer = RolloutBuffer(learner.observation_space, learner.action_space, STEPS, N_ENVS, autoreset=mode)
    for _ in range(2):
        buffer.forget_unfinished()  # the environments are new ones
        play(mode, "dict", learner, buffer, STEPS)
        assert learner.update(buffer).kl.mean > 0


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_the_same_episodes_are_the_same_transitions(kind: str, n_step: int) -> None:
    agent = SAC(SPACES[kind], spaces.Discrete(2), SACConfig(hidden_sizes=(8,)))
    found: dict[str, dict[Any, Any]] = {}
    for mode in MODES:
        buffer = ReplayBuffer(SPACES[kind], 1, 1000, N_ENVS, gamma=0.9, n_step=n_step, autoreset=mode)
        play(mode, kind, agent, buffer, STEPS)
        before, _, reward, discount, after = (buffer._rows[: buffer.size, column] for column in buffer._columns)
        rows = zip(before, np.c_[reward, discount, after], strict=True)
        found[mode] = {tuple(key): tuple(value) for key, value in rows}
        assert len(found[mode]) == buffer.size, "no transition is stored twice"
        assert buffer.steps == (N_ENVS * STEPS if mode != "NextStep" else buffer.steps)
    shared = found["NextStep"]
    assert 60 < len(shared) < len(found["SameStep"])
    assert found["SameStep"] == found["Disabled"]
    assert all(found["SameStep"][key] == value for key, value in shared.items())
    discounts = {value[1] for value in shared.values()}
    assert 0.0 in discounts
    assert len(discounts) == (2 if n_step == 1 else 4)


def step(mode: str, kind: Any, final_obs: Any, ended: bool = True) -> None:
    box = spaces.Box(-1, 1, (2,))
    buffer: Any = (
        RolloutBuffer(box, spaces.Discrete(2), 4, 2, autoreset=mode)
        if kind is RolloutBuffer
        else ReplayBuffer(box, 1, 10, 2, gamma=0.9, autoreset=mode)
    )
    obs, over = np.zeros((2, 2), np.float32), np.array([ended, False])
    buffer.add(obs, np.zeros((2, 1), np.int64), np.zeros(2), ~over & over, over, obs, final_obs)


@pytest.mark.parametrize("kind", [RolloutBuffer, ReplayBuffer])
def test_a_final_observation_that_is_missing_or_superfluous_is_refused_by_name(kind: Any) -> None:
    final = np.array([np.ones(2, np.float32), None], dtype=object)
    with pytest.raises(ValueError, match=r"autoreset 'SameStep': give final_obs=info\['final_obs'\]"):
        step("SameStep", kind, None)
    for mode in ("NextStep", "Disabled"):
        with pytest.raises(ValueError, match=f"autoreset '{mode}': no final_obs goes with it"):
            step(mode, kind, final)
        step(mode, kind, None)
    step("SameStep", kind, final)
    step("SameStep", kind, None, ended=False)
    with pytest.raises(ValueError, match="Sometimes"):
        step("Sometimes", kind, None)


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_resetting_by_hand_what_resets_itself_is_refused_by_name(kind: str) -> None:
    agent = on_policy(kind)
    for other in ("Disabled", "SameStep"):
        buffer = RolloutBuffer(agent.observation_space, agent.action_space, STEPS, N_ENVS)
        if other == "Disabled":
            with pytest.raises(ValueError, match=r"autoreset 'NextStep' does not: .*autoreset='Disabled'"):
                play(other, kind, agent, buffer, STEPS)
        else:
            with pytest.raises(ValueError, match="autoreset 'NextStep': no final_obs"):
                play(other, kind, agent, buffer, STEPS)
    for mode in MODES:
        play(mode, kind, agent, RolloutBuffer(SPACES[kind], agent.action_space, 4, N_ENVS, autoreset=mode), STEPS)


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_final_observations_are_copies_and_those_of_one_rollout_alone(mode: str) -> None:
    buffer = RolloutBuffer(spaces.Box(-9, 9, (1,)), spaces.Discrete(2), 3, 2, autoreset=mode)
    shown, final = np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32)
    action, no = np.zeros((2, 1), np.int64), np.zeros(2, bool)
    for ends in (1, 5):  # in the first rollout at its step 1, in the second never
        for t in range(3):
            if t == ends:
                final[:] = 7.0
            over = np.array([False, t == ends])
            next_obs = final if mode == "Disabled" and over.any() else shown
            final_obs = final if mode == "SameStep" and over.any() else None
            buffer.add(shown, action, np.zeros(2), no, over, next_obs, final_obs)
            final[:] = -1.0  # the loop uses its array again
        following = buffer.values_of_next(np.zeros((4, 2), np.float32), lambda obs: obs[:, 0])
        assert following.tolist() == [[0, 0], [0, 7.0 if ends == 1 else 0], [0, 0]]


def test_observations_of_nan_go_on_from_themselves() -> None:
    # What is not finite is named by check_finite, and not taken for another episode's.
    buffer = RolloutBuffer(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), 4, 1)
    nan, yes, no = np.full((1, 1), np.nan, np.float32), np.ones(1, bool), np.zeros(1, bool)
    buffer.add(nan, np.zeros((1, 1), np.int64), np.zeros(1), yes, no, nan)
    buffer.add(nan, np.zeros((1, 1), np.int64), np.zeros(1), no, no, nan)
    assert buffer.valid[:2, 0].tolist() == [True, False]


def test_environments_that_begin_anew_are_no_reset_by_hand() -> None:
    agent = on_policy("box")
    buffer = RolloutBuffer(SPACES["box"], agent.action_space, STEPS, N_ENVS)
    play("NextStep", "box", agent, buffer, 10)
    buffer.forget_unfinished()
    play("NextStep", "box", agent, buffer, 5)
    assert buffer.valid[0].all()
