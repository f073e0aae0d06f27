"""Recurrent policies: their formulas, sequences against single steps, KL, resume, and tasks that need a memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import benchmark, collect, make, rows

import klrl
from klrl.agents.limits import KLTarget
from klrl.agents.on_policy import OnPolicyConfig
from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.trpo import TRPO, TRPOConfig
from klrl.buffers.rollout import RolloutBuffer
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.envs.probes import Recall
from klrl.errors import UsageError
from klrl.kl import kl
from klrl.policies.memory import SEQUENCE, RecurrentNetwork, places
from klrl.policies.parameters import gradients
from klrl.training.evaluation import run_episodes

CELLS = ["gru", "lstm"]
SMALL: dict[str, Any] = {"n_steps": 16, "hidden_sizes": (8,), "memory_size": 6}


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def test_a_gru_and_an_lstm_of_one_number_by_hand() -> None:
    """PyTorch's equations for both, with biases of 0, from a state of 0.5 (and 0.25)."""
    space, discrete = spaces.Box(-1.0, 1.0, (1,)), spaces.Discrete(2)
    outputs = {}
    for cell, weights in (("gru", [0.3, -0.2, 0.7]), ("lstm", [0.3, -0.2, 0.7, 0.1])):
        agent = PPO(space, discrete, {**SMALL, "memory": cell, "memory_size": 1, "normalize_observation": False})
        network: Any = agent.policy.network
        for which in ("weight_ih_l0", "weight_hh_l0"):
            getattr(network.cell, which).data[:] = torch.tensor(weights)[:, None] * (2 if which[7] == "h" else 1)
        state = torch.tensor([[0.5]] if cell == "gru" else [[0.5, 0.25]])
        _, outputs[cell] = network.step({"vector": torch.tensor([[0.8]])}, state)
        moved = state.numpy().copy()
        network.step_numpy(np.array([[0.8]], np.float32), moved)
        assert moved == pytest.approx(outputs[cell].detach().numpy(), abs=1e-6)
    x, h = 0.8, 0.5
    reset, update = sigmoid(0.3 * x + 0.6 * h), sigmoid(-0.2 * x - 0.4 * h)
    expected = (1 - update) * np.tanh(0.7 * x + reset * 1.4 * h) + update * h
    assert outputs["gru"].item() == pytest.approx(expected, abs=1e-6)
    keep_in, forget, candidate, out = 0.3 * x + 0.6 * h, -0.2 * x - 0.4 * h, 0.7 * x + 1.4 * h, 0.1 * x + 0.2 * h
    cell_state = sigmoid(forget) * 0.25 + sigmoid(keep_in) * np.tanh(candidate)
    assert outputs["lstm"].tolist()[0] == pytest.approx([sigmoid(out) * np.tanh(cell_state), cell_state], abs=1e-6)


def test_rows_find_their_places_in_sequences_side_by_side() -> None:
    which, time, first = places(torch.tensor([7, 2, 7, 9, 2, 9, 9]))
    assert which.tolist() == [1, 0, 1, 2, 0, 2, 2]
    assert time.tolist() == [0, 0, 1, 0, 1, 1, 2]
    assert first.tolist() == [1, 0, 3]


def rolled(cell: str, kind: Any = PPO, env: Any = "CartPole-v1", **more: Any) -> tuple[Any, RolloutBuffer, Any]:
    """An agent after one update, its second rollout, and what it gave at acting: outputs [T, N, outputs]."""
    envs = make_vector(env, 4, EnvConfig())
    agent = kind(envs.single_observation_space, envs.single_action_space, {**SMALL, "memory": cell, **more})
    buffer, outputs = agent.new_buffer(4), []
    obs = collect(agent, envs, buffer, envs.reset(seed=0)[0])
    agent.update(buffer)
    plain = agent.policy.outputs
    agent.policy.outputs = lambda *given: outputs.append(plain(*given)) or outputs[-1]
    collect(agent, envs, buffer, obs)
    del agent.policy.outputs
    envs.close()
    return agent, buffer, np.stack(outputs)


