"""SAC: its formulas by hand and against autograd, probes, the temperature, and the policy's KL held by windows."""

import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import SMALL_SAC, train_sac
from torch import Tensor
from torch import distributions as td

from klrl.agents.limits import OffPolicyKLConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.buffers.replay import Transitions
from klrl.errors import UsageError
from klrl.kl import freeze, kl
from klrl.policies.parameters import gradients


def one_step(config: SACConfig, action_space: spaces.Space[Any]) -> tuple[SAC, Transitions]:
    """An agent and a batch of one transition: reward 1, discount 0.5."""
    agent = SAC(spaces.Box(-1, 1, (1,)), action_space, config)
    see = {"vector": torch.zeros(1, 1)}
    action = torch.zeros(1, agent.actions.stored_width) if isinstance(action_space, spaces.Box) else torch.ones(1, 1)
    return agent, Transitions(see, action, torch.ones(1), torch.full((1,), 0.5), see)


def still(agent: SAC, batch: Transitions, noise: Tensor, alpha: float) -> tuple[list[float], Tensor, Tensor]:
    """The metrics of a step in which nothing moves, and the gradients that critics and policy would have taken."""
    taken: dict[str, Tensor] = {}
    target = agent.target_params.flat.clone()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("klrl.agents.sac.adam_step", lambda gradient, rate, group: taken.update({group.name: gradient}))
        metrics = agent._step(batch, noise, torch.tensor(alpha), moves=True).tolist()
    agent.target_params.flat.copy_(target)
    return metrics, taken["critic"], taken["policy"]


def test_the_discrete_losses_match_a_hand_computed_example() -> None:
    agent, batch = one_step(replace(SMALL_SAC, hidden_sizes=()), spaces.Discrete(2))
    with torch.no_grad():
        agent.policy_params.flat.zero_()
        agent.policy_params.flat[-2:] = torch.tensor([0.0, math.log(3.0)])  # probabilities 1/4 and 3/4
        agent.target_params.flat.zero_()
        # Biases of both critics for both actions: the lower is 2 for the first and 1 for the second.
        agent.target_critic.biases[0].copy_(torch.tensor([[[2.0, 5.0]], [[4.0, 1.0]]]))
        agent.critic_params.flat.copy_(agent.target_params.flat)
    p, lower = [0.25, 0.75], [2.0, 1.0]
    value = sum(x * (q - 0.1 * math.log(x)) for x, q in zip(p, lower, strict=True))
    noise = agent.actions.draw_noise(agent.rng, 1)
    metrics, to_critic, to_policy = still(agent, batch, noise, 0.1)
    loss_q, target, loss_pi, entropy, *_ = metrics
    assert loss_pi == pytest.approx(-value, rel=1e-6)
    assert entropy == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-6)
    assert target == pytest.approx(1 + 0.5 * value, rel=1e-6)
    errors = [5.0 - (1 + 0.5 * value), 1.0 - (1 + 0.5 * value)]  # action 1 was taken
    assert loss_q == pytest.approx(sum(e * e for e in errors) / 2, rel=1e-5)
    # d loss / d logit_1 = p_1 (c_1 - sum p c), c = 0.1 log p - Q: not divided by the number of actions.
    cost = [0.1 * math.log(x) - q for x, q in zip(p, lower, strict=True)]
    mean = sum(x * c for x, c in zip(p, cost, strict=True))
    assert float(to_policy[-1]) == pytest.approx(p[1] * (cost[1] - mean), rel=1e-5)
    to_bias = agent.critic_params.unflatten(to_critic)["biases.0"].flatten().tolist()
    assert to_bias == pytest.approx([0.0, errors[0], 0.0, errors[1]], rel=1e-5)
    obs = np.zeros((1, 1), np.float32)
    alpha = agent.alpha.value
    value = sum(x * (q - alpha * math.log(x)) for x, q in zip(p, lower, strict=True))
    assert float(agent.value(obs)) == pytest.approx(value, rel=1e-5)


