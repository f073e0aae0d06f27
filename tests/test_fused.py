"""The gradients written out in ``klrl.agents.fused`` are those that autograd has of the losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import train
from torch import Tensor, nn

from klrl.agents.fused import FusedCritic, FusedPolicy, Rows, applies, suits
from klrl.agents.on_policy import Batch, value_loss
from klrl.agents.ppo import PPO, PPOConfig, policy_loss
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.kl import SPO, Clip, Gate, KLLimit, Reverse, StateRule, at_most, freeze, kl
from klrl.kl.parameters import parameters_of
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.heads import make_head
from klrl.policies.jacobian import jacobian
from klrl.policies.networks import Critic, Network
from klrl.policies.parameters import FlatParameters, gradients
from klrl.policies.policy import Policy

ROWS = 40
SPACES: dict[str, Any] = {
    "discrete": spaces.Discrete(3),
    "padded": spaces.MultiDiscrete([2, 4, 3]),
    "even": spaces.MultiDiscrete([3, 3]),
    "binary": spaces.MultiBinary(2),
    "bounded": spaces.Box(-2.0, 6.0, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (3,)),
}


def made(space: Any, activation: Any = "tanh", hidden: tuple[int, ...] = (8, 5)) -> tuple[Policy, Critic]:
    """A policy and a critic in float64, where two ways to one gradient differ by rounding alone."""
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), torch.device("cpu"), normalize=False)
    rng, head = torch.Generator().manual_seed(0), make_head(space)
    policy = Policy(encoder, Network(encoder, hidden, head.size, activation, 1.0, rng), head)
    critic = Critic(Network(encoder, hidden, 1, activation, 1.0, rng))
    for parameter in (*policy.parameters(), *critic.parameters()):  # biases and widths as well
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return policy.double(), critic.double()


@torch.no_grad()
def batch_for(policy: Policy, critic: Critic) -> Batch:
    """States with an old policy near the new, so that some ratios lie outside of 1 +- 0.2; every fifth row a reset."""
    rng = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {"vector": noise(ROWS, 3)}
    old = freeze(policy(inputs)).map_parameters(lambda p: p + 0.3 * noise(*p.shape))
    torch.manual_seed(0)
    action, value = old.sample(), critic(inputs)
    valid = (torch.arange(ROWS) % 5 > 0).double()
    returns, before = value + noise(ROWS), value + 0.3 * noise(ROWS)
    return Batch(inputs, old, action, old.log_prob(action), before, noise(ROWS), returns, valid / valid.sum())


def close(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine, theirs, rtol=1e-5, atol=1e-8) and float(theirs.abs().sum()) > 0


RULES: dict[str, Callable[[float], list[StateRule]]] = {
    "plain": lambda far: [],
    "clip": lambda far: [Clip(0.2)],
    "spo": lambda far: [SPO(0.2)],
    "gate": lambda far: [Gate(far)],
    "reverse": lambda far: [Reverse(far, 0.3)],
    "both": lambda far: [Reverse(far), Clip(0.2)],
}


def middle(policy: Policy, batch: Batch) -> float:
    """A KL between those of two states, which half of the states have moved by."""
    with torch.no_grad():
        return 1.0001 * float(kl(batch.old, policy(batch.inputs))[batch.mask].median())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ent_coef", [0.0, 0.5])
@pytest.mark.parametrize(("penalty", "direction"), [("none", "forward"), ("fixed", "forward"), ("fixed", "reverse")])
@pytest.mark.parametrize("space", SPACES)
def test_the_policys_gradient_is_autograds(
    space: str, penalty: Any, direction: Any, ent_coef: float, rule: str
) -> None:
    policy, critic = made(SPACES[space])
    batch, flat = batch_for(policy, critic), FlatParameters(policy, "policy")
    limit = KLLimit(at_most(0.01), direction=direction, penalty=penalty, coef=0.7, influence=ent_coef)
    limit.rules += RULES[rule](middle(policy, batch))
    loss, surrogate = policy_loss(policy(batch.inputs), batch, limit, ent_coef)
    with torch.no_grad():
        value, mine = FusedPolicy(policy).gradient(Rows.of(batch), limit, ent_coef)
    assert float(value) == pytest.approx(float(surrogate.detach()), rel=1e-9)
    assert close(mine, gradients(loss, flat))
    ratio = torch.exp(policy(batch.inputs).log_prob(batch.action) - batch.log_prob)
    outside = (ratio - 1).abs() > 0.2
    assert bool(outside.any()), "clipping has something to do"
    assert not bool(outside.all())


def test_each_part_of_the_loss_is_in_the_gradient() -> None:
    policy, critic = made(SPACES["padded"])
    batch = batch_for(policy, critic)
    found = []
    for penalty, direction, influence, ent_coef, rule in (
        ("none", "forward", 0.0, 0.0, "plain"),
        ("fixed", "forward", 0.0, 0.0, "plain"),
        ("fixed", "forward", 0.5, 0.0, "plain"),
        ("fixed", "reverse", 0.0, 0.0, "plain"),
        ("none", "forward", 0.0, 0.5, "plain"),
        *(("none", "forward", 0.0, 0.0, rule) for rule in RULES if rule != "plain"),
    ):
        limit = KLLimit(at_most(0.01), direction=direction, penalty=penalty, coef=0.7, influence=influence)  # type: ignore[arg-type]
        limit.rules += RULES[rule](middle(policy, batch))
        with torch.no_grad():
            found.append(FusedPolicy(policy).gradient(Rows.of(batch), limit, ent_coef)[1])
    for i, one in enumerate(found):
        assert not any(torch.allclose(one, other, rtol=1e-3) for other in found[:i])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (6,), (8, 5, 4)], ids=str)
@pytest.mark.parametrize("space", ["padded", "bounded"])
def test_every_depth_and_activation_has_its_gradient(space: str, hidden: tuple[int, ...], activation: Any) -> None:
    policy, critic = made(SPACES[space], activation, hidden)
    batch, limit = batch_for(policy, critic), KLLimit(at_most(0.01))
    with torch.no_grad():
        _, mine = FusedPolicy(policy).gradient(Rows.of(batch), limit, 0.0)
        _, values = FusedCritic(critic).gradient(Rows.of(batch), 0.0, 1.0)
    loss, _ = policy_loss(policy(batch.inputs), batch, limit)
    assert close(mine, gradients(loss, FlatParameters(policy, "policy")))
    assert close(values, gradients(value_loss(critic(batch.inputs), batch), FlatParameters(critic, "critic")))


@pytest.mark.parametrize("clip_range_vf", [0.0, 0.2])
def test_the_critics_gradient_is_autograds(clip_range_vf: float) -> None:
    policy, critic = made(SPACES["discrete"])
    batch, flat = batch_for(policy, critic), FlatParameters(critic, "critic")
    loss = value_loss(critic(batch.inputs), batch, clip_range_vf)
    with torch.no_grad():
        value, mine = FusedCritic(critic).gradient(Rows.of(batch), clip_range_vf, 0.5)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert close(mine, 0.5 * gradients(loss, flat))
    far = (critic(batch.inputs) - batch.value).abs() > 0.2
    assert bool(far.any())
    assert not bool(far.all())


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("space", SPACES)
def test_the_jacobian_is_autograds(space: str, activation: Any) -> None:
    policy, critic = made(SPACES[space], activation)
    batch, flat = batch_for(policy, critic), FlatParameters(policy, "policy")
    expected, push, pull = policy(batch.inputs), *jacobian(parameters_of(policy(batch.inputs)), flat)
    with torch.no_grad():
        dist, fused_push, fused_pull = FusedPolicy(policy).linearize(batch.inputs, flat)
        rng = torch.Generator().manual_seed(2)
        direction = torch.randn(flat.flat.shape, generator=rng, dtype=torch.float64)
        for mine, theirs in zip(parameters_of(dist), parameters_of(expected), strict=True):
            assert torch.allclose(mine, theirs)
        pushed = push(direction)
        for mine, theirs in zip(fused_push(direction), pushed, strict=True):
            assert torch.allclose(mine, theirs)
            assert float(theirs.abs().sum()) > 0
        cotangent = [torch.randn(part.shape, generator=rng, dtype=torch.float64) for part in pushed]
        for part, logits in zip(cotangent, parameters_of(dist), strict=True):
            part[logits == -torch.inf] = 0.0  # what is padded has no gradient
        assert torch.allclose(fused_pull(cotangent), pull(cotangent))


def test_a_large_minibatch_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, critic = made(SPACES["bounded"])
    rows, limit = Rows.of(batch_for(policy, critic)), KLLimit(at_most(0.01), rules=[Clip(0.2)])

    def found() -> list[Tensor]:
        with torch.no_grad():
            pairs = FusedPolicy(policy).gradient(rows, limit, 0.1), FusedCritic(critic).gradient(rows, 0.2, 1.0)
        return [part for pair in pairs for part in pair]

    whole = found()
    monkeypatch.setattr("klrl.agents.fused._CACHED", 16)  # of 40 rows: three pieces, the last of 8
    assert all(torch.allclose(a, b) for a, b in zip(whole, found(), strict=True))


def test_rows_that_do_not_count_have_no_part_in_it() -> None:
    for space in ("padded", "bounded"):
        policy, critic = made(SPACES[space])
        batch, limit = batch_for(policy, critic), KLLimit(at_most(0.01), rules=[Clip(0.2)])
        kept = torch.nonzero(batch.mask).squeeze(-1)
        assert 0 < len(kept) < ROWS
        with torch.no_grad():
            found = [
                torch.cat(
                    [FusedPolicy(policy).gradient(rows, limit, 0.1)[1], FusedCritic(critic).gradient(rows, 0.2, 1.0)[1]]
                )
                for rows in (Rows.of(batch), Rows.of(batch.take(kept)), Rows.of(batch).take(kept.numpy()))
            ]
        assert torch.allclose(found[0], found[1])
        assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("kind", ["ppo", "clipped", "trpo"])
def test_an_agent_learns_the_same_by_either_way(env: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = {
        "ppo": PPOConfig(n_steps=32, batch_size=60, n_epochs=3),  # the last minibatch is a ragged one
        "clipped": PPOConfig(n_steps=32, batch_size=64, n_epochs=3, clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01),
        "trpo": TRPOConfig(n_steps=32, batch_size=60, n_critic_updates=3),
    }[kind]
    fused, results = train(config, env, 3)
    assert fused.fused is not None
    for module in ("ppo", "trpo"):
        for asked in ("applies", "suits"):
            monkeypatch.setattr(f"klrl.agents.{module}.{asked}", lambda *_: False)
    plain, again = train(config, env, 3)
    assert plain.fused in (None, ())
    for group in ("policy_params", "critic_params"):
        mine, theirs = getattr(fused, group).flat, getattr(plain, group).flat
        assert torch.allclose(mine, theirs, atol=2e-4)
    assert results[0].kl.mean == pytest.approx(again[0].kl.mean, rel=1e-2)
    assert results[0].metrics["train/value_loss"] == pytest.approx(again[0].metrics["train/value_loss"], rel=1e-4)


class Own(nn.Module):
    def __init__(self, space: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_it_is_used_for_plain_mlps_alone() -> None:
    number, image = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (36, 36, 1), np.uint8)
    plain = PPO(number, spaces.Discrete(2))
    assert suits(plain.policy, plain.policy_params)
    assert applies(plain.critic, plain.critic_params)
    own, seen = PPO(number, spaces.Discrete(2), network=Own), PPO(image, spaces.Discrete(2))
    for other in (own, seen):
        assert not suits(other.policy, other.policy_params)
        assert not applies(other.critic, other.critic_params)
    plain.policy.network.mlp.layers[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    plain.policy_params.sync()
    assert not suits(plain.policy, plain.policy_params)
    assert applies(plain.critic, plain.critic_params)


@pytest.mark.parametrize("hook", ["network.mlp", "network", "", "network.mlp.layers.0", "network.mlp.layers.0.weight"])
def test_where_somebody_hooked_in_autograd_is_used(hook: str) -> None:
    agent = PPO(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    for module in (agent.policy, agent.critic):
        name, _, parameter = hook.rpartition(".") if hook.endswith("weight") else (hook, "", "")
        hooked: Any = module.get_submodule(name)
        if parameter:
            hooked.weight.register_hook(lambda gradient: 0 * gradient)
        else:
            hooked.register_forward_hook(lambda module, given, output: None)
    assert not suits(agent.policy, agent.policy_params)
    assert not applies(agent.critic, agent.critic_params)


@pytest.mark.parametrize("name", ["network.mlp", "network"])
def test_an_agent_acts_through_a_hook(name: str) -> None:
    agent = PPO(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), PPOConfig(log_std_init=-20.0))
    before = agent.act([[0.5, 0.5, 0.5]], deterministic=True)
    agent.policy.get_submodule(name).register_forward_hook(lambda module, given, output: 3 * output)
    assert agent.act([[0.5, 0.5, 0.5]], deterministic=True) == pytest.approx(3 * before, rel=1e-5)


@pytest.mark.parametrize("kind", [PPO, TRPO])
def test_frozen_layers_stay_and_the_others_learn(kind: Any) -> None:
    config = replace(kind.Config(), n_steps=32, batch_size=64)
    agent, _ = train(config, "CartPole-v1", 1)
    first, last = agent.policy.network.mlp.layers[0], agent.policy.network.mlp.layers[-1]
    for parameter in (*first.parameters(), *agent.critic.network.mlp.layers[0].parameters()):
        parameter.requires_grad_(False)
    frozen = [p.clone() for p in (first.weight, first.bias, agent.critic.network.mlp.layers[0].weight)]
    free = [p.clone() for p in (last.weight, agent.critic.network.mlp.layers[-1].weight)]
    buffer = agent.new_buffer(1)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(33, 1, 4)).astype(np.float32)
    for t in range(32):
        no = np.zeros(1, bool)
        buffer.add(obs[t], agent.act(obs[t]), rng.normal(size=1), no, no, obs[t + 1])
    result = agent.update(buffer)
    assert result.kl.mean > 0
    layers = agent.policy.network.mlp.layers, agent.critic.network.mlp.layers
    now = (layers[0][0].weight, layers[0][0].bias, layers[1][0].weight)
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(free, (layers[0][-1].weight, layers[1][-1].weight), strict=True))