@pytest.mark.parametrize("cell", CELLS)
def test_a_rollout_s_sequences_give_what_single_steps_gave(cell: str) -> None:
    agent, buffer, outputs = rolled(cell)
    assert 3 <= (~buffer.valid).sum() <= 12  # episodes that end within the rollout
    old = agent.make_batch(buffer).old
    acted = agent.policy.head(torch.from_numpy(outputs).flatten(0, 1))
    assert torch.allclose(old.log_probs, acted.log_probs, atol=1e-5)
    assert float((old.log_probs - acted.log_probs.roll(1, 0)).abs().max()) > 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_the_critic_goes_on_over_rollouts_as_one_that_takes_single_steps(cell: str) -> None:
    agent, buffer, _ = rolled(cell)
    begin = agent.memory.begin.copy()
    batch, network = agent.make_batch(buffer), agent.critic.network
    state, obs = torch.from_numpy(begin[:, 1]), agent.encoder(buffer.obs)["vector"].view(17, 4, -1)
    for t in range(16):
        if t > 0:
            state[torch.from_numpy(~buffer.valid[t - 1])] = 0.0
        values, state = network.step({"vector": obs[t]}, state)
        assert torch.allclose(values[:, 0], batch.value.view(16, 4)[t], atol=1e-5)
    assert torch.allclose(torch.from_numpy(agent.memory.critic), state, atol=1e-5)


def test_states_are_forgotten_where_a_rollout_begins_with_an_episode() -> None:
    agent, buffer, _ = rolled("lstm")
    agent.update(buffer)
    critic, buffer.begins = agent.memory.critic.copy(), np.array([True, False, False, True])
    agent.collect(buffer.obs[-1], buffer)
    assert critic.any(1).all()
    assert not agent.memory.begin[[0, 3]].any()
    assert np.array_equal(agent.memory.begin[1:3, 1], critic[1:3])


def test_minibatches_are_of_whole_environments_and_their_gradients_average_to_the_whole_one_s() -> None:
    agent, buffer, _ = rolled("lstm")
    batch = agent.make_batch(buffer)
    parts = batch.minibatches(32, agent.rng)
    assert [len(part.weight) for part in parts] == [32, 32]
    chosen = [set(part.inputs[SEQUENCE][:, 0].tolist()) for part in parts]
    assert chosen[0].isdisjoint(chosen[1])
    assert len(chosen[0] | chosen[1]) == 4

    def gradient(of: Any) -> torch.Tensor:
        return gradients(of.weight @ agent.policy(of.inputs).log_prob(of.action), agent.policy_params)

    whole = gradient(batch)
    assert torch.allclose(whole, (gradient(parts[0]) + gradient(parts[1])) / 2, atol=1e-6)
    assert float(whole.abs().max()) > 0.01
    assert len(batch.minibatches(1, agent.rng)) == 4  # no part is smaller than an environment's


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", [PPO, TRPO])
def test_the_kl_of_an_update_is_exact_over_sequences_and_within_its_limit(kind: Any, cell: str) -> None:
    options = {"kl": {"target": 0.01}, "normalize_observation": False}
    agent, buffer, acted = rolled(cell, kind, learning_rate=3e-3, **options)
    state, obs = torch.from_numpy(agent.memory.begin[:, 0].copy()), torch.from_numpy(buffer.obs)
    result = agent.update(buffer)
    news = []
    with torch.no_grad():
        for t in range(16):
            if t > 0:
                state[torch.from_numpy(~buffer.valid[t - 1])] = 0.0
            output, state = agent.policy.network.step({"vector": obs[t]}, state)
            news.append(agent.policy.head(output))
        found = [kl(agent.policy.head(torch.from_numpy(old)), new) for old, new in zip(acted, news, strict=True)]
    expected = torch.stack(found)[torch.from_numpy(buffer.valid)]
    assert 1e-4 < result.kl.mean <= 0.01
    assert result.kl.mean == pytest.approx(float(expected.mean()), rel=1e-3)
    assert result.kl.max == pytest.approx(float(expected.max()), rel=1e-2)


