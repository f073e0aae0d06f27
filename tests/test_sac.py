"""SAC: its formulas by hand and against autograd, probes, the temperature, and the policy's KL held by blocks."""

import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import SMALL_SAC, train_sac
from torch import distributions as td

from klrl.agents.sac import SAC, SACConfig
from klrl.buffers.replay import Transitions
from klrl.errors import UsageError
from klrl.kl import kl
from klrl.policies.distributions import DiagonalNormal, squash, squash_gradient
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.parameters import FlatParameters
from klrl.policies.squashed import CorrelatedNoise, SquashedActor, TwinCritic

CPU = torch.device("cpu")


def test_the_squashed_log_density_is_torchs_and_does_not_saturate() -> None:
    torch.manual_seed(0)
    normal = DiagonalNormal(torch.randn(50, 3), 0.3 * torch.randn(50, 3))
    action, log_prob = squash(normal, torch.randn(50, 3))
    reference = td.TransformedDistribution(
        td.Independent(td.Normal(normal.loc, normal.log_std.exp()), 1), [td.TanhTransform()]
    )
    assert torch.allclose(log_prob, reference.log_prob(action), atol=1e-3)
    far = DiagonalNormal(torch.tensor([[60.0], [-60.0]]), torch.zeros(2, 1))
    action, log_prob = squash(far, torch.zeros(2, 1))
    # log N(0) - 2 (log 2 - 60): where 1 - tanh^2 is 0 in float32
    assert log_prob.tolist() == pytest.approx([-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 60.0)] * 2, rel=1e-6)
    assert action.flatten().tolist() == [1.0, -1.0]