def test_the_continuous_losses_match_a_hand_computed_example() -> None:
    agent, batch = one_step(replace(SMALL_SAC, hidden_sizes=()), spaces.Box(-2.0, 2.0, (1,)))
    with torch.no_grad():
        for params in (agent.policy_params, agent.target_params):
            params.flat.zero_()
        agent.policy_params.flat[-2:] = torch.tensor([0.3, math.log(0.5)])  # mean and log_std at every state
        # Q(s, a) = 3a + 1 and -a + 4: weights for (s, a) and biases.
        agent.target_critic.weights[0].copy_(torch.tensor([[[0.0], [3.0]], [[0.0], [-1.0]]]))
        agent.target_critic.biases[0].copy_(torch.tensor([[[1.0]], [[4.0]]]))
        agent.critic_params.flat.copy_(agent.target_params.flat)
    noise = torch.tensor([[[0.8]], [[-0.4]]])  # for the next state's action and for the present one's

    def drawn(n: float) -> tuple[float, float]:
        u = 0.3 + 0.5 * n
        log_prob = -0.5 * n * n - math.log(0.5) - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(u) ** 2)
        return math.tanh(u), log_prob

    (then, then_log), (now, now_log) = drawn(0.8), drawn(-0.4)
    metrics, to_critic, to_policy = still(agent, batch, noise, 0.2)
    target = 1 + 0.5 * (min(3 * then + 1, 4 - then) - 0.2 * then_log)
    assert metrics[1] == pytest.approx(target, rel=1e-5)
    assert metrics[0] == pytest.approx(((1 - target) ** 2 + (4 - target) ** 2) / 2, rel=1e-5)  # action 0 was taken
    assert metrics[2] == pytest.approx(0.2 * now_log - min(3 * now + 1, 4 - now), rel=1e-5)
    assert metrics[3] == pytest.approx(-now_log, rel=1e-5)
    to_bias = agent.critic_params.unflatten(to_critic)["biases.0"].flatten().tolist()
    assert to_bias == pytest.approx([1 - target, 4 - target], rel=1e-5)
    # d/du: of log p, 2 tanh(u) as -log(1 - tanh^2) grows; of Q, 3 (1 - tanh^2). log_std moves u by std * noise.
    to_u = 0.2 * 2 * now - 3 * (1 - now**2)
    assert to_policy[-2:].tolist() == pytest.approx([to_u, to_u * 0.5 * -0.4 - 0.2], rel=1e-4)
    assert float(agent.value(np.zeros((1, 1), np.float32))) == pytest.approx(
        min(3 * math.tanh(0.3) + 1, 4 - math.tanh(0.3)), rel=1e-5
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("space", [spaces.Box(-2.0, 2.0, (3,)), spaces.MultiDiscrete([2, 3])], ids=str)
def test_both_gradients_are_those_of_the_papers_losses(space: Any, direction: Any) -> None:
    held = OffPolicyKLConfig(target=0.01, penalty="fixed", coef=0.7, direction=direction)
    agent, _ = one_step(replace(SMALL_SAC, kl=held), space)
    rng = torch.Generator().manual_seed(0)
    for params in (agent.policy_params, agent.old_params, agent.target_params):
        params.flat.add_(0.2 * torch.randn(params.flat.shape, generator=rng))
    inputs, then = ({"vector": torch.randn(16, 1, generator=rng)} for _ in range(2))
    continuous = isinstance(space, spaces.Box)
    action = torch.rand(16, 3, generator=rng) if continuous else torch.randint(6, (16, 1), generator=rng).float()
    reward, discount = torch.randn(16, generator=rng), 0.9 * (torch.rand(16, generator=rng) < 0.7).float()
    batch, noise = Transitions(inputs, action, reward, discount, then), agent.actions.draw_noise(agent.rng, 16)
    metrics, to_critic, to_policy = still(agent, batch, noise, 0.2)

    def lower_q(critic: Any, at: Any, n: Tensor) -> tuple[Tensor, Tensor]:
        """E[min Q - alpha log pi] over actions, and the entropy's estimate, from torch's own distributions."""
        policy = agent.policy(at)
        if continuous:
            normal = td.Normal(policy.loc, policy.log_std.exp())
            u = normal.loc + normal.scale * n
            log_prob = (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)
            return critic(at, torch.tanh(u)).squeeze(-1).amin(0) - 0.2 * log_prob, -log_prob
        categorical = td.Categorical(logits=policy.logits.squeeze(1))
        q = critic(at).amin(0).detach()
        return (categorical.probs * (q - 0.2 * categorical.logits)).sum(-1), categorical.entropy()

    with torch.no_grad():
        target = reward + discount * lower_q(agent.target_critic, then, noise[0])[0]
    at = agent.critic(inputs, action).squeeze(-1) if continuous else agent.critic(inputs)
    q = at if continuous else at[:, torch.arange(16), action[:, 0].long()]
    loss_q = ((q[0] - target) ** 2).mean() / 2 + ((q[1] - target) ** 2).mean() / 2
    value, entropy = lower_q(agent.critic, inputs, noise[1])
    old, new = freeze(agent.old_policy(inputs)), agent.policy(inputs)
    moved = kl(old, new) if direction == "forward" else kl(new, old)
    loss_pi = -value.mean() + 0.7 * moved.mean()
    assert metrics[:4] == pytest.approx([x.mean().item() for x in (loss_q, target, -value, entropy)], rel=1e-4)
    assert torch.allclose(to_critic, gradients(loss_q, agent.critic_params), atol=1e-5)
    assert torch.allclose(to_policy, gradients(loss_pi, agent.policy_params), atol=1e-5)
    assert float(moved.detach().mean()) > 0.01


def test_targets_follow_by_polyak_averaging() -> None:
    agent, _ = train_sac(replace(SMALL_SAC, tau=0.25), "Pendulum-v1", 17)  # the first update, after 4 * 17 steps
    values, before = agent.critic_params.flat.clone(), agent.target_params.flat.clone()
    buffer = agent.new_buffer(1)
    shown = np.zeros((1, 3), np.float32)
    buffer.add(shown, np.zeros((1, 1), np.float32), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), shown)
    agent.update(buffer)
    assert not torch.equal(agent.critic_params.flat, values)
    assert torch.allclose(agent.target_params.flat, 0.75 * before + 0.25 * agent.critic_params.flat, atol=1e-6)


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
    agent, reports = train_sac(config, f"klrl/{name}-v0", 700, seed=2, action=action, observation=observation)
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
            many = {key: part.repeat(256, *[1] * (part.dim() - 1)) for key, part in inputs.items()}
            noise, policy = agent.actions.draw_noise(agent.rng, 256)[0], agent.policy(many)
            values, _ = agent.actions.soft_value(policy, agent.target_critic, many, torch.tensor(0.0), noise)
            value = values.mean()
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
    assert torch.equal(first.policy_params.flat, second.policy_params.flat)
    assert reports == again
    other, _ = train_sac(SMALL_SAC, "Pendulum-v1", 120, seed=6)
    assert not torch.equal(first.policy_params.flat, other.policy_params.flat)
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
    assert torch.equal(kl(agent.distribution(obs), agent.distribution(obs)), torch.zeros(50))
