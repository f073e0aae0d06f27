"""A GPU: when one is taken, and that it does what the CPU does.

What asks for a device runs on a CPU, too, where a stand-in records its steps: what is tried there is the test.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect
from recording import Stand, by_torch

import klrl
from klrl import PPO, SAC, TRPO, PPOConfig, SACConfig, TRPOConfig
from klrl.agents.limits import KLConfig, OffPolicyKLConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import UsageError
from klrl.kl.state import without_looking
from klrl.training.captured import captured, record_graph, waiting_raises
from klrl.training.process import gpu_pays, pick_device

_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_MARKS)])


@contextmanager
def learning(agent: Any) -> Iterator[None]:
    """Let the agent learn as on a GPU."""
    if agent.device.type == "cuda":
        with captured(agent):
            yield
        return
    with pytest.MonkeyPatch.context() as patch, captured(agent, Stand()):
        by_torch(patch)
        yield


def apart(one: Any, other: Any) -> float:
    """The largest difference between two agents' weights."""
    groups = (
        (getattr(agent, name).flat.cpu() for agent in (one, other)) for name in ("policy_params", "critic_params")
    )
    return max(float((a - b).abs().max()) for a, b in groups)


ON_POLICY: dict[str, Any] = {
    "ppo": (PPO, PPOConfig(n_steps=64, batch_size=60, n_epochs=4, kl=KLConfig(penalty="adaptive"))),
    "trpo": (TRPO, TRPOConfig(n_steps=64, n_critic_updates=4)),
    "ppo with a memory": (PPO, PPOConfig(n_steps=64, n_epochs=2, memory="lstm", memory_size=16)),
    "trpo with a memory": (TRPO, TRPOConfig(n_steps=64, n_critic_updates=2, memory="gru", memory_size=16)),
}


