"""PPO: every formula by hand, the penalty and the bound at work, probes with known answers, determinism."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import collect, train

from klrl.agents.limits import KLConfig
from klrl.agents.on_policy import Batch, value_loss
from klrl.agents.ppo import PPO, PPOConfig, policy_loss, reach
from klrl.buffers.rollout import RolloutBuffer
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import NonFiniteError
from klrl.kl import SPO, Clip, Gate, KLLimit, KLReport, Project, Reverse, at_most, kl
from klrl.policies.distributions import MultiCategorical

PROBE = PPOConfig(
    n_steps=32,
    batch_size=64,
    n_epochs=4,
    learning_rate=3e-3,
    gamma=0.9,
    gae_lambda=1.0,
    normalize_reward=False,
    normalize_observation=False,
    hidden_sizes=(32,),
    kl=KLConfig(target=0.05),
)


def one_row(probability_new: float, advantage: float) -> tuple[MultiCategorical, Batch]:
    """A batch of one state with two actions, the first taken; pi_old is uniform."""
    old = MultiCategorical(torch.zeros(1, 1, 2))
    logit = math.log(probability_new / (1 - probability_new))
    new = MultiCategorical(torch.tensor([[[logit, 0.0]]], requires_grad=True))
    action = torch.zeros(1, 1, dtype=torch.int64)
    one = torch.ones(1)
    batch = Batch({}, old, action, old.log_prob(action), 0.5 * one, advantage * one, 2.0 * one, one)
    return new, batch


def loss_of(
    new: MultiCategorical, batch: Batch, config: PPOConfig | None = None, beta: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, its surrogate part, and its gradient in the logits."""
    config = config or PPOConfig(clip_range=0.0)
    rules = [Clip(config.clip_range)] if config.clip_range else []
    limit = KLLimit(at_most(0.02), penalty="fixed", coef=beta, direction=config.kl.direction, rules=rules)
    loss, surrogate = policy_loss(new, batch, limit, config.ent_coef)
    return loss, surrogate, torch.autograd.grad(loss, new.logits)[0]


def test_surrogate_matches_a_hand_computed_example() -> None:
    loss, surrogate, to_logits = loss_of(*one_row(0.75, advantage=2.0))
    assert loss.item() == surrogate.item() == pytest.approx(-1.5 * 2.0)
    # d(-ratio * A) = -3 * (onehot - p) = -3 * (0.25, -0.25)
    assert to_logits.flatten().tolist() == pytest.approx([-0.75, 0.75])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_the_loss_is_that_of_the_paper(clip_range: float, direction: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 2, 3, requires_grad=True)
    new, old = MultiCategorical(logits), MultiCategorical(torch.randn(64, 2, 3))
    action, advantage, weight = old.sample(), torch.randn(64), torch.rand(64)
    config = PPOConfig(clip_range=clip_range, ent_coef=0.3, kl=KLConfig(direction=direction))
    batch = Batch({}, old, action, old.log_prob(action), weight, advantage, weight, weight)
    # Of each row by itself, with torch's own categoricals, in float64.
    p, q = (torch.softmax(x.double(), -1) for x in (old.logits, logits))
    kls = (p * (p / q).log()).sum((1, 2)) if direction == "forward" else (q * (q / p).log()).sum((1, 2))
    entropy = -(q * q.log()).sum((1, 2))
    taken = [x.gather(-1, action.unsqueeze(-1)).prod(1).squeeze(-1) for x in (p, q)]
    ratio = taken[1] / taken[0]
    surrogate = ratio * advantage
    if clip_range:
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    expected = weight.double() @ (-surrogate + 3.0 * kls - 0.3 * entropy)
    loss, part, to_logits = loss_of(new, batch, config, beta=3.0)
    if not clip_range:  # clipping leaves the gradient alone to compare
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert part.item() == pytest.approx(-(weight.double() @ (ratio * advantage)).item(), rel=1e-5)
    assert torch.allclose(to_logits, torch.autograd.grad(expected, logits)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("probability", "advantage", "moves"),
    [(0.75, 1.0, False), (0.75, -1.0, True), (0.25, 1.0, True), (0.25, -1.0, False)],
)
def test_clipping_is_pessimistic(probability: float, advantage: float, moves: bool) -> None:
    _, surrogate, to_logits = loss_of(*one_row(probability, advantage), PPOConfig(clip_range=0.2))
    assert surrogate.item() == pytest.approx(-2 * probability * advantage, rel=1e-6)
    assert bool(to_logits.abs().sum() > 0) == moves


