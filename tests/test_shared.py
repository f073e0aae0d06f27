"""A critic that shares the policy's hidden layers: who moves them, what is saved, and what it does not go with."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect, train
from test_resume import check_same

import klrl
from klrl.agents.ppo import PPO, PPOConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.policies.parameters import gradients
from klrl.policies.shared import SharedCritic


class Features(torch.nn.Sequential):
    def __init__(self, space: Any) -> None:
        super().__init__(torch.nn.Linear(space.shape[0], 16), torch.nn.Tanh())


def updated(network: Any = None, **options: Any) -> tuple[Any, Any, Any, klrl.UpdateResult]:
    """The policy's and the critic's weights before an update, the agent after it, and its result."""
    env = make_vector("CartPole-v1", 4, EnvConfig())
    config = PPOConfig(n_steps=32, share_network=True, lr_schedule="constant", **options)
    agent = PPO(env.single_observation_space, env.single_action_space, config, network=network)
    buffer = agent.new_buffer(4)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    before = agent.policy_params.flat.clone(), agent.critic_params.flat.clone()
    return *before, agent, agent.update(buffer)


@pytest.mark.parametrize("network", [None, Features])
def test_the_critic_is_a_layer_on_the_policys_hidden_ones(network: Any) -> None:
    _, _, agent, _ = updated(network)
    assert isinstance(agent.critic, SharedCritic)
    width = 64 if network is None else 16
    assert [tuple(w.shape) for w in agent.critic.parameters()] == [(1, width), (1,)]
    obs = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
    inputs = agent.encoder(obs)
    hidden = agent.policy.network.hidden(inputs)
    assert torch.allclose(agent.value(obs), hidden @ agent.critic.network.weight[0] + agent.critic.network.bias)
    output = agent.policy.network.mlp.layers[-1] if network is None else agent.policy.network.output
    assert torch.allclose(agent.policy.network(inputs), output(hidden), atol=1e-6)


def test_a_loss_of_the_values_moves_the_hidden_layers_and_steps_of_the_critic_alone_do_not() -> None:
    _, _, agent, _ = updated()
    found = gradients(agent.critic({"vector": torch.randn(5, 4)}).square().sum(), agent.policy_params)
    hidden = 64 * 4 + 64 + 64 * 64 + 64
    assert all(bool(part.any()) for part in found[:hidden].split([256, 64, 4096, 64]))
    assert not bool(found[hidden:].any()), "the policy's outputs have no part in the values"
    # Stopped after the first minibatch, what follows is the critic's alone.
    early: Any = {"stop": 1e-12, "check": "minibatch", "on_overshoot": "keep"}
    one, _, first, result = updated(batch_size=128, n_epochs=1, kl=early)
    assert result.kl.stopped_at == 0
    two, _, more, result = updated(batch_size=128, n_epochs=5, kl=early)
    assert torch.equal(one, two)
    assert result.kl.stopped_at == 1
    assert torch.equal(first.policy_params.flat, more.policy_params.flat), "four epochs moved the critic's layer alone"
    assert not torch.equal(first.critic_params.flat, more.critic_params.flat)


@pytest.mark.parametrize("rule", ["project", "rollback"])
def test_the_policys_kl_is_held_with_the_hidden_layers_among_its_weights(rule: Any) -> None:
    policy, critic, agent, result = updated(learning_rate=3e-2, kl={"target": 0.003, "on_overshoot": rule})
    assert result.kl.attempted > 0.003 >= result.kl.mean
    if rule == "rollback":
        assert torch.equal(agent.policy_params.flat, policy)
    assert not torch.equal(agent.critic_params.flat, critic)


def test_a_shared_network_learns_policy_and_values() -> None:
    agent, _ = train(
        PPOConfig(n_steps=32, share_network=True, learning_rate=5e-3, normalize_reward=False, n_epochs=4),
        "klrl/RewardByBoth-v0",
        15,
        action="discrete",
    )
    obs = np.array([[-1.0], [1.0]], np.float32)
    probs = agent.distribution(obs).probs
    assert float(probs[0, 0, 0]) > 0.8
    assert float(probs[1, 0, 2]) > 0.8
    assert torch.allclose(agent.value(obs), torch.ones(2), atol=0.25)


def test_a_run_with_a_shared_network_goes_on_and_is_copied_as_a_whole() -> None:
    check_same("ppo", "CartPole-v1", 512, share_network=True, final_episodes=1)
    run = klrl.train("ppo", "CartPole-v1", share_network=True, **{**QUICK, "total_timesteps": 256})
    agent, twin = klrl.load(run.folder), copy.deepcopy(run.agent)
    obs = np.ones((3, 4), np.float32)
    assert torch.equal(agent.value(obs), run.agent.value(obs))
    for weight in run.agent.policy.parameters():
        weight.data.zero_()
    assert torch.equal(twin.value(obs), agent.value(obs)), "the copy's critic reads the copy's policy"
    again = klrl.train("ppo", "CartPole-v1", init_from=str(run.folder), **{**QUICK, "total_timesteps": 256})
    assert isinstance(again.agent.critic, SharedCritic)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options", [{"critic": "bayesian"}, {"critic_hidden_sizes": (8,)}, {"bottleneck": {"size": 2}}], ids=str
)
def test_what_a_shared_network_does_not_go_with_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(klrl.UsageError, match="--share-network goes without"):
        PPO(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), {"share_network": True, **options})
    with pytest.raises(klrl.UsageError, match="unknown option 'share_network'"):
        klrl.train("trpo", "CartPole-v1", share_network=True)
