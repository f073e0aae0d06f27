"""SAC over time: its windows and their KL, faults, and how many steps of learning go with those of the environment."""

import copy
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import SMALL_SAC, train_sac, within_a_window

import klrl
from klrl.agents.limits import OffPolicyKLConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.errors import NonFiniteError

CPU = torch.device("cpu")
BOX = spaces.Box(-1, 1, (3,))


def test_the_reported_kl_is_that_of_the_window_and_untracked_by_default_costs_nothing() -> None:
    agent, reports = train_sac(SMALL_SAC, "Pendulum-v1", 100)
    assert not agent.limit.penalises
    assert all(report.kl.mean > 0.0 and report.kl.limit == math.inf for report in reports)
    figures: dict[str, float] = {}
    reports[-1].write(figures.__setitem__)
    assert {"kl/mean", "kl/reverse", "kl/p95", "kl/max", "entropy/mean", "entropy/change", "train/ent_coef"} <= set(
        figures
    )
    assert "kl/limit" not in figures
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("rule", ["project", "rollback"])
def test_a_window_that_overshoots_is_taken_back(env_id: str, rule: Any) -> None:
    rules = OffPolicyKLConfig(target=0.002, penalty="none", stop=0.0, every=20, on_overshoot=rule)
    _, reports = train_sac(replace(SMALL_SAC, kl=rules), env_id, 120)
    assert len(reports) >= 3
    assert all(report.kl.mean <= 0.002 for report in reports)
    assert any(report.kl.attempted > 0.002 and report.kl.rolled_back > 0.0 for report in reports)


def test_stop_and_penalty_hold_the_policy_back() -> None:
    def moved(**rules: Any) -> float:
        _, reports = train_sac(replace(SMALL_SAC, kl=OffPolicyKLConfig(every=40, **rules)), "Pendulum-v1", 150)
        return float(np.mean([report.kl.mean for report in reports]))

    free = moved(target=0.0)
    stopped = moved(target=0.01, penalty="none", stop=1.0, check="minibatch")
    penalised = moved(target=0.01, stop=0.0)
    assert stopped < 0.5 * free
    assert penalised < 0.7 * free
    _, reports = train_sac(
        replace(SMALL_SAC, kl=OffPolicyKLConfig(target=0.01, penalty="none", stop=1.0, check="minibatch", every=40)),
        "Pendulum-v1",
        150,
    )
    assert all(0 < report.kl.stopped_at <= 40 for report in reports if report.kl.mean > 0.01)


def test_both_coefficients_answer_what_they_measure() -> None:
    for ent_coef, rises in ((1e-3, True), (10.0, False)):
        _, reports = train_sac(replace(SMALL_SAC, ent_coef=ent_coef), "Pendulum-v1", 200)
        alphas = [report.metrics["train/ent_coef"] for report in reports]
        assert (alphas[-1] > 2 * ent_coef) if rises else (alphas[-1] < ent_coef / 2)
    _, reports = train_sac(
        replace(SMALL_SAC, kl=OffPolicyKLConfig(target=0.01, stop=0.0, every=20)), "Pendulum-v1", 200
    )
    betas = [report.kl.coefficient for report in reports]
    attempted = [report.kl.attempted for report in reports]
    assert len(set(betas)) > 1
    for beta, after, reached in zip(betas, betas[1:], attempted, strict=False):
        assert after == pytest.approx(2 * beta if reached > 0.015 else beta / 2 if reached < 0.01 / 1.5 else beta)