def test_value_loss_matches_a_hand_computed_example() -> None:
    _, batch = one_row(0.5, 0.0)  # V_old 0.5, return 2
    found = []
    for clip_range_vf in (0.0, 0.1, 0.6):
        value = torch.tensor([1.0], requires_grad=True)
        loss = value_loss(value, batch, clip_range_vf)
        found.append((loss.item(), torch.autograd.grad(loss, value)[0].item()))
    assert found == [
        pytest.approx((1.0, -2.0)),
        pytest.approx(((0.6 - 2.0) ** 2, 0.0)),
        pytest.approx((1.0, -2.0)),
    ]


def test_rows_that_only_reset_have_no_gradient() -> None:
    old = MultiCategorical(torch.zeros(2, 1, 2))
    action = torch.zeros(2, 1, dtype=torch.int64)
    weight, one = torch.tensor([1.0, 0.0]), torch.ones(2)
    batch = Batch({}, old, action, old.log_prob(action), one, one, one, weight)
    new = MultiCategorical(torch.ones(2, 1, 2, requires_grad=True))
    _, _, to_logits = loss_of(new, batch, PPOConfig(ent_coef=0.1), beta=1.0)
    assert float(to_logits[0].abs().sum()) > 0.0
    assert float(to_logits[1].abs().sum()) == 0.0
    value = (2 * one).requires_grad_()
    assert torch.autograd.grad(value_loss(value, batch), value)[0].tolist() == [2.0, 0.0]


HELD = [([Gate(0.05)], 1 / 3), ([Reverse(0.05)], 1 / 3), ([Gate(0.2)], 0.0), ([Clip(0.2)], 1 / 3), ([SPO(0.2)], 1 / 3),
        ([SPO(1.0)], 0.0), ([Gate(0.2), Clip(0.2)], 1 / 3), ([Project(0.05)], None), ([], None)]  # fmt: skip


@pytest.mark.parametrize(("rules", "share"), HELD)
def test_held_are_the_states_whose_surrogate_a_rule_drops_or_turns_at_the_end(rules: Any, share: float | None) -> None:
    logits, action = torch.zeros(4, 1, 2), torch.zeros(4, 1, dtype=torch.int64)
    old, one = MultiCategorical(logits.clone()), torch.ones(4)
    mask, advantage = torch.tensor([True, True, True, False]), torch.tensor([1.0, -1.0, 1.0, 1.0])
    batch = Batch({}, old, action, old.log_prob(action), one, advantage, one, mask / 3)
    move = KLLimit(at_most(0.02), rules=rules).begin(lambda: MultiCategorical(logits), logits, mask, actions=action)
    logits[[0, 1, 3], 0, 0] = math.log(3)  # a ratio of 1.5 and a KL of 0.14; the third state stays
    move.end()
    assert reach(batch, move, 0.2)["train/clip_fraction"] == pytest.approx(2 / 3)
    assert reach(batch, move).get("kl/held_states") == (None if share is None else pytest.approx(share))


def test_held_states_are_logged_where_rules_weigh_and_none_is_held_once_an_update_is_undone() -> None:
    far = KLConfig(target=0.0, per_state="gate", state_limit=1e-5)
    plain = replace(PROBE, clip_range=0.0)
    _, reports = train(replace(plain, kl=far), "CartPole-v1", 3)
    assert all(0.0 < report.metrics["kl/held_states"] < 1.0 for report in reports)
    undone = replace(far, target=1e-9, on_overshoot="rollback")
    assert [r.metrics["kl/held_states"] for r in train(replace(plain, kl=undone), "CartPole-v1", 2)[1]] == [0.0, 0.0]
    assert "kl/held_states" not in train(plain, "CartPole-v1", 1)[1][0].metrics


def test_beta_changes_the_gradient() -> None:
    def gradient(beta: float) -> torch.Tensor:
        return loss_of(*one_row(0.75, advantage=1.0), beta=beta)[2].flatten()

    # d KL / d logits = softmax(new) - softmax(old) = (0.25, -0.25)
    assert torch.allclose(gradient(10.0) - gradient(0.0), torch.tensor([2.5, -2.5]), rtol=1e-5)