@pytest.mark.parametrize("cell", CELLS)
def test_the_fisher_product_is_the_hessian_of_kl_through_the_sequences(cell: str) -> None:
    from torch.func import functional_call

    from klrl.policies.parameters import FlatParameters

    agent, buffer, _ = rolled(cell, TRPO, hidden_sizes=(3,), memory_size=2, normalize_observation=False)
    batch = agent.make_batch(buffer)
    agent.policy_params = FlatParameters(agent.policy.double(), "policy")
    inputs = {k: part.double() if part.is_floating_point() else part for k, part in batch.inputs.items()}
    old, weight = agent.policy_at(inputs), batch.weight.double()
    batch = replace(batch, inputs=inputs, old=old, weight=weight)
    product = agent.fisher(agent._linearize(batch))
    columns = torch.eye(len(agent.policy_params.flat), dtype=torch.float64)
    fisher = torch.stack([product(column) for column in columns])
    names, weights = zip(*agent.policy.named_parameters(), strict=True)

    def mean_kl(vector: torch.Tensor) -> torch.Tensor:
        pieces = vector.split([w.numel() for w in weights])
        values = {n: p.view(w.shape) for n, p, w in zip(names, pieces, weights, strict=True)}
        return weight @ kl(old, functional_call(agent.policy, values, (inputs,)))

    hessian = torch.autograd.functional.hessian(mean_kl, agent.policy_params.flat.clone())
    assert float(hessian.abs().max()) > 1e-6
    assert torch.allclose(fisher, hessian, rtol=1e-5, atol=1e-9)


def test_predict_carries_the_state_as_sb3_s_does() -> None:
    agent, buffer, _ = rolled("lstm", normalize_observation=False)
    obs = buffer.obs
    state, starts, at_once = None, np.ones(4, bool), []
    for t in range(4):
        action, state = agent.predict(obs[t], state, starts, deterministic=True)
        at_once.append(action)
        assert state.shape == (4, 12)
        starts = np.zeros(4, bool)
    state = None
    for t in range(4):
        action, state = agent.predict(obs[t, 2], state, None, deterministic=True)
        assert (action, state.shape) == (at_once[t][2], (12,))
    again, fresh = agent.predict(obs[0], np.ones((4, 12)), np.array([True, True, True, False]), deterministic=True)
    anew, _ = agent.predict(obs[0], None, None, deterministic=True)
    assert (again[:3] == anew[:3]).all()
    assert not np.allclose(fresh[3], agent.predict(obs[0])[1][3])
    with pytest.raises(UsageError, match=r"state has shape \(4, 3\), expected \(4, 12\)"):
        agent.predict(obs[0], np.ones((4, 3)))
    memoryless = PPO(agent.observation_space, agent.action_space)
    assert memoryless.predict(obs[0], "mine")[1] == "mine"


@pytest.mark.parametrize(("name", "cell"), [("ppo", "gru"), ("trpo", "lstm")])
def test_a_run_resumes_bit_for_bit_inside_an_episode(tmp_path: Any, name: str, cell: str) -> None:
    options: dict[str, Any] = {"n_envs": 4, "n_steps": 50, "memory": cell, "memory_size": 8, "quiet": True}
    options |= {"eval_every": 3, "eval_episodes": 2, "final_episodes": 2, "save_every": 100}
    whole = klrl.train(name, "CartPole-v1", **options, total_timesteps=800, run_dir=str(tmp_path / "a"))
    part = klrl.train(name, "CartPole-v1", **options, total_timesteps=350, run_dir=str(tmp_path / "b"))
    again = klrl.resume(part.folder, total_timesteps=800)
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)
    assert np.array_equal(whole.agent.memory.now, again.agent.memory.now)
    assert whole.agent.memory.now.any()
    kept = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(again.folder)]
    assert kept == [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(whole.folder)]
    loaded = klrl.load(again.folder)
    assert loaded.predict([0.0] * 4, deterministic=True)[1].shape == ((8,) if cell == "gru" else (16,))
    del options["memory"], options["memory_size"]
    more = klrl.train(
        name, "CartPole-v1", **options, total_timesteps=250, init_from=str(whole.folder), run_dir=str(tmp_path / "c")
    )
    assert isinstance(more.agent.policy.network, RecurrentNetwork)