@pytest.mark.parametrize(
    ("rules", "stopped_at", "share"),
    [
        ({}, 0, 1.0),
        ({"target": 0.01}, 7, 0.0),
        ({"target": 0.01, "penalty": "fixed", "coef": 3.0}, 0, 0.4),  # 1 / (1 + 3 / 2)
    ],
)
def test_the_temperature_answers_as_far_as_the_policy_can(rules: Any, stopped_at: int, share: float) -> None:
    agent = SAC(BOX, BOX, replace(SMALL_SAC, kl=OffPolicyKLConfig(every=10, **rules)))
    buffer = agent.new_buffer(1)
    shown = np.zeros((1, 3), np.float32)
    buffer.add(shown, np.zeros((1, 3), np.float32), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), shown)
    move = agent._begin_window(buffer).move
    move.stopped_at = stopped_at
    for room in (1.0, 0.25):
        agent.alpha.load_state_dict({"log_value": 0.0})
        agent._adapt_temperature(agent.temperature.bound.limit + 0.5, move, room)
        assert math.log(agent.alpha.value) == pytest.approx(-0.5 * room * share * SMALL_SAC.ent_coef_lr / 3)


def test_the_temperature_goes_back_with_the_policy_that_it_answered() -> None:
    alphas = {}
    for rule in ("keep", "project", "rollback"):
        rules = OffPolicyKLConfig(target=1e-3, penalty="none", stop=0.0, every=20, on_overshoot=rule)
        report = train_sac(replace(SMALL_SAC, kl=rules), "Pendulum-v1", 84)[1][0]
        alphas[rule] = math.log(report.metrics["train/ent_coef"])
        if rule == "project":
            kept = 1 - report.kl.rolled_back
    assert alphas["keep"] < 0
    assert 0 < kept < 1
    assert alphas["project"] == pytest.approx(kept * alphas["keep"])
    assert alphas["rollback"] == 0.0