def test_the_squashed_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    mean, log_std = (torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise, to_action = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    alpha = torch.rand(6, dtype=torch.float64)
    action, log_prob = squash(DiagonalNormal(mean, log_std), noise)
    expected = torch.autograd.grad((alpha * log_prob).sum() + (to_action * action).sum(), (mean, log_std))
    found = squash_gradient(DiagonalNormal(mean.detach(), log_std.detach()), noise, action.detach(), to_action, alpha)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("images", [False, True])
def test_the_twin_critic_written_out_is_autograds(images: bool) -> None:
    number = spaces.Box(-1, 1, (3,))
    camera = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    space: Any = spaces.Dict({"camera": camera, "number": number}) if images else number
    encoder = ObservationEncoder(space, CPU, normalize=False)
    critic = TwinCritic(encoder, 2, (8, 5), 1, torch.Generator().manual_seed(0))
    flat = FlatParameters(critic)
    obs = {key: np.stack([part.sample() for _ in range(6)]) for key, part in space.spaces.items()} if images else None
    inputs = encoder(obs if obs is not None else np.stack([number.sample() for _ in range(6)]))
    torch.manual_seed(0)
    action, direction = torch.randn(6, 2, requires_grad=True), torch.randn(2, 6, 1)
    (critic(inputs, action) * direction).sum().backward()
    by_autograd, to_action = flat.grad.clone(), action.grad
    flat.zero_grad()
    value, pull, pull_action = critic.linearize(inputs, action.detach())
    with torch.no_grad():
        assert to_action is not None
        assert torch.allclose(pull_action(direction), to_action, atol=1e-5)
        assert float(flat.grad.abs().sum()) == 0.0, "the policy's step leaves the critics alone"
        pull(direction)
        assert torch.allclose(flat.grad, by_autograd, atol=1e-4)
        assert torch.allclose(value, critic(inputs, action), atol=1e-5)
    assert not torch.equal(value[0], value[1])


def test_the_squashed_actor_acts_as_it_is_and_pulls_back_to_all_its_weights() -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    actor = SquashedActor(encoder, 2, (8,), "relu", torch.Generator().manual_seed(0))
    flat = FlatParameters(actor)
    x = torch.randn(5, 3)
    with torch.no_grad():
        dist, _, pullback = actor.linearize({"vector": x})
        pullback(torch.ones(5, 2), torch.full((5, 2), 2.0))
    by_hand = flat.grad.clone()
    flat.zero_grad()
    new = actor({"vector": x})
    (new.loc.sum() + 2 * new.log_std.sum()).backward()
    assert torch.allclose(by_hand, flat.grad, atol=1e-6)
    acted = actor.act(actor.network.mlp.on_host(x.numpy()), None)
    assert np.allclose(acted, torch.tanh(dist.loc).numpy(), atol=1e-6)
    samples = np.stack([actor.act(actor.network.mlp.on_host(x.numpy()), np.random.default_rng(i)) for i in range(4000)])
    back = np.arctanh(samples.clip(-0.999999, 0.999999))
    assert np.allclose(np.median(back, 0), dist.loc.numpy(), atol=0.15)


def one_step(config: SACConfig, action_space: spaces.Space[Any]) -> tuple[SAC, Transitions]:
    """An agent and a batch of one transition: reward 1, discount 0.5."""
    agent = SAC(spaces.Box(-1, 1, (1,)), action_space, config)
    see = {"vector": torch.zeros(1, 1)}
    action = torch.zeros(1, agent.outputs) if agent.continuous else torch.ones(1, 1)
    return agent, Transitions(see, action, torch.ones(1), torch.full((1,), 0.5), see)


def test_the_discrete_losses_match_a_hand_computed_example() -> None:
    def prepared() -> tuple[SAC, Transitions]:
        agent, batch = one_step(replace(SMALL_SAC, hidden_sizes=()), spaces.Discrete(2))
        with torch.no_grad():
            agent.policy.vector.zero_()
            agent.policy.vector[-2:] = torch.tensor([0.0, math.log(3.0)])  # probabilities 1/4 and 3/4
            agent.target.vector.zero_()
            # Biases of both critics for both actions: the lower is 2 for the first and 1 for the second.
            agent.target_critic.biases[0].copy_(torch.tensor([[[2.0, 5.0]], [[4.0, 1.0]]]))
            agent.values.vector.copy_(agent.target.vector)
        return agent, batch

    p, lower = [0.25, 0.75], [2.0, 1.0]
    value = sum(x * (q - 0.1 * math.log(x)) for x, q in zip(p, lower, strict=True))
    with torch.no_grad():
        agent, batch = prepared()
        assert float(agent._soft_value(batch.inputs, 0.1)) == pytest.approx(value, rel=1e-6)
        loss, entropy = agent._policy_step(batch, 0.1, move=True)
        assert float(loss) == pytest.approx(-value, rel=1e-6)
        assert float(entropy) == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-6)
        # d loss / d logit_1 = p_1 (c_1 - sum p c), c = 0.1 log p - Q: not divided by the number of actions.
        cost = [0.1 * math.log(x) - q for x, q in zip(p, lower, strict=True)]
        mean = sum(x * c for x, c in zip(p, cost, strict=True))
        assert float(agent.policy.grad[-1]) == pytest.approx(p[1] * (cost[1] - mean), rel=1e-5)
        agent, batch = prepared()
        critic_loss, target = agent._critic_step(batch, 0.1)
        assert float(target) == pytest.approx(1 + 0.5 * value, rel=1e-6)
        errors = [5.0 - (1 + 0.5 * value), 1.0 - (1 + 0.5 * value)]  # action 1 was taken
        assert float(critic_loss) == pytest.approx(sum(e * e for e in errors) / 2, rel=1e-5)