@DEVICES
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("which", ON_POLICY)
def test_an_update_is_the_cpus(which: str, env_id: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, config = ON_POLICY[which]
    env = make_vector(env_id, 4, EnvConfig())
    near, far = (
        kind(env.single_observation_space, env.single_action_space, config, device=where) for where in ("cpu", device)
    )
    buffer = near.new_buffer(4)
    obs = collect(near, env, buffer, env.reset(seed=0)[0])
    far.load_state_dict(near.state_dict())
    mine = near.update(buffer)
    with learning(far):
        theirs = far.update(buffer)
    assert capsys.readouterr().err == "", "no step went on without a graph"
    assert apart(near, far) < 1e-4
    assert theirs.kl.mean == pytest.approx(mine.kl.mean, rel=1e-2)
    assert theirs.kl.mean <= theirs.kl.limit
    assert far.act(obs).shape == near.act(obs).shape


def filled(agent: SAC) -> Any:
    buffer, no, rng = agent.new_buffer(1), np.zeros(1, bool), np.random.default_rng(0)
    obs = rng.normal(size=(81, 1, 3)).astype(np.float32)
    for step in range(80):
        buffer.add(obs[step], agent.act(obs[step]), rng.normal(size=1), no, no, obs[step + 1])
    return buffer


@DEVICES
@pytest.mark.parametrize("action", [spaces.Box(-1, 1, (2,)), spaces.Discrete(3)])
def test_sacs_gradient_steps_are_the_cpus(action: spaces.Space[Any], device: str) -> None:
    rules = OffPolicyKLConfig(every=20, target=1.0)
    config = SACConfig(learning_starts=1, gradient_steps=20, batch_size=32, hidden_sizes=(32, 32), kl=rules)
    near, far = (SAC(spaces.Box(-9, 9, (3,)), action, config, device=where) for where in ("cpu", device))
    for agent in (near, far):
        with learning(agent) if agent is far else nullcontext():
            result = agent.update(filled(agent))
    assert result is not None
    assert apart(near, far) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_steps_of_a_graph_are_those_without(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[Any] = []
    for graphs in (False, True):
        learner: Any
        if agent == "ppo":
            env = make_vector("CartPole-v1", 4, EnvConfig())
            config: Any = PPOConfig(n_steps=64, batch_size=60, n_epochs=4, kl=KLConfig(penalty="adaptive"))
            learner = PPO(env.single_observation_space, env.single_action_space, config, device="cuda")
            buffer = learner.new_buffer(4)
            collect(learner, env, buffer, env.reset(seed=0)[0])  # 20 steps, of two sizes
        else:
            config = SACConfig(learning_starts=1, gradient_steps=20, batch_size=32)
            learner = SAC(spaces.Box(-9, 9, (3,)), spaces.Box(-1, 1, (2,)), config, device="cuda")
            buffer = filled(learner)
        with captured(learner) if graphs else nullcontext():
            learner.update(buffer)
        ended.append(learner)
    assert apart(*ended) < 1e-6
    assert capsys.readouterr().err == "", "nothing went on without a graph"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("penalty", ["none", "adaptive"])
def test_a_step_on_a_gpu_waits_for_nothing(penalty: str) -> None:
    env = make_vector("CartPole-v1", 4, EnvConfig())
    config = PPOConfig(n_steps=64, kl=KLConfig(penalty=penalty))
    agent = PPO(env.single_observation_space, env.single_action_space, config, device="cuda")
    buffer = agent.new_buffer(4)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    batch, rate = agent.make_batch(buffer), torch.tensor(1e-3, device="cuda")
    with torch.no_grad(), without_looking():
        agent._step(batch, rate)
        with waiting_raises():
            agent._step(batch, rate)


@DEVICES
def test_a_resumed_run_is_the_same_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        by_torch(monkeypatch)
    options = {**QUICK, "device": device, "lr_schedule": "constant", "eval_every": 0, "final_episodes": 0}
    whole = klrl.train("ppo", "CartPole-v1", **{**options, "total_timesteps": 1200, "run_dir": "whole"})
    half = klrl.train("ppo", "CartPole-v1", **{**options, "total_timesteps": 600, "run_dir": "half"})
    again = klrl.resume(half.folder, total_timesteps=1200)
    assert again.agent.device.type == device
    assert apart(whole.agent, again.agent) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_and_its_checkpoint_loads_on_the_cpu() -> None:
    run = klrl.train("ppo", "CartPole-v1", **{**QUICK, "device": "cuda"})
    assert run.agent.policy_params.flat.is_cuda  # type: ignore[attr-defined]
    loaded = klrl.load(run.folder)
    assert torch.equal(loaded.policy_params.flat, run.agent.policy_params.flat.cpu())  # type: ignore[attr-defined]


@pytest.mark.parametrize("fails", ["", "run", "run, no garbage collected"])
def test_a_graph_is_recorded_after_runs_that_warm_up_and_one_that_may_not_wait(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Part:
        def __init__(self, *args: Any) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            done.append("wait for a stream")

        def replay(self) -> None:
            done.append("replay")

    @contextmanager
    def within(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        done.append(name)
        yield
        done.append(f"{name} ends")

    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, partial(within, name))
    for name in ("current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Part)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: done.append(f"waiting: {mode}"))

    def run() -> str:
        done.append("run" if gc.isenabled() else "run, no garbage collected")
        if fails == done[-1]:
            raise RuntimeError("refused")
        return "outputs"

    assert gc.isenabled()
    if fails:
        with pytest.raises(RuntimeError, match="refused"):
            record_graph(torch.device("cuda"), run)
    else:
        replay, outputs = record_graph(torch.device("cuda"), run)
        replay()
        assert (outputs, done[-3:]) == ("outputs", ["stream ends", "device ends", "replay"])
    assert gc.isenabled()
    warm = ["wait for a stream", "device", "stream", "stream", "run", "run", "waiting: error", "run", "waiting: 0"]
    if fails == "run":
        assert done == [*warm[:5], "wait for a stream"], "which is where weights are put back"
    else:
        assert done[:13] == [*warm, "stream ends", "wait for a stream", "graph", "run, no garbage collected"]


@pytest.mark.slow
def test_the_benchmark_prints_its_table() -> None:
    script = Path(__file__).parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows[1:]} == {3}
    assert [row[2] for row in rows if row[0].startswith("largest difference")] == ["0.0e+00"] * 3


def test_auto_takes_the_gpu_only_where_it_pays_and_each_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto", lambda: True) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert pick_device("auto", lambda: True) == "cuda"
    assert pick_device("auto", lambda: False) == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("auto", lambda: True) == "cpu"


FOUR, MANY = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (348,))
IMAGES = spaces.Dict({"a": spaces.Box(0, 255, (84, 84, 3), np.uint8), "b": spaces.Discrete(3)})


@pytest.mark.parametrize(
    ("space", "config", "n_envs", "pays"),
    [
        (FOUR, PPOConfig(), 8, False),
        (FOUR, PPOConfig(), 4096, True),  # of which each step acts for all
        (FOUR, PPOConfig(batch_size=8192, n_steps=16), 512, True),
        (FOUR, PPOConfig(batch_size=8192, n_steps=16), 8, False),  # 128 rows in all
        (MANY, PPOConfig(hidden_sizes=(256, 256)), 8, True),
        (FOUR, SACConfig(), 1, True),
        (FOUR, SACConfig(hidden_sizes=(64, 64)), 1, False),
        (IMAGES, PPOConfig(), 8, True),
        (spaces.Discrete(500), TRPOConfig(), 8, False),
        (FOUR, SimpleNamespace(hidden_sizes=64), 8, False),  # of an agent of one's own
        (MANY, SimpleNamespace(hidden_sizes=(256, 256), n_steps=4096), 64, True),
    ],
)
def test_a_gpu_pays_for_images_big_networks_and_many_rows(space: Any, config: Any, n_envs: int, pays: bool) -> None:
    assert gpu_pays(space, config, n_envs) is pays


def test_observations_that_no_agent_takes_are_named_before_a_device_is_picked() -> None:
    with pytest.raises(UsageError, match="Sequence"):
        gpu_pays(spaces.Sequence(FOUR), PPOConfig(), 8)