def test_a_larger_beta_moves_the_policy_less() -> None:
    moved = []
    for beta in (0.0, 1.0, 100.0):
        config = PPOConfig(n_steps=128, kl=KLConfig(penalty="fixed", coef=beta, stop=0.0), learning_rate=1e-3)
        _, reports = train(config, "CartPole-v1", 3)
        moved.append(np.mean([report.kl.mean for report in reports]))
    assert moved[0] > 1.5 * moved[1] > 3 * moved[2]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_project_keeps_kl_within_the_limit_after_every_update(direction: Any) -> None:
    rules = KLConfig(target=0.003, penalty="none", stop=0.0, on_overshoot="project", direction=direction)
    base: Any = {"lr_schedule": "constant", "learning_rate": 3e-3, "clip_range": 0.0}
    config = PPOConfig(n_steps=64, batch_size=128, n_epochs=4, kl=rules, **base)
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        _, reports = train(config, env_id, 15)
        assert all(report.kl.limited <= 0.003 for report in reports)
        assert all(0.0 < report.kl.rolled_back < 1.0 and report.kl.attempted > 0.003 for report in reports[2:])
        assert np.mean([report.kl.of_limit for report in reports]) > 0.8, "and no further than needed"


def test_the_reported_kl_is_that_of_the_policy_afterwards() -> None:
    rules = KLConfig(target=0.003, penalty="none", on_overshoot="project")
    agent, _ = train(replace(PROBE, kl=rules), "CartPole-v1", 1)
    env = make_vector("CartPole-v1", 8, EnvConfig())
    buffer = agent.new_buffer(8)
    collect(agent, env, buffer, env.reset(seed=3)[0])
    inputs = agent.encoder(buffer.obs_before_steps())
    before = agent.policy_at(inputs)
    report = agent.update(buffer)
    valid = torch.from_numpy(buffer.valid).flatten()
    after = kl(before, agent.policy_at(inputs))[valid]
    assert float(after.double().mean()) == pytest.approx(report.kl.mean, rel=1e-6)
    assert float(after.max()) == pytest.approx(report.kl.max, rel=1e-6)


@pytest.mark.parametrize("check", ["update", "epoch", "minibatch"])
def test_rollback_restores_policy_and_optimizer_bit_for_bit(check: Any) -> None:
    rules = KLConfig(target=1e-9, penalty="none", stop=1.5, on_overshoot="rollback", check=check)
    config = replace(PROBE, kl=rules, learning_rate=0.1)
    env = make_vector("CartPole-v1", 8, EnvConfig())
    agent = PPO(env.single_observation_space, env.single_action_space, config)
    buffer = agent.new_buffer(8)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    before, critic = agent.policy_params.state_dict(), agent.critic_params.flat.clone()
    report = agent.update(buffer)
    assert report.kl.rolled_back == 1.0
    assert report.kl.mean == 0.0
    assert report.kl.attempted > 1e-9
    assert report.kl.stopped_at == (0 if check == "update" else 1)
    assert float(agent.policy_params.count) == 0 < float(agent.critic_params.count)
    for name, tensor in agent.policy_params.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not torch.equal(agent.critic_params.flat, critic), "the critic goes on learning"


def test_the_update_stops_on_the_exact_kl() -> None:
    loose = replace(PROBE, learning_rate=0.03, clip_range=0.0, kl=KLConfig(target=0.01, on_overshoot="keep"))
    tight = replace(loose, kl=replace(loose.kl, stop=1.5, check="minibatch"))
    far, near = (train(config, "CartPole-v1", 1)[1][0].kl for config in (loose, tight))
    assert far.stopped_at == 0
    assert near.stopped_at == 1
    assert far.mean > near.mean > 0.015


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("check", ["minibatch", "epoch"])
def test_the_critic_goes_on_once_the_policy_has_stopped(
    check: Any, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klrl.agents.ppo.applies", lambda *_: fused)
    kl = KLConfig(target=1e-6, penalty="none", stop=1.0, check=check)
    agent, (report,) = train(replace(PROBE, kl=kl), "CartPole-v1", 1)
    assert report.kl.stopped_at == 1
    an_epoch = math.ceil(PROBE.n_steps * 8 / PROBE.batch_size)
    assert int(agent.policy_params.count) == (an_epoch if check == "epoch" else 1)
    assert int(agent.critic_params.count) == an_epoch * PROBE.n_epochs


def test_a_non_finite_gradient_stops_and_leaves_the_weights() -> None:
    env = make_vector("CartPole-v1", 8, EnvConfig())
    config = replace(PROBE, normalize_advantage=False)
    agent = PPO(env.single_observation_space, env.single_action_space, config)
    buffer = agent.new_buffer(8)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    buffer.reward[3, 2] = 1e30
    before = agent.state_dict()
    with pytest.raises(NonFiniteError, match="value_loss is inf in update 1"):
        agent.update(buffer)
    for part in ("policy", "critic"):
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in agent.state_dict()[part].items())
    assert agent.reward_scale is None or agent.reward_scale.count == 0
    buffer.reward[3, 2] = np.inf
    with pytest.raises(NonFiniteError, match="reward is inf in env 2 at step 3"):
        agent.update(buffer)


