"""How right critics and policies are: returns and calibration by hand, and what of an agent they are taken from."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_compare import BOTH, LONG, QUICK, log, made, strict

from klrl.agents.ppo import PPO
from klrl.agents.sac import SAC
from klrl.analysis.calibration import calibrate_critic, known_returns, value_calibration
from klrl.analysis.compare import draw, to_json, to_text
from klrl.analysis.comparison import compare_policies
from klrl.analysis.visits import visit

RNG = np.random.default_rng(0)
BY_SIGN = "klrl/RewardByObservation-v0"


def column(*values: float) -> Any:
    return np.array(values, dtype=float)[:, None]


def test_returns_end_at_a_termination_and_lead_on_from_the_value_at_a_truncation() -> None:
    ends, cuts = column(0, 1, 0, 0) > 0, column(0, 0, 0, 1) > 0
    value = column(7, 7, 7, 7, 50)
    returns, known = known_returns(column(1, 2, 3, 4), value, ends, cuts, gamma=0.05)
    assert returns[:, 0] == pytest.approx([1.1, 2.0, 3.325, 6.5])
    assert known[:, 0].tolist() == [True, True, True, False]  # of the last one the critic says a twentieth
    whole, known = known_returns(column(1, 2, 3, 4), value, ends, cuts, gamma=1.0)
    assert whole[:, 0] == pytest.approx([3.0, 2.0, 57.0, 54.0])
    assert known[:, 0].tolist() == [True, True, False, False]
    # What is still running when the last step was taken leads on from there, as what is cut.
    assert known_returns(column(1, 2, 3, 4), value, ends, cuts & False, 0.05)[0][:, 0] == pytest.approx(returns[:, 0])


def test_which_returns_are_known_does_not_depend_on_how_soon_an_episode_ended() -> None:
    hazard, gamma = 1 / 200, 0.99
    ends = np.random.default_rng(0).random((1000, 200)) < hazard
    right = 1 / (1 - gamma * (1 - hazard))
    value, no = np.full((1001, 200), right), np.zeros_like(ends)
    returns, known = known_returns(np.ones(ends.shape), value, ends, no, gamma)
    assert 0.3 < known.mean() < 0.6
    assert returns[known].mean() == pytest.approx(right, rel=0.01), "with the known ones of the last rows it is 7 % off"


def test_a_truncated_episode_leads_on_from_its_own_last_state_and_not_from_the_next_ones_first() -> None:
    trained = made(PPO, env=LONG)
    envs = trained.make_envs(1)
    visits = visit(trained.agent, envs, 12, seed=0)
    envs.close()
    # Five steps, a reset, five steps, a reset: only the first state of each episode shows -1.
    assert visits.obs[:, 0, 0].tolist() == [-1, 1, 1, 1, 1, 1, -1, 1, 1, 1, 1, 1, -1, 1, 1]
    assert visits.acted[:, 0].tolist() == [*[True] * 5, False, *[True] * 5, False, True, True]
    assert visits.episodes.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    trained.agent.value = lambda obs: torch.from_numpy(obs[:, 0] * 1000.0)
    trained.agent.config = type("Config", (), {"gamma": 0.05})
    found = calibrate_critic(trained.agent, visits, RNG)
    assert found is not None
    assert found.states == 9  # of each episode all but its last state
    # The values are -1000 at three first states, then 1000; the returns are those of k steps and 1000 from then on.
    assert found.value.tolist() == [-1000, 1000, 1000, 1000]
    two, three, four, five = (sum(0.05**i for i in range(k)) + 1000 * 0.05**k for k in (2, 3, 4, 5))
    assert found.returns[0] == pytest.approx((2 * five + two) / 3)
    assert sum(found.returns[1:]) == pytest.approx(two + three + four)


def test_a_critic_is_held_against_rewards_as_they_are_scaled_for_it() -> None:
    trained = made(PPO, env=BY_SIGN)
    agent = trained.agent
    agent.reward_scale.var, agent.reward_scale.count = 4.0, 10.0
    before = agent.reward_scale.state_dict()
    agent.value = lambda obs: torch.from_numpy(obs[:, 0] / 2)
    envs = trained.make_envs(1)
    visits = visit(agent, envs, 60, seed=0)
    envs.close()
    right = calibrate_critic(agent, visits, RNG)
    assert right is not None
    assert (right.states, right.explained_variance, right.error) == (60, 1.0, 0.0)
    assert right.returns.tolist() == right.value.tolist()
    assert {-0.5, 0.5} <= set(right.returns)
    assert agent.reward_scale.state_dict() == before
    agent.value = lambda obs: torch.zeros(len(obs))
    wrong = calibrate_critic(agent, visits, RNG)
    assert wrong is not None
    assert wrong.explained_variance == pytest.approx(0, abs=1e-12)
    assert wrong.error == pytest.approx(0.5)


def test_a_soft_value_is_held_against_rewards_with_their_entropy() -> None:
    agent = made(SAC, torch.zeros(3), env=BY_SIGN).agent
    obs = np.array([[-1.0], [1.0]], np.float32)
    assert agent.critic_reward(np.array([0.0, 2.0]), obs) == pytest.approx(
        np.array([0.0, 2.0]) + agent.alpha.value * math.log(3), rel=1e-6
    )


def test_explained_variance_and_its_error_are_those_of_the_noise() -> None:
    rng = np.random.default_rng(1)
    value, episodes = rng.normal(size=1000), np.arange(1000)
    errors = []
    for _ in range(20):
        found = value_calibration(value, value + 0.5 * rng.normal(size=1000), episodes, rng)
        errors.append((found.explained_variance - 0.8) / found.explained_stderr)
        assert len(found.value) == 10
        assert found.stderr == pytest.approx(0.05, rel=0.6)
    assert 0.6 < np.std(errors) < 1.4
    assert np.abs((found.returns - found.value) / found.stderr).max() < 5
    shifted = value_calibration(value, value + 3, episodes, rng)
    assert (shifted.explained_variance, shifted.error) == (pytest.approx(1.0), pytest.approx(3.0))
    flat = value_calibration(value, np.ones(1000), episodes, rng)
    assert math.isnan(flat.explained_variance)
    assert flat.spread == 0


def test_an_episode_counts_as_one_in_the_error_of_a_bin() -> None:
    value, noise = np.zeros(16), np.repeat([1.0, -1.0], 8)
    found = value_calibration(value, noise, np.repeat([4, 9], 8), RNG)
    bins = np.array_split(noise, 8)
    assert found.returns.tolist() == [part.mean() for part in bins]
    assert np.isnan(found.stderr).all()  # each bin is of one episode
    mixed = value_calibration(value, noise, np.tile([0, 1], 8), RNG)
    assert mixed.stderr.tolist() == [0.0] * 8
    whole = value_calibration(value[:3], np.array([1.0, 1.0, -1.0]), np.array([0, 0, 1]), RNG)
    # Off the mean 1/3 by 4/3 together and by -4/3: sqrt(2 * (16/9 + 16/9)) / 3.
    assert whole.stderr.tolist() == pytest.approx([math.sqrt(64 / 9) / 3])


def test_policies_predict_each_other_by_hand() -> None:
    logits = torch.tensor(log(0.7, 0.2, 0.1))
    found = compare_policies(made(PPO, logits), made(PPO, logits / 2), QUICK)
    forward, backward = found.predictions
    assert forward is not None
    assert backward is not None
    p, q = logits.double().softmax(-1), (logits.double() / 2).softmax(-1)
    assert (forward.states, forward.temperature) == (20, pytest.approx(2.0, rel=1e-4))
    assert backward.temperature == pytest.approx(0.5, rel=1e-4)
    assert forward.confidence == pytest.approx(0.7)
    assert forward.accuracy == pytest.approx(float(q[0]))
    assert forward.nll == pytest.approx((float(-(q * p.log()).sum()), float(-(q * q.log()).sum())), rel=1e-5)
    assert forward.ece == pytest.approx((0.7 - float(q[0]), 0.0), abs=1e-5)
    content = strict(to_json(found))
    assert content["A"]["says_of_the_other"]["temperature"] == forward.temperature
    assert content["B"]["says_of_the_other"]["ece"]["before"] == backward.ece[0]
    line = next(line for line in to_text(found).splitlines() if line.startswith("  A of B, where B went"))
    assert line.split()[6:9] == ["20", "0.7", f"{float(q[0]):.3g}"]
    assert line.endswith("2")


def test_the_temperature_is_fitted_on_the_earlier_half_and_judged_on_the_later() -> None:
    from klrl.analysis.calibration import calibrate_policy
    from klrl.policies.distributions import MultiCategorical

    logits = torch.tensor(log(0.7, 0.2, 0.1)).expand(40, 1, 3)
    scale = torch.cat([torch.full((20,), 2.0), torch.full((20,), 5.0)])[:, None, None]
    found = calibrate_policy(MultiCategorical(logits), MultiCategorical(logits / scale))
    assert found is not None
    assert found.temperature == pytest.approx(2.0, rel=1e-4)
    assert found.accuracy == pytest.approx(float((logits[0, 0] / 5).softmax(-1)[0]))


def test_an_action_that_one_policy_never_takes_has_no_temperature() -> None:
    found = compare_policies(made(PPO, log(0.5, 0.5, 0.0)), made(PPO, log(0.5, 0.0, 0.5)), QUICK)
    said = strict(to_json(found))["A"]["says_of_the_other"]
    assert (said["temperature"], said["nll"]) == ("nan", {"before": "inf", "after": "inf"})
    assert said["ece"]["before"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("action", ["discrete", "box", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("observation", ["box", "dict", "image"])
def test_every_space_is_shown(kind: Any, action: str, observation: str) -> None:
    both = [made(kind, env=BOTH, seed=seed, action=action, observation=observation) for seed in (0, 1)]
    found = compare_policies(*both, QUICK)
    assert all(part is not None for part in found.critics)
    assert all((part is None) == (action == "box") for part in found.predictions)
    assert ("what one says the other does" in to_text(found)) == (action != "box")
    assert len(draw(found).axes) == 3 + 1 + (action != "box")
    assert strict(to_json(found))["B"]["critic"]["states"] == QUICK.steps


def test_an_agent_without_a_value_or_discount_or_a_known_return_has_no_critic_to_show() -> None:
    def refuse(obs: Any) -> Any:
        raise NotImplementedError

    alike = [made(PPO), made(PPO)]
    alike[0].agent.value = refuse
    alike[1].agent.config = object()
    found = compare_policies(*alike, QUICK)
    assert found.critics == [None, None]
    assert "A: no value, or no return that is known to 1 %" in to_text(found)
    assert strict(to_json(found))["A"]["critic"] is None
    assert len(draw(found).axes) == 4
    cut = compare_policies(made(PPO, env=LONG), made(PPO, env=LONG), QUICK)  # after five steps at gamma 0.99
    assert cut.critics == [None, None]