def test_the_continuous_policy_gradient_is_autograds() -> None:
    agent, _ = one_step(SMALL_SAC, spaces.Box(-2.0, 2.0, (3,)))
    torch.manual_seed(0)
    inputs = {"vector": torch.randn(16, 1)}
    batch = Transitions(inputs, torch.zeros(16, 3), torch.zeros(16), torch.zeros(16), inputs)
    state = agent.rng.bit_generator.state
    with torch.no_grad():
        agent._policy_step(batch, 0.2, move=False)
        agent.rng.bit_generator.state = state
        agent.config = replace(agent.config, learning_rate=1e-30)
        agent._policy_step(batch, 0.2, move=True)
        by_hand = agent.policy.grad.clone()
        agent.rng.bit_generator.state = state
        noise = torch.from_numpy(agent.rng.standard_normal((16, 3), dtype=np.float32))
    agent.policy.zero_grad()
    action, log_prob = squash(agent.actor(inputs), noise)
    (0.2 * log_prob - agent.critic(inputs, action).amin(0).squeeze(-1)).mean().backward()
    assert torch.allclose(by_hand, agent.policy.grad, atol=1e-6)


def test_targets_follow_by_polyak_averaging() -> None:
    agent, _ = train_sac(replace(SMALL_SAC, tau=0.25), "Pendulum-v1", 17)  # the first update, after 4 * 17 steps
    values, before = agent.values.vector.clone(), agent.target.vector.clone()
    buffer = agent.new_buffer(1)
    shown = np.zeros((1, 3), np.float32)
    buffer.add(shown, np.zeros((1, 1), np.float32), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), shown)
    agent.update(buffer)
    assert not torch.equal(agent.values.vector, values)
    assert torch.allclose(agent.target.vector, 0.75 * before + 0.25 * agent.values.vector, atol=1e-6)


CASES = [
    ("RewardByBoth", "discrete", "box"),
    ("RewardByBoth", "multidiscrete", "dict"),
    ("RewardByBoth", "multibinary", "discrete"),
    ("RewardByBoth", "box", "box"),
    ("Discounting", "discrete", "box"),
    ("Truncation", "discrete", "box"),
    ("Truncation", "box", "dict"),
]


@pytest.mark.parametrize(("name", "action", "observation"), CASES)
def test_probes_are_solved_and_valued(name: str, action: str, observation: str) -> None:
    config = replace(SMALL_SAC, target_entropy_fraction=0.05, target_entropy=-3.0, ent_coef=0.1)
    agent, reports = train_sac(config, f"klrl/{name}-v0", 700, action=action, observation=observation)
    probe: Any = gym.make(f"klrl/{name}-v0", action=action, observation=observation).unwrapped
    assert len(reports) >= 5
    for bit in (0, 1):
        probe.bit = bit
        shown = probe.observe()
        batch = (
            {k: np.asarray(v)[None] for k, v in shown.items()} if isinstance(shown, dict) else np.asarray(shown)[None]
        )
        inputs = agent.encoder(batch)
        chosen, _ = agent.predict(shown, deterministic=True)
        if name == "RewardByBoth":
            assert probe.match(chosen, bit) > 0.9
        else:
            assert agent.action_space.contains(chosen)
        with torch.no_grad():
            value = agent._soft_value(inputs, 0.0)
        # The policy still samples: with a Box it loses its variance.
        assert float(value) == pytest.approx(probe.value(bit, 0.9), rel=0.25 if action == "box" else 0.1)


def test_an_image_probe_is_solved() -> None:
    config = replace(
        SMALL_SAC, target_entropy_fraction=0.05, ent_coef=0.1, batch_size=16, buffer_size=500, learning_rate=1e-3
    )
    agent, _ = train_sac(config, "klrl/RewardByBoth-v0", 150, action="discrete", observation="image")
    probe: Any = gym.make("klrl/RewardByBoth-v0", action="discrete", observation="image").unwrapped
    for bit in (0, 1):
        probe.bit = bit
        assert probe.match(agent.predict(probe.observe(), deterministic=True)[0], bit) == 1.0


