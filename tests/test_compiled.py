"""--compile: gradients under torch.compile are those of autograd."""

import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect

import klrl
from klrl import PPO, SAC, PPOConfig, SACConfig
from klrl.agents.base import Agent
from klrl.agents.limits import KLConfig, OffPolicyKLConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.training.compiled import compiled


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what torch.compile traces from pytest's log, which formatting it would take minutes."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def weights(agent: Any) -> torch.Tensor:
    return torch.cat([agent.policy_params.flat, agent.critic_params.flat])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_ppo_compiled_ends_in_the_same_weights(env_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = []
    env = make_vector(env_id, 4, EnvConfig())
    network = torch.nn.Linear(env.single_observation_space.shape[0], 16)  # type: ignore[index]
    for compiles in (False, True):
        config = PPOConfig(n_steps=64, batch_size=60, n_epochs=4, ent_coef=0.01, kl=KLConfig(penalty="adaptive"))
        agent = PPO(env.single_observation_space, env.single_action_space, config, network=network)
        buffer = agent.new_buffer(4)
        collect(agent, env, buffer, env.reset(seed=0)[0])
        if compiles:
            with compiled(agent):
                agent.update(buffer)  # 20 steps, of two sizes
        else:
            agent.update(buffer)
        ended.append(weights(agent))
    assert float((ended[0] - ended[1]).abs().max()) < 1e-5
    out, err = capsys.readouterr()
    assert out.startswith("compiled    gradient by autograd in ")
    assert err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("action", [spaces.Box(-1, 1, (2,)), spaces.Discrete(3)])
def test_sac_compiled_ends_in_the_same_weights(action: spaces.Space[Any], capsys: pytest.CaptureFixture[str]) -> None:
    ended, rng = [], np.random.default_rng(0)
    obs = rng.normal(size=(41, 1, 3)).astype(np.float32)
    for compiles in (False, True):
        config = SACConfig(learning_starts=1, gradient_steps=20, batch_size=16, kl=OffPolicyKLConfig(target=1.0))
        agent = SAC(spaces.Box(-9, 9, (3,)), action, config)
        buffer, no = agent.new_buffer(1), np.zeros(1, bool)
        for step in range(40):
            buffer.add(obs[step], agent.act(obs[step]), np.ones(1), no, no, obs[step + 1])
        if compiles:
            with compiled(agent):
                agent.update(buffer)
        else:
            agent.update(buffer)
        ended.append(weights(agent))
    assert float((ended[0] - ended[1]).abs().max()) < 1e-5
    out, err = capsys.readouterr()
    assert [line.split(" in ")[0] for line in out.splitlines()] == [
        "compiled    critic gradient",
        "compiled    policy gradient",
    ]
    assert err == ""


def test_what_cannot_be_compiled_goes_on_uncompiled_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Untraceable(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.data_ptr() != x.data_ptr()  # which no graph can hold
            return super().forward(x)

    class Own(PPO):
        Config = PPOConfig

    options = {**QUICK, "network": Untraceable(4, 8), "quiet": True}  # of which an agent takes a copy
    runs = [klrl.train(Own, "CartPole-v1", compile=compiles, **options) for compiles in (False, True)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("klrl: --compile: gradient by autograd goes on uncompiled: ")
    assert torch.equal(*(weights(run.agent) for run in runs))


@pytest.mark.parametrize(("agent", "why"), [("ppo", "written out by hand"), ("trpo", "this agent compiles nothing")])
def test_where_nothing_is_compiled_a_line_says_so(agent: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    klrl.train(agent, "CartPole-v1", total_timesteps=256, n_envs=2, n_steps=64, compile=True, quiet=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("klrl: --compile changed nothing: ")
    assert why in line


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_one_process_compiles_many_agents(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))  # the guards are the same
    options: dict[str, Any] = {**QUICK, "batch_size": 60, "quiet": True, "compile": True}
    for seed in range(12):
        klrl.train("ppo", "CartPole-v1", network=torch.nn.Linear(4, 4 + seed % 6), seed=seed, **options)
    assert capsys.readouterr().err == ""


def test_an_agent_is_as_it_was_after_a_block() -> None:
    agent: Agent = SAC(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)))
    with compiled(agent):
        assert set(agent.compiles) <= vars(agent).keys()
    assert not set(agent.compiles) & vars(agent).keys()