@pytest.mark.parametrize("config", [PPOConfig(n_epochs=4, batch_size=128), TRPOConfig(kl=KLTarget(target=0.02))])
def test_only_a_memory_recalls_what_was_shown_once(config: OnPolicyConfig) -> None:
    scores = {}
    for memory in ("lstm", "none"):
        envs = make_vector(Recall, 8, EnvConfig())
        settings = {"n_steps": 40, "hidden_sizes": (16,), "memory": memory, "memory_size": 16, "learning_rate": 5e-3}
        agent = make(replace(config, **settings), envs)
        buffer, obs = agent.new_buffer(8), envs.reset(seed=0)[0]
        for _ in range(25):
            obs = collect(agent, envs, buffer, obs)
            agent.update(buffer)
        scores[memory] = run_episodes(agent, envs, 1, episodes=40).mean
        envs.close()
    assert scores["lstm"] == 1.0
    assert scores["none"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_without_velocities_takes_a_memory(tmp_path: Path, seed: int) -> None:
    score = benchmark("memory").score
    assert score("lstm", seed, 300_000, str(tmp_path)) >= 450
    assert score("none", seed, 100_000, str(tmp_path)) < 150


def test_a_step_that_failed_is_not_remembered_twice(tmp_path: Path) -> None:
    agent, buffer, _ = rolled("lstm")
    agent.update(buffer)
    other = PPO(agent.observation_space, agent.action_space, agent.config)
    other.load_state_dict(agent.state_dict())
    obs, no = buffer.obs[0], np.zeros(4, bool)
    agent.collect(obs, buffer)  # an environment fails in its step, and the agent is saved
    again = PPO.load(agent.save(tmp_path / "agent"))
    for one in (agent, again, other):
        held = one.new_buffer(4)
        held.begins = buffer.begins
        for _ in range(2):
            action = one.collect(obs, held)
            held.add(obs, action, np.zeros(4), no, no, obs)
    assert np.array_equal(agent.memory.now, other.memory.now)
    assert np.array_equal(again.memory.now, other.memory.now)
    more = PPO.load(tmp_path / "agent")  # which goes on with another number of environments
    held, obs = more.new_buffer(2), buffer.obs[0, :2]
    more.collect(obs, held)
    assert more.memory.now.shape == (2, 12)


def test_what_does_not_go_with_a_memory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space, discrete = spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(2)
    options = {**SMALL, "memory": "gru"}
    with pytest.raises(UsageError, match="--memory gru does not go with --bottleneck"):
        PPO(space, discrete, {**options, "bottleneck": {"size": 2}})
    with pytest.raises(UsageError, match="--memory gru does not go with --fisher-fraction below 1"):
        TRPO(space, discrete, {**options, "fisher_fraction": 0.5})
    with pytest.raises(UsageError, match="--memory gru does not go with a --network"):
        PPO(space, discrete, options, network=torch.nn.Linear(3, 4))
    agent = PPO(space, discrete, options)
    with pytest.raises(UsageError, match=r"--memory gru does not go with --share-network \(--no-share-network"):
        PPO(space, discrete, {**options, "share_network": True})
    with pytest.raises(SystemExit):
        main(["train", "ppo", "CartPole-v1", "--memory-size", "32"])
    assert "--memory-size" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--memory goes without --env\.wrappers atari"):
        klrl.train("ppo", "CartPole-v1", memory="lstm", env={"wrappers": ["atari"]})
    with pytest.raises(UsageError, match="autoreset NEXT_STEP"):
        agent.collect(np.zeros((2, 3), np.float32), agent.new_buffer(2, "SameStep"))
    buffer, no = agent.new_buffer(2), np.zeros(2, bool)
    obs = np.zeros((2, 3), np.float32)
    for _ in range(16):
        buffer.add(obs, agent.act(obs), np.zeros(2), no, no, obs)
    with pytest.raises(UsageError, match=r"learns from steps that agent\.collect"):
        agent.update(buffer)
    path = agent.save(tmp_path / "agent")
    with pytest.raises(UsageError, match="a policy with a memory"):
        PPO(space, discrete, {"reference": {"run": str(path), "target": 1.0}}).prepare()
    with pytest.raises(UsageError, match="a policy with a memory"):
        klrl.Governed(agent, agent, 0.1)