class LQR(gym.Env[Any, Any]):
    """A linear system whose state and action cost their squares."""

    observation_space = spaces.Box(-10, 10, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.normal(size=1), 0
        return self.state.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        cost = float(self.state[0] ** 2 + 0.1 * action[0] ** 2)
        self.state = np.clip(0.95 * self.state + 0.3 * action + 0.02 * self.np_random.normal(size=1), -10, 10)
        self.steps += 1
        return self.state.astype(np.float32), -cost, False, self.steps >= 40, {}


@pytest.mark.slow
def test_a_limit_does_not_wind_the_temperature_up() -> None:
    def alpha(**rules: Any) -> float:
        config = SACConfig(hidden_sizes=(32, 32), batch_size=64, kl=OffPolicyKLConfig(every=500, **rules))
        _, reports = train_sac(config, LQR, 1600)
        return reports[9].metrics["train/ent_coef"]

    free = alpha()
    of_states = ({"penalty": "none", "per_state": rule} for rule in ("gate", "reverse", "project"))
    for rules in ({"target": 0.02}, {"target": 0.02, "stop": 0.0}, {"target": 0.02, "penalty": "none"}, *of_states):
        assert free / 3 <= alpha(**rules) <= 3 * free, rules


def test_weights_that_overflow_never_reach_a_report() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        train_sac(replace(SMALL_SAC, learning_rate=1e38, kl=OffPolicyKLConfig(target=0.0, every=1)), "Pendulum-v1", 40)


def test_rewards_of_a_million_give_no_nan() -> None:
    class Loud(gym.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return 1e6 * float(reward)

    agent, reports = train_sac(SMALL_SAC, lambda: Loud(gym.make("Pendulum-v1")), 150)
    assert bool(agent.policy_params.flat.isfinite().all() and agent.critic_params.flat.isfinite().all())
    assert all(math.isfinite(report.kl.mean) for report in reports)


def test_losses_that_are_not_finite_stop_and_restore_the_window() -> None:
    agent, _ = train_sac(SMALL_SAC, "Pendulum-v1", 60)
    buffer = agent.new_buffer(1)
    shown = np.zeros((1, 3), np.float32)
    buffer.add(shown, np.zeros((1, 1), np.float32), np.array([3e38]), np.zeros(1, bool), np.zeros(1, bool), shown)
    agent._window = None
    before, alpha = agent.policy_params.flat.clone(), agent.alpha.value
    agent.config = replace(agent.config, gradient_steps=60)
    with pytest.raises(NonFiniteError, match="not finite"):
        agent.update(buffer)
    assert torch.equal(agent.policy_params.flat, before)
    assert bool(agent.critic_params.flat.isfinite().all())
    assert agent.alpha.value == alpha
    assert agent._window is None, "and it can go on"


def test_rollback_restores_the_policy_and_its_optimizer_bit_for_bit() -> None:
    rules = OffPolicyKLConfig(target=1e-9, penalty="none", stop=0.0, every=20, on_overshoot="rollback")
    agent, reports = train_sac(replace(SMALL_SAC, kl=rules), "Pendulum-v1", 60)
    fresh = SAC(agent.observation_space, agent.action_space, agent.config)
    assert len(reports) == 2
    assert all(report.kl.rolled_back == 1.0 and report.kl.mean == 0.0 for report in reports)
    agent.finish_window(buffer := agent.new_buffer(1))
    shown = np.zeros((1, 3), np.float32)
    buffer.add(shown, np.zeros((1, 1), np.float32), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), shown)
    agent._window = None
    report = agent.finish_window(buffer)
    assert report is not None
    assert report.kl.mean == 0.0
    before = agent.policy_params.state_dict()
    with torch.no_grad():
        window = agent._begin_window(buffer)
        agent._gradient_step(window, buffer.sample(8, agent.rng, CPU))
    assert int(agent.policy_params.count) == int(before["count"]) + 1
    assert not torch.equal(agent.policy_params.flat, before["flat"])
    with torch.no_grad():
        agent._end_window(window)
    now = agent.policy_params.state_dict()
    assert all(torch.equal(part, before[name]) for name, part in now.items())
    assert int(fresh.policy_params.count) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_learns_as_the_original_does_even_within_a_window(duplicate: Any) -> None:
    rules = OffPolicyKLConfig(target=0.01, every=50)
    agent, buffer = within_a_window(rules)
    twin = duplicate(agent)
    assert agent._window is not None
    assert agent._window.steps == twin._window.steps == 30
    results = [one.update(copy.deepcopy(buffer)) for one in (agent, twin)]
    assert results[0] == results[1]
    assert results[0] is not None
    for name in ("policy", "old_policy", "critic", "target_critic"):
        pairs = zip(getattr(agent, name).parameters(), getattr(twin, name).parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs), name


def test_a_run_ends_at_its_last_step_and_reports_what_it_cut_short() -> None:
    config = {"n_envs": 2, "learning_starts": 50, "hidden_sizes": (16,), "eval_every": 0, "quiet": True}
    run = klrl.train("sac", "Pendulum-v1", total_timesteps=300, kl={"every": 100}, **config)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [148, 248, 300]
    unlearned = klrl.train("sac", "Pendulum-v1", total_timesteps=40, **config)
    rows = [json.loads(line) for line in (unlearned.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["kl/mean"]) for row in rows] == [(40, 0.0)]


def test_gradient_steps_train_freq_and_learning_starts() -> None:
    agent, _ = train_sac(
        replace(SMALL_SAC, learning_starts=100, train_freq=3, gradient_steps=2), "CartPole-v1", 60, n_envs=2
    )
    assert agent.n_updates in (6, 8)  # 60 * 2 steps, few of them resets: 2 each time that 6 more than 100 were made
    as_many, _ = train_sac(
        replace(SMALL_SAC, learning_starts=100, train_freq=3, gradient_steps=-1), "Pendulum-v1", 62, n_envs=2
    )
    assert as_many.n_updates == 5 * 3 * 2  # at the rows 50, 53, 56, 59 and 62: three rows of two each


def test_rows_that_only_reset_are_no_steps_to_learn_from() -> None:
    agent, _ = train_sac(
        replace(SMALL_SAC, learning_starts=100, gradient_steps=1),
        lambda: gym.wrappers.TimeLimit(gym.make("CartPole-v1"), 2),
        150,
        n_envs=4,
    )
    # 150 rows of 4 environments, one in three of which only resets: 400 steps. The first 100 are collected at random.
    assert agent.n_updates == (400 - 100) // 4 + 1
