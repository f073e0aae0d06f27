"""What networks are made of: activations, layer norm, and a critic of its own sizes and rate."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, SMALL_SAC, collect, train, train_sac
from torch.nn import functional

import klrl
from klrl.agents.fused import applies
from klrl.agents.ppo import PPOConfig
from klrl.agents.trpo import TRPOConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.networks import MLP, TwinCritic
from klrl.policies.parameters import FlatParameters, adam_step
from klrl.policies.torso import linear

ACTIVATIONS: list[Any] = ["tanh", "relu", "silu", "gelu", "elu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_mlp_is_its_layers_by_hand(activation: Any, layer_norm: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    mlp = MLP([3, 6, 5, 2], activation, 1.0, rng, layer_norm).double()
    for parameter in mlp.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64, generator=rng)
    expected: Any = x
    for i, layer in enumerate(mlp.layers):
        expected = functional.linear(expected, layer.weight, layer.bias)  # type: ignore[arg-type]
        if i < 2 and mlp.norms is not None:
            centred = expected - expected.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            expected = scaled * mlp.norms[i].weight + mlp.norms[i].bias
        if i < 2:
            expected = getattr(torch, activation, getattr(functional, activation, None))(expected)
    found = mlp(x)
    assert torch.allclose(found, expected, atol=1e-9)
    mine, theirs = (torch.autograd.grad(y.square().sum(), list(mlp.parameters())) for y in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-8) and bool(b.any()) for a, b in zip(mine, theirs, strict=True))
    with torch.no_grad():
        assert torch.allclose(mlp(x), expected, atol=1e-6), "as acting has it, in NumPy where that is possible"
    assert (mlp.forward_numpy(x.numpy()) is None) is layer_norm


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_twin_critics_are_two_normalised_networks(activation: Any) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), torch.device("cpu"), normalize=False)
    rng = torch.Generator().manual_seed(0)
    critic = TwinCritic(encoder, 2, 1, (8, 5), rng, activation, True)
    for parameter in critic.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    obs, action = torch.randn(6, 3, generator=rng), torch.randn(6, 2, generator=rng)
    for one, value in enumerate(critic({"vector": obs}, action)):
        x = torch.cat([obs, action], -1)
        for i in range(2):
            x = x @ critic.weights[i][one] + critic.biases[i][one]
            x = functional.layer_norm(x, x.shape[-1:]) * critic.gains[i][one] + critic.shifts[i][one]
            x = getattr(torch, activation, getattr(functional, activation, None))(x)  # type: ignore[misc]
        assert torch.allclose(value, x @ critic.weights[2][one] + critic.biases[2][one], atol=1e-5)


def test_gradients_by_hand_step_aside_where_they_do_not_apply() -> None:
    for activation in ACTIVATIONS:
        for norm in (False, True):
            agent, _ = train(PPOConfig(n_steps=8, activation=activation, layer_norm=norm), "CartPole-v1", 1)
            by_hand = activation in ("tanh", "relu", "elu") and not norm
            assert applies(agent.critic, agent.critic_params) is by_hand
            assert (agent.fused is not None) is by_hand


@pytest.mark.parametrize(
    "config",
    [
        PPOConfig(n_steps=32, activation="silu", layer_norm=True, critic_hidden_sizes=(32,), learning_rate=3e-3),
        PPOConfig(n_steps=32, activation="elu", critic_learning_rate=1e-2, learning_rate=3e-3),
        TRPOConfig(n_steps=32, activation="gelu", layer_norm=True, critic_hidden_sizes=(16, 16)),
    ],
    ids=["silu", "elu", "gelu"],
)
def test_policies_of_every_form_learn(config: Any) -> None:
    agent, reports = train(config, "klrl/RewardByBoth-v0", 8, action="discrete")
    probs = agent.distribution(np.array([[-1.0], [1.0]], np.float32)).probs
    assert float(probs[0, 0, 0]) > 0.8, "the first action at the first state"
    assert float(probs[1, 0, 2]) > 0.8
    assert all(report.kl.mean <= config.kl.target * 1.0001 for report in reports)


def test_sac_learns_by_normalised_critics_of_their_own() -> None:
    config = replace(
        SMALL_SAC, layer_norm=True, critic_hidden_sizes=(24, 24), critic_activation="silu", critic_learning_rate=1e-2
    )
    agent, reports = train_sac(config, "klrl/RewardByBoth-v0", 400, action="box")
    assert [tuple(w.shape[1:]) for w in agent.critic.weights] == [(3, 24), (24, 24), (24, 1)]
    assert float(agent.critic_rate) == pytest.approx(1e-2)
    assert float(agent.learning_rate) == pytest.approx(3e-3)
    assert np.isfinite(reports[-1].metrics["train/critic_loss"])
    taken = agent.predict(np.array([[-1.0], [1.0]], np.float32), deterministic=True)[0]
    assert np.allclose(taken, [[0.0, 2.0], [2.0, 0.0]], atol=0.5)


def test_a_step_with_two_rates_is_two_steps() -> None:
    def groups() -> list[FlatParameters]:
        rng = torch.Generator().manual_seed(0)
        return [FlatParameters(linear(3, 2, 1.0, rng), "one"), FlatParameters(linear(2, 2, 1.0, rng), "two")]

    together, apart = groups(), groups()
    for step in range(5):
        gradient = torch.randn(14, generator=torch.Generator().manual_seed(step))
        adam_step(gradient, torch.tensor([1e-3, 1e-1]), *together)
        for group, part, rate in zip(apart, gradient.split([8, 6]), (1e-3, 1e-1), strict=True):
            adam_step(part, torch.tensor(rate), group)
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine.flat, theirs.flat)


def test_the_critics_rate_is_its_own_and_its_default_the_policys() -> None:
    def weights(**options: Any) -> tuple[Any, Any]:
        more: dict[str, Any] = {"lr_schedule": "constant", "clip_grads_apart": True, "kl": {"stop": 1e-9}, **options}
        agent, reports = train(PPOConfig(n_steps=16, n_epochs=2, **more), "CartPole-v1", 1)
        assert reports[0].kl.stopped_at == 1, "half of the critic's steps are its alone"
        return agent.policy_params.flat, agent.critic_params.flat

    policy, critic = weights()
    same, as_much = weights(critic_learning_rate=3e-4)
    assert torch.equal(policy, same)
    assert torch.equal(critic, as_much)
    still, faster = weights(critic_learning_rate=3e-2)
    assert torch.equal(policy, still)
    assert not torch.allclose(critic, faster, atol=1e-3)


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [5e-4, 5e-3]), ("kl", [1.5e-3, 1e-2])])
def test_the_critics_rate_follows_a_linear_schedule_and_no_kl(schedule: Any, rates: list[float]) -> None:
    class Seen(klrl.PPO):
        def take_step(self, gradient: Any, learning_rate: Any, *more: Any) -> Any:
            self.rates = learning_rate.tolist()
            return super().take_step(gradient, learning_rate, *more)

    config = PPOConfig(n_steps=16, lr_schedule=schedule, critic_learning_rate=0.01, learning_rate=1e-3)
    env = make_vector("CartPole-v1", 2, EnvConfig())
    agent = Seen(env.single_observation_space, env.single_action_space, config)
    buffer = agent.new_buffer(2)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    agent.learning_rate.load_state_dict({"log_value": math.log(1e-3 if schedule == "linear" else 1.5e-3)})
    agent.update(buffer, progress=0.5)
    assert agent.rates == pytest.approx(rates)


@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_a_run_of_another_form_is_read_back_and_is_a_run_to_start_from(agent: str) -> None:
    form: dict[str, Any] = {"activation": "gelu", "layer_norm": True, "critic_hidden_sizes": [24, 24]}
    more = {"learning_starts": 50, "gradient_steps": 1, "critic_activation": "elu"}
    steps = {"n_steps": 32, "n_epochs": 1} if agent == "ppo" else more
    task = {"n_envs": 2, "quiet": True, "eval_every": 0, "total_timesteps": 128, **steps}
    run = klrl.train(agent, "Pendulum-v1", hidden_sizes=[16], **form, **task)
    loaded: Any = klrl.load(run.folder)
    assert torch.equal(loaded.critic_params.flat, run.agent.critic_params.flat)  # type: ignore[attr-defined]
    again = klrl.train(agent, "Pendulum-v1", init_from=str(run.folder), **{**task, "seed": 1})
    assert list(again.agent.config.critic_hidden_sizes) == [24, 24]
    assert again.agent.config.layer_norm


def test_trpo_names_the_rate_that_it_has() -> None:
    with pytest.raises(klrl.UsageError, match=r"unknown option 'critic_learning_rate' \(did you mean 'learning_rate'"):
        klrl.train("trpo", "CartPole-v1", critic_learning_rate=1e-3, **QUICK)
    with pytest.raises(klrl.UsageError, match="--activation must be one of tanh, relu, silu, gelu, elu, got 'selu'"):
        klrl.train("ppo", "CartPole-v1", activation="selu", **QUICK)