def test_one_seed_gives_one_run_and_a_state_continues() -> None:
    (first, reports), (second, again) = (train_sac(SMALL_SAC, "Pendulum-v1", 120, seed=5) for _ in range(2))
    assert torch.equal(first.policy.vector, second.policy.vector)
    assert reports == again
    other, _ = train_sac(SMALL_SAC, "Pendulum-v1", 120, seed=6)
    assert not torch.equal(first.policy.vector, other.policy.vector)
    copy = SAC(first.observation_space, first.action_space, SMALL_SAC, seed=99)
    copy.load_state_dict(first.state_dict())
    obs = np.zeros((3, 3), np.float32)
    assert np.array_equal(first.act(obs), copy.act(obs))
    with pytest.raises(ValueError, match="weights"):
        SAC(spaces.Box(-1, 1, (7,)), first.action_space, SMALL_SAC).load_state_dict(first.state_dict())


def test_what_sac_cannot_do_is_refused() -> None:
    see = spaces.Box(-1, 1, (2,))
    with pytest.raises(UsageError, match=r"infinite bounds.*TransformAction"):
        SAC(see, spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(UsageError, match="infinite bounds"):
        SAC(see, spaces.Box(np.float32(-3.4e38), np.float32(3.4e38), (2,)))
    for steps, n_envs in ((0, 1), (60, 1), (-1, 60)):
        with pytest.raises(UsageError, match="--gradient-steps"):
            SAC(see, spaces.Discrete(2), replace(SMALL_SAC, gradient_steps=steps)).new_buffer(n_envs)
    with pytest.raises(UsageError, match="--buffer-size 10,000,000,000,000 does not fit"):
        SAC(see, spaces.Discrete(2), replace(SMALL_SAC, buffer_size=10**13)).new_buffer(1)
    with pytest.raises(UsageError, match="--buffer-folder /proc/nope"):
        SAC(see, spaces.Discrete(2), replace(SMALL_SAC, buffer_folder="/proc/nope")).new_buffer(1)
    with pytest.raises(UsageError, match="1,048,576 joint actions"):
        SAC(see, spaces.MultiBinary(20))


def test_correlated_noise_leaves_each_action_as_it_was() -> None:
    noise = CorrelatedNoise(np.random.default_rng(0), 0.9)
    x = np.stack([noise.standard_normal((50, 2)) for _ in range(4000)])
    assert x.dtype == np.float32
    assert x.mean() == pytest.approx(0, abs=0.02)
    assert x.std() == pytest.approx(1, abs=0.02)
    for lag in (1, 5):
        assert (x[lag:] * x[:-lag]).mean() == pytest.approx(0.9**lag, abs=0.02)
    assert (x[..., 0] * x[..., 1]).mean() == pytest.approx(0, abs=0.02)
    assert noise.standard_normal((3, 2)).shape == (3, 2), "another number of environments begins anew"
    uniform = np.stack([noise.uniform((3, 2)) for _ in range(20_000)])
    assert np.histogram(uniform, 10, (-1, 1))[0] / uniform.size == pytest.approx(0.1, abs=0.01)
    white, plain = CorrelatedNoise(np.random.default_rng(3), 0.0), np.random.default_rng(3)
    for _ in range(2):
        assert np.array_equal(white.standard_normal((4, 1)), plain.standard_normal((4, 1), dtype=np.float32))


def test_actions_are_given_as_each_space_wants_them() -> None:
    box = spaces.Box(np.float32([[-1.0, 0.0]]), np.float32([[1.0, 0.5]]))
    for space in (spaces.Discrete(2, start=5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary([2, 2]), box):
        agent = SAC(spaces.Box(-1, 1, (2,)), space, SMALL_SAC)
        obs = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
        for warm in (0, 1):
            agent.n_updates = warm
            acted = agent.env_action(agent.act(obs))
            assert all(space.contains(space.dtype.type(a) if a.ndim == 0 else a) for a in acted)  # type: ignore[union-attr]
        single, _ = agent.predict(obs[0])
        assert space.contains(single)
    inputs = agent.encoder(obs)
    assert torch.equal(kl(agent.distribution(inputs), agent.distribution(inputs)), torch.zeros(50))
