"""Starting from another's policy and being held to one: what is taken over, and that the KL is the right one."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect, make
from torch import Tensor

import klrl
from klrl.agents.fused import FusedPolicy, Rows
from klrl.agents.ppo import PPO, PPOConfig, policy_loss
from klrl.agents.reference import FrozenPolicy, ReferenceConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.analysis.anomalies import find_anomalies
from klrl.config import build, idle
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import UsageError
from klrl.kl import kl, reverse_kl
from klrl.policies.distributions import MultiCategorical, uniform_like
from klrl.policies.parameters import gradients
from klrl.rundir.history import read_history

SEEN = spaces.Box(-1.0, 1.0, (3,))
SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(3),
    spaces.MultiDiscrete([2, 4, 3]),
    spaces.MultiBinary(3),
    spaces.Box(-2.0, 6.0, (2,)),
]
SMALL = {"n_steps": 32, "hidden_sizes": (8,)}


def other(agent: Any, scale: float = 0.3) -> Any:
    """An agent of the same kind with other weights."""
    made = type(agent)(agent.observation_space, agent.action_space, agent.config, seed=7)
    made.policy_params.flat.add_(scale * torch.randn(made.policy_params.flat.shape, generator=torch.manual_seed(0)))
    return made


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_policy_that_was_taken_over_is_the_same_and_its_optimizer_begins_anew(space: spaces.Space[Any]) -> None:
    source = PPO(SEEN, space, SMALL, seed=1)
    source.encoder.update(np.random.default_rng(0).normal(2, 3, (50, 3)).astype(np.float32), torch.ones(50) > 0)
    source.policy_params.first_moment.fill_(1.0)
    agent = TRPO(SEEN, space, {"n_steps": 8, "hidden_sizes": (8,)})
    taken = agent.load_policy(source)
    assert taken == ["policy", "critic", "statistics of observations", "scale of rewards"]
    obs = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    assert kl(source.distribution(obs), agent.distribution(obs)).max() == 0
    assert torch.equal(source.value(obs), agent.value(obs))
    assert not agent.policy_params.first_moment.any()
    source.policy_params.flat.add_(1.0)
    assert kl(source.distribution(obs), agent.distribution(obs)).max() > 0, "they share no weights"


def test_sac_takes_over_a_discrete_policy_and_acts_by_it_at_once() -> None:
    ppo = PPO(SEEN, spaces.Discrete(3), {"normalize_observation": False, "hidden_sizes": (8,), "activation": "tanh"})
    sac = SAC(SEEN, spaces.Discrete(3), {"hidden_sizes": (8,), "activation": "tanh"})
    obs = np.zeros((400, 3), np.float32)
    ppo.policy.network.mlp.layers[-1].bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
    assert (sac.act(obs) != 0).any()
    assert sac.load_policy(ppo) == ["policy"]
    assert (sac.act(obs) == 0).mean() > 0.95
    again = SAC(SEEN, spaces.Discrete(3), {"hidden_sizes": (8,), "activation": "tanh"})
    again.load_state_dict(sac.state_dict())
    assert (again.act(obs) == 0).mean() > 0.95


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ({"hidden_sizes": (8,)}, {"hidden_sizes": (9,)}, "--hidden-sizes"),
        ({"activation": "relu"}, {"activation": "tanh"}, "--activation"),
        ({"normalize_observation": False}, {}, "normalised observations"),
        ({}, {"normalize_observation": False}, "observations as they are"),
    ],
)
def test_a_policy_of_another_form_is_refused(mine: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    one, two = (PPO(SEEN, spaces.Discrete(2), config, seed=seed) for seed, config in enumerate((mine, theirs)))
    before = one.policy_params.flat.clone()
    with pytest.raises(UsageError, match=said):
        one.load_policy(two)
    assert torch.equal(one.policy_params.flat, before)


def test_a_policy_of_other_spaces_or_another_family_is_refused() -> None:
    box = spaces.Box(-1.0, 1.0, (2,))
    agent = PPO(SEEN, box)
    with pytest.raises(UsageError, match="action space is Discrete"):
        agent.load_policy(PPO(SEEN, spaces.Discrete(2)))
    with pytest.raises(UsageError, match="observation space is"):
        agent.load_policy(PPO(spaces.Box(-1.0, 1.0, (4,)), box))
    broken = PPO(SEEN, box)
    broken.policy_params.flat[0] = math.nan
    with pytest.raises(UsageError, match="not finite"):
        agent.load_policy(broken)
    with pytest.raises(UsageError, match="takes an agent"):
        agent.load_policy("runs/a")  # type: ignore[arg-type]
    squashed = SAC(SEEN, box, {"hidden_sizes": (64, 64), "activation": "tanh"})
    with pytest.raises(UsageError, match="other actions"):
        PPO(SEEN, box, {"normalize_observation": False}).load_policy(squashed)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_gradient_with_a_reference_is_autograds_and_its_kl_the_exact_one(space: Any, direction: Any) -> None:
    held = ReferenceConfig(run="given", target=0.5, rule="fixed", coef=0.7, direction=direction)
    agent = PPO(SEEN, space, PPOConfig(**SMALL, reference=held), seed=3)
    agent.reference.policy = FrozenPolicy(other(agent))
    rng = np.random.default_rng(0)
    buffer = agent.new_buffer(4)
    obs = rng.normal(size=(4, 3)).astype(np.float32)
    no = np.zeros(4, bool)
    for _ in range(32):
        buffer.add(obs, agent.act(obs), rng.normal(size=4), no, no, obs := rng.normal(size=(4, 3)).astype(np.float32))
    batch = agent.make_batch(buffer)
    agent.policy_params.flat.add_(0.1 * torch.randn(agent.policy_params.flat.shape, generator=torch.manual_seed(1)))
    _, found = FusedPolicy(agent.policy).gradient(Rows.of(batch), agent.limit, 0.01, agent.reference.held)
    new = agent.policy(batch.inputs)
    loss, _ = policy_loss(new, batch, agent.limit, 0.01, agent.reference.held)
    assert torch.allclose(found, gradients(loss, agent.policy_params), atol=2e-6)
    without, _ = policy_loss(agent.policy(batch.inputs), batch, agent.limit, 0.01)
    exact = (kl if direction == "forward" else reverse_kl)(
        agent.reference.policy.distribution(buffer.obs_before_steps()), new
    )
    assert float((loss - without).detach()) == pytest.approx(
        0.7 * float(batch.weight.double() @ exact.double().detach()), abs=1e-5
    )
    figures = agent.reference.end(agent.policy_at(batch.inputs), batch.reference, batch.mask)
    assert figures["reference/kl"] == pytest.approx(float(exact.detach().mean()), rel=1e-5)
    assert figures["reference/of_limit"] == pytest.approx(2 * float(exact.detach().mean()), rel=1e-5)


def test_kl_to_uniform_is_entropy_up_to_a_constant() -> None:
    logits = torch.tensor([[[1.0, 2.0, 0.5], [0.0, 3.0, -math.inf]], [[0.0, 0.0, 0.0], [1.0, 1.0, -math.inf]]])
    policy = MultiCategorical(logits)
    expected = math.log(3) + math.log(2) - policy.entropy()
    assert torch.allclose(reverse_kl(uniform_like(policy), policy).float(), expected, atol=1e-6)
    held = PPO(SEEN, spaces.Discrete(3), {"reference": {"run": "uniform", "rule": "fixed", "coef": 0.3}})
    bonus = PPO(SEEN, spaces.Discrete(3), {"ent_coef": 0.3})
    rows = {"vector": torch.randn(6, 3, generator=torch.manual_seed(0))}
    found = []
    for agent in (held, bonus):
        new = agent.policy(rows)
        at = agent.reference.at(rows, new)
        distance = agent.reference.term(at, new)
        loss = distance.mean() if isinstance(distance, Tensor) else -0.3 * new.entropy().mean()
        found.append(gradients(loss, agent.policy_params))
    assert torch.allclose(*found, atol=1e-7)
    with pytest.raises(UsageError, match="only discrete actions"):
        PPO(SEEN, spaces.Box(-1.0, 1.0, (1,)), {"reference": {"run": "uniform", "target": 1.0}}).prepare()


def far_away(config: Any, coef: float) -> tuple[Any, list[float]]:
    """An agent whose rewards draw it away from its reference, itself at the beginning; its KL from that by update."""
    env = make_vector("klrl/RewardByAction-v0", 8, EnvConfig())
    held = ReferenceConfig(run="given", target=0.05, coef=coef)
    agent = make(replace(config, reference=held), env)
    agent.reference.policy = FrozenPolicy(type(agent)(agent.observation_space, agent.action_space, agent.config))
    buffer, obs = agent.new_buffer(8), env.reset(seed=0)[0]
    reached = []
    for _ in range(30):
        obs = collect(agent, env, buffer, obs)
        reached.append(agent.update(buffer).metrics["reference/kl"])
    return agent, reached


def test_an_update_that_begins_just_below_the_limit_goes_as_far_as_it_may() -> None:
    agent = PPO(SEEN, spaces.Discrete(3), {**SMALL, "reference": {"run": "uniform", "target": 0.1}}, seed=1)
    held, inputs = agent.reference, {"vector": torch.randn(50, 3, generator=torch.manual_seed(0))}
    bias = agent.policy.network.mlp.layers[-1].bias.data

    def place(logit: float) -> Any:
        bias.copy_(torch.tensor([logit, 0.0, 0.0]))
        return agent.policy_at(inputs)

    low = min(
        (x / 1000 for x in range(2000)), key=lambda x: abs(held.distance(held.at(inputs, p := place(x)), p) - 0.095)
    )
    old, before = place(low), agent.policy_params.flat.clone()
    at = held.at(inputs, old)
    batch = type("Batch", (), {"reference": at, "old": old, "mask": None})()
    move = agent.limit.begin(lambda: agent.policy_at(inputs), agent.policy_params.flat)
    reached = held.distance(at, place(low + 0.2))
    assert held.move_back(batch, move, before) == pytest.approx(reached)
    assert reached > 0.13
    assert 0.0985 < held.distance(at, agent.policy_at(inputs)) <= 0.1, "to where the limit is, and not all the way"
    report = move.end()
    assert 0 < report.rolled_back < 1
    assert report.attempted > report.limited > 0, "what it had reached is told, and answered by coefficients"
    assert held.excess(0.095, 0.1) == pytest.approx(1.0)
    assert held.excess(0.12, 0.11) == 0 < 1 < held.excess(0.12, 0.1201) < math.inf


def test_a_policy_that_is_not_finite_is_infinitely_far_and_no_rank_leaves_alone() -> None:
    agent = PPO(SEEN, spaces.Discrete(3), {**SMALL, "reference": {"run": "uniform", "target": 0.1}})
    broken = MultiCategorical(torch.full((4, 1, 3), math.nan))
    at = uniform_like(MultiCategorical(torch.zeros(4, 1, 3)))
    assert agent.reference.distance(at, broken) == math.inf
    assert agent.reference.end(broken, at)["reference/kl"] == math.inf


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path) -> None:
    agent = PPO(SEEN, spaces.Discrete(3), SMALL)
    agent.save(tmp_path / "plain")
    held = PPO(SEEN, spaces.Discrete(3), {**SMALL, "reference": {"run": str(tmp_path / "plain"), "target": 0.1}})
    state = held.state_dict()
    del state["reference"]["policy"]
    with pytest.raises(ValueError, match="holds no reference"):
        held.load_state_dict(state)


@pytest.mark.parametrize("config", [PPOConfig(**SMALL, learning_rate=3e-3), TRPOConfig(**SMALL)], ids=["ppo", "trpo"])
@pytest.mark.parametrize("coef", [1e-4, 1.0])
def test_no_update_ends_above_its_second_limit_and_learning_goes_on_at_it(config: Any, coef: float) -> None:
    agent, reached = far_away(config, coef)
    assert max(reached) <= 0.05 * (1 + 1e-6), "whatever the coefficient: what overshoots is moved back, or refused"
    assert fmean(reached[15:]) > 0.025, "the reward draws the policy out to the limit"
    assert agent.reference.limit.penalty.coefficient.value > 0.3, "and the coefficient has found what answers that"


def test_a_run_is_held_after_its_reference_is_gone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    first = klrl.train("ppo", "CartPole-v1", **QUICK, run_dir=str(tmp_path / "first"))
    moved = tmp_path / "moved"
    options = {**QUICK, "reference": {"run": str(moved), "target": 0.01, "coef": 3.0}, "init_from": str(moved)}
    ends = []
    for name, total in (("whole", 3000), ("parts", 1500)):
        first.folder.rename(moved)
        run = klrl.train("ppo", "CartPole-v1", **{**options, "total_timesteps": total}, run_dir=str(tmp_path / name))
        moved.rename(first.folder)
        ends.append(run if name == "whole" else klrl.resume(run.folder, total_timesteps=3000))
    whole, parts = ends
    assert torch.equal(whole.agent.policy_params.flat, parts.agent.policy_params.flat)
    assert whole.agent.reference.limit.state_dict() == parts.agent.reference.limit.state_dict()
    history = read_history(parts.folder)
    over = int((history["reference/of_limit"] > 1).sum())
    told = [found.what for found in find_anomalies(history) if "reference" in found.what]
    assert len(told) == (over > 0), "the report says where new states were over the limit"
    assert np.isfinite(history["reference/of_limit"]).all()
    assert "policy" in (whole.folder / "from.toml").read_text()
    assert klrl.load(whole.folder).predict(np.zeros(4, np.float32))[0] in (0, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"run": "uniform"}, "needs a --reference.target"),
        ({"target": 1.0}, "needs a --reference.run"),
    ],
)
def test_references_that_contradict_themselves_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PPO(SEEN, spaces.Discrete(2), {"reference": config})


def test_a_reference_without_kl_to_the_policy_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1")
    SAC(env.observation_space, env.action_space, SACConfig(hidden_sizes=(8,))).save(tmp_path / "sac")
    for options, said in [
        ({"reference": {"run": str(tmp_path / "none"), "target": 1.0}}, "no run or checkpoint"),
        ({"reference": {"run": str(tmp_path / "sac"), "target": 1.0}}, "--reference.run"),
        ({"init_from": str(tmp_path / "sac"), "normalize_observation": False}, "other actions"),
    ]:
        with pytest.raises(UsageError, match=said):
            klrl.train("ppo", "Pendulum-v1", **QUICK, **options, run_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reference": {"target": 0.5}}, "--reference.target does nothing without --reference.run"),
        ({"reference": {"direction": "forward"}}, "--reference.direction does nothing without --reference.run"),
        ({"bottleneck": {"target": 1}}, "--bottleneck.target does nothing without --bottleneck.size"),
        ({"critic_kl": 0.1}, "--critic-kl does nothing without --critic bayesian"),
        ({"kl": {"coef": 3.0}}, "--kl.coef does nothing without --kl.penalty"),
        ({"kl": {"turn": 0.5}}, "--kl.turn does nothing without --kl.per-state"),
        ({"kl": {"check": "minibatch"}}, "--kl.check does nothing without --kl.stop"),
    ],
)
def test_options_that_do_nothing_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        klrl.train("ppo", "CartPole-v1", **QUICK, **options, run_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    (group, given), *_ = options.items()
    usual = getattr(PPOConfig(), group)
    same = {name: getattr(usual, name) for name in given} if isinstance(given, dict) else usual
    assert idle(build(PPOConfig, {group: same})) == []


def test_a_run_of_before_with_options_that_did_nothing_is_still_read(tmp_path: Path) -> None:
    PPO(SEEN, spaces.Discrete(2), {**SMALL, "critic_kl": 0.1, "bottleneck": {"target": 1}}).save(tmp_path / "old")
    assert klrl.load(tmp_path / "old").config.critic_kl == 0.1


@pytest.mark.parametrize("kind", [PPO, TRPO])
def test_rows_that_do_not_count_may_be_infinitely_far_from_the_reference(kind: Any) -> None:
    agent = kind(SEEN, spaces.Discrete(3), {**SMALL, "reference": {"run": "given", "target": 0.5}}, seed=3)
    agent.reference.policy = FrozenPolicy(other(agent))
    known = agent.reference.policy.at

    def at(inputs: Any) -> Any:
        forbids = (inputs["vector"][:, :1, None] == 9.0) & (torch.arange(3) == 1)
        return known(inputs).map_parameters(lambda logits: logits.masked_fill(forbids, -math.inf))

    agent.reference.policy.at = at
    rng, buffer, no = np.random.default_rng(0), agent.new_buffer(2), np.zeros(2, bool)
    obs = rng.normal(size=(2, 3)).astype(np.float32)
    for step in range(32):
        ends, following = np.array([step == 9, False]), rng.normal(size=(2, 3)).astype(np.float32)
        if step == 9:
            following[0] = 9.0  # seen in the row that only resets
        buffer.add(obs, agent.act(obs), rng.normal(size=2), ends, no, following)
        obs = following
    result = agent.update(buffer)
    assert math.isfinite(result.metrics["reference/kl"])
    assert math.isfinite(result.metrics["reference/max"])
    assert torch.isfinite(agent.policy_params.flat).all()