@pytest.mark.parametrize(("rate", "check"), [(1e38, "update"), (1e38, "minibatch"), (1e37, "update")])
def test_weights_that_are_not_finite_or_overflow_never_stay(rate: float, check: Any) -> None:
    env = make_vector("CartPole-v1", 8, EnvConfig())
    config = replace(PROBE, learning_rate=rate, n_epochs=1, kl=KLConfig(check=check))
    agent = PPO(env.single_observation_space, env.single_action_space, config)
    buffer = agent.new_buffer(8)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    with pytest.raises(NonFiniteError, match=r"in update 1|nan"):
        agent.update(buffer)
    assert bool(torch.isfinite(agent.policy_params.flat).all())
    assert bool(torch.isfinite(agent.critic_params.flat).all())


@pytest.mark.parametrize("schedule", ["constant", "linear", "kl"])
def test_learning_rate_schedules(schedule: Any) -> None:
    config = replace(PROBE, lr_schedule=schedule, kl=KLConfig(target=10.0, penalty="none"))
    env = make_vector("CartPole-v1", 8, EnvConfig())
    agent = PPO(env.single_observation_space, env.single_action_space, config)
    buffer = agent.new_buffer(8)
    obs, _ = env.reset(seed=0)
    rates = []
    for progress in (0.0, 0.75):
        obs = collect(agent, env, buffer, obs)
        rates.append(agent.update(buffer, progress).metrics["train/learning_rate"])
    expected = {"constant": [3e-3, 3e-3], "linear": [3e-3, 3e-3 * 0.25], "kl": [3e-3, 3e-3 * 1.5]}[schedule]
    assert rates == pytest.approx(expected)


def test_the_kl_lowers_the_learning_rate_beyond_the_target_and_raises_it_below_a_quarter() -> None:
    def first_update(target: float) -> tuple[KLReport, float]:
        env = make_vector("CartPole-v1", 8, EnvConfig())
        agent = PPO(env.single_observation_space, env.single_action_space, replace(PROBE, kl=KLConfig(target=target)))
        buffer = agent.new_buffer(8)
        collect(agent, env, buffer, env.reset(seed=0)[0])
        return agent.update(buffer).kl, agent.learning_rate.value / PROBE.learning_rate

    attempted = first_update(10.0)[0].attempted
    for targets, factor in ((0.9, 1 / 1.5), (1.1, 1.0), (3.9, 1.0), (4.1, 1.5)):
        report, moved = first_update(targets * attempted)
        assert moved == pytest.approx(factor)
        assert report.mean <= targets * attempted  # also where it was moved back


def test_a_minibatch_that_is_shorter_than_the_others_counts_as_its_rows_say() -> None:
    env = make_vector("CartPole-v1", 3, EnvConfig())
    agent = PPO(env.single_observation_space, env.single_action_space, replace(PROBE, batch_size=40))
    buffer = agent.new_buffer(3)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    batch = agent.make_batch(buffer)
    minibatches = batch.minibatches(40, np.random.default_rng(0))
    assert [len(part.weight) for part in minibatches] == [40, 40, 16]
    assert float(batch.weight.sum()) == pytest.approx(1.0)
    rows = int(batch.mask.sum())
    for part in minibatches:  # each estimates the mean over states
        assert float(part.weight.sum()) == pytest.approx(float(part.mask.sum()) / rows * 96 / len(part.weight))
    assert sorted(torch.cat([part.returns for part in minibatches]).tolist()) == sorted(batch.returns.tolist())
    assert agent.update(buffer).kl.mean > 0


def test_an_update_needs_a_full_rollout() -> None:
    with pytest.raises(ValueError, match="fill it"):
        PPO(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), PROBE).update(
            RolloutBuffer(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), 32, 8)
        )


def test_building_an_agent_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    PPO(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
    assert torch.equal(torch.rand(1), expected)


def test_actions_are_given_as_each_space_wants_them() -> None:
    box = spaces.Box(np.float32([[-1.0, 0.0]]), np.float32([[1.0, 0.5]]))
    for space in (spaces.Discrete(2, start=5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary([2, 2]), box):
        agent = PPO(spaces.Box(-1, 1, (2,)), space)
        obs = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
        acted = agent.env_action(agent.act(obs))
        assert all(space.contains(space.dtype.type(a) if a.ndim == 0 else a) for a in acted)  # type: ignore[union-attr]
        single, state = agent.predict(obs[0], state="kept")
        assert space.contains(single)
        assert state == "kept"
