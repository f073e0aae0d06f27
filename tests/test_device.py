"""Rollouts that stay on a device are those of NumPy, resume bit for bit, and wait for nothing at a step.

They are tried on the CPU, which ``forced`` takes for another device.
"""

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from recording import by_torch, to_meta, waits

import klrl
from klrl import PPO, TRPO, PPOConfig, TRPOConfig
from klrl.agents.device import on_device, suits
from klrl.buffers import device as tensors
from klrl.buffers.device import DeviceRollout
from klrl.buffers.returns import gae
from klrl.envs.make import EnvConfig, make_vector
from klrl.envs.native import CartPole, Pendulum, TorchVectorEnv
from klrl.errors import Interrupted, NonFiniteError
from klrl.kl import ALONE
from klrl.kl.parameters import parameters_of
from klrl.rundir import checkpoint
from klrl.training.captured import waiting_raises
from klrl.training.device import DeviceEpisodes, rollouts_stay
from klrl.training.episodes import Episodes

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"n_envs": 8, "n_steps": 40, "quiet": True, "eval_every": 2, "eval_episodes": 2}
SMALL |= {"final_episodes": 0}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Let rollouts of the runs in a test stay on the CPU as on a device; whether each run's were fit for it."""
    taken = []

    def stay(agent: Any, envs: Any, ranks: Any) -> bool:
        taken.append(isinstance(envs.unwrapped, TorchVectorEnv) and suits(agent))
        return taken[-1]

    monkeypatch.setattr("klrl.training.loop.rollouts_stay", stay)
    monkeypatch.chdir(tmp_path)
    return taken


def make(kind: Any, env: TorchVectorEnv, **config: Any) -> Any:
    return kind(env.single_observation_space, env.single_action_space, kind.Config(n_steps=40, **config))


def collect(agent: Any, env: Any, obs: Any, *buffers: Any, steps: int = 40) -> Any:
    """Take steps on tensors, and give each buffer all of them; what the environments show then."""
    for _ in range(steps):
        action = agent.collect(obs, buffers[0])
        after, reward, terminated, truncated, _ = env.step(agent.env_action(action))
        facts = (obs, action, reward, terminated, truncated, after)
        for buffer in buffers:
            buffer.add(*(facts if isinstance(buffer, DeviceRollout) else (part.numpy() for part in facts)))
        obs = after
    return obs


PLAIN = {"normalize_reward": False, "normalize_advantage": False, "normalize_observation": False}
HELD = {"reference": {"run": "uniform", "target": 1.0}}


@pytest.mark.parametrize("kind", [PPO, TRPO])
@pytest.mark.parametrize(
    ("env_kind", "options"), [(CartPole, {}), (CartPole, PLAIN), (CartPole, HELD), (Pendulum, {}), (Pendulum, PLAIN)]
)
def test_a_batch_is_that_of_the_numpy_buffer_fed_with_the_same_steps(
    env_kind: Any, kind: Any, options: dict[str, Any]
) -> None:
    env = env_kind(16, max_episode_steps=30)
    mine, theirs = make(kind, env, **options), make(kind, env, **options)
    env.to(CPU)
    far, near = DeviceRollout(mine.new_buffer(16), CPU), theirs.new_buffer(16)
    obs, _ = env.reset(seed=0)
    with on_device(mine):
        for _ in range(3):
            obs = collect(mine, env, obs, far, near)
            assert not near.valid.all(), "some rows only reset"
            assert env_kind is Pendulum or near.terminated.any()
            one, other = mine.make_batch(far), theirs.make_batch(near)
            for name in ("action", "log_prob", "value", "advantage", "returns", "weight"):
                assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5), name
            if one.reference is not None:
                assert len(parameters_of(one.reference)[0]) == 640
                for ours, others in zip(*map(parameters_of, (one.reference, other.reference)), strict=True):
                    assert torch.allclose(ours, others)
            assert mine.reward_scale.var == pytest.approx(theirs.reward_scale.var, rel=1e-9)
            for agent, buffer in ((mine, far), (theirs, near)):
                agent.end_update(buffer)
            assert torch.equal(mine.encoder.mean, theirs.encoder.mean)


def test_gae_of_tensors_is_gae() -> None:
    rng = np.random.default_rng(0)
    reward, value, following = rng.normal(size=(3, 30, 5)).astype(np.float32)
    terminated, truncated = rng.random((2, 30, 5)) < 0.1
    facts = (reward, value, following, terminated, terminated | truncated)
    expected = gae(*facts, 0.99, 0.95)
    found = tensors.gae(*map(torch.from_numpy, facts), 0.99, 0.95)  # type: ignore[arg-type]
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine.numpy() - theirs).max() < 1e-6


@pytest.mark.parametrize("chance", [0.0, 0.02, 0.6])
def test_episodes_of_tensors_are_episodes(chance: float) -> None:
    rng, near = np.random.default_rng(0), Episodes(7)
    far = DeviceEpisodes(copy.deepcopy(near), CPU)
    ended = np.zeros(7, bool)
    for step in range(200):
        reward = np.where(ended, 0.0, rng.normal(size=7))
        ended = (rng.random(7) < chance) & ~ended
        near.add(np.zeros(7), reward, ended)
        far.add(None, torch.from_numpy(reward), torch.from_numpy(ended))
        if step % 41 == 0:
            assert far.steps == near.steps
            far = DeviceEpisodes(copy.deepcopy(near), CPU)
    assert far.figures(ALONE) == near.figures(ALONE)
    same = ("steps", "done", "returns", "lengths", "resetting")
    mine, theirs = far.state_dict(), near.state_dict()
    assert [mine[key] for key in same] == [theirs[key] for key in same]
    far.forget_unfinished()
    assert far.state_dict()["lengths"] == [0] * 7


@pytest.mark.parametrize(("agent", "env_id"), [("ppo", "klrl/CartPole-v1"), ("trpo", "klrl/Pendulum-v1")])
def test_a_resumed_run_is_the_same_run(agent: str, env_id: str, forced: list[bool]) -> None:
    same_run(agent, env_id, "cpu")
    assert forced == [True] * 3


def same_run(agent: str, env_id: str, device: str) -> None:
    options = {**SMALL, "device": device}
    whole: Any = klrl.train(agent, env_id, total_timesteps=1800, run_dir="whole", **options)
    half = klrl.train(agent, env_id, total_timesteps=900, run_dir="half", **options)
    again: Any = klrl.resume(half.folder, total_timesteps=1800)
    assert again.steps == whole.steps
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)
    assert torch.equal(whole.agent.critic_params.flat, again.agent.critic_params.flat)


def test_a_run_interrupted_within_a_rollout_goes_on_to_the_same_end(forced: list[bool]) -> None:
    class Interrupts(klrl.Callback):
        def on_update(self, run: Any, result: Any) -> None:
            if run.updates == 3:
                os.kill(os.getpid(), signal.SIGINT)

    options = {**SMALL, "total_timesteps": 1800}
    whole: Any = klrl.train("ppo", "klrl/CartPole-v1", run_dir="whole", **options)
    with pytest.raises(Interrupted):
        klrl.train("ppo", "klrl/CartPole-v1", run_dir="half", callbacks=[Interrupts()], **options)
    (folder,) = Path("half").iterdir()
    saved = checkpoint.newest(folder)[1]["state"]["loop"]["buffer"]
    assert saved["filled"] == 39, "all but the rollout's last step"
    again: Any = klrl.resume(folder)
    assert again.steps == whole.steps
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)


def test_a_run_goes_on_where_rollouts_are_numpys_and_back(forced: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    run = klrl.train("ppo", "klrl/CartPole-v1", total_timesteps=700, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("klrl.training.loop.rollouts_stay", rollouts_stay)
        klrl.resume(run.folder, total_timesteps=1400)
    assert klrl.resume(run.folder, total_timesteps=2100).steps >= 2100
    assert forced == [True, True]


def test_generators_of_another_kind_of_device_are_seeded() -> None:
    env = CartPole(3)
    state = {**env.state_dict(), "generator": torch.arange(16, dtype=torch.uint8)}
    first = [env.load_state_dict(state), env.first_states()]
    env.first_states()
    again = [env.load_state_dict(state), env.first_states()]
    assert np.array_equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize(("agent", "env_id"), [("ppo", "klrl/CartPole-v1"), ("trpo", "klrl/Pendulum-v1")])
def test_what_waits_for_the_device_does_not_grow_with_the_steps(
    agent: str, env_id: str, forced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for n_steps in (16, 64):
        options = {**SMALL, "n_steps": n_steps, "total_timesteps": 4 * n_steps, "batch_size": 2 * n_steps}
        options |= {"kl": {"stop": 0.0}} if agent == "ppo" else {}
        with monkeypatch.context() as patch, waits(monkeypatch) as found:
            by_torch(patch)
            klrl.train(agent, env_id, **{**options, "eval_every": 0})
        counts.append(dict(found))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [CartPole, Pendulum])
def test_steps_run_on_a_device_without_numbers(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at one, or mixes devices."""
    env, meta = kind(6), torch.device("meta")
    agent = make(PPO, env)
    by_torch(monkeypatch)
    to_meta(agent, monkeypatch)
    for part in ("mean", "_inverse_std"):
        setattr(agent.encoder, part, getattr(agent.encoder, part).to(meta))
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    env.to(meta)
    env._generator, episodes = None, DeviceEpisodes(Episodes(6), meta)
    buffer = DeviceRollout(agent.new_buffer(6), meta)
    obs = env.observe(env.state)
    with on_device(agent):
        for _ in range(41):
            action = agent.collect(obs, buffer)
            taken = agent.env_action(action)
            after, reward, terminated, truncated, _ = env.step(taken)
            buffer.add(obs, action, reward, terminated, truncated, after)
            episodes.add(taken, reward, terminated | truncated)
            obs = after
    value = torch.zeros(41, 6, device=meta)
    agent.reward_scale.enabled = False  # which reads the moments
    with on_device(agent):
        assert [part.device.type for part in agent.estimates(buffer, value)] == ["meta"] * 3
    assert {part.device.type for part in (obs, buffer.obs, buffer.action, buffer.valid, *episodes._now)} == {"meta"}


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("kind", [CartPole, Pendulum])
def test_a_step_on_a_gpu_waits_for_nothing(kind: Any) -> None:
    env = kind(64, max_episode_steps=10)
    agent = PPO(env.single_observation_space, env.single_action_space, PPOConfig(n_steps=40), "cuda")
    env.to(agent.device)
    buffer = DeviceRollout(agent.new_buffer(64), agent.device)
    obs, _ = env.reset(seed=0)
    with on_device(agent):
        obs = collect(agent, env, obs, buffer, steps=20)
        with waiting_raises():
            collect(agent, env, obs, buffer, steps=20)
        assert agent.update(buffer).kl.mean >= 0


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize(("agent", "env_id"), [("ppo", "klrl/CartPole-v1"), ("trpo", "klrl/Pendulum-v1")])
def test_a_resumed_run_on_a_gpu_is_the_same_run(
    agent: str, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    same_run(agent, env_id, "cuda")


def test_a_nan_is_named() -> None:
    env = CartPole(3)
    buffer = DeviceRollout(make(PPO, env).new_buffer(3), CPU)
    no, obs = torch.zeros(3, dtype=torch.bool), torch.zeros(3, 4)
    for reward in (0.0, float("nan")):
        buffer.add(obs, torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0.0, reward, 0.0]), no, no, obs)
    with pytest.raises(NonFiniteError, match="reward is nan in env 1 at step 1"):
        buffer.check_finite()


class Own(PPO):
    def act(self, *args: Any, **kwargs: Any) -> Any:
        return super().act(*args, **kwargs)


BOX, PAIR = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)


@pytest.mark.parametrize(
    ("agent", "fits"),
    [
        (lambda: PPO(BOX, PAIR), True),
        (lambda: PPO(BOX, spaces.MultiDiscrete([2, 3])), True),
        (lambda: TRPO(BOX, BOX, TRPOConfig(head="state-dependent-std")), True),
        (lambda: PPO(BOX, BOX, PPOConfig(head="beta")), False),
        (lambda: PPO(BOX, PAIR, PPOConfig(memory="gru")), False),
        (lambda: PPO(spaces.Dict({"a": BOX, "b": BOX}), PAIR), False),
        (lambda: Own(BOX, PAIR), False),
        (lambda: klrl.SAC(BOX, BOX), False),
    ],
)
def test_which_agents_rollouts_stay(agent: Callable[[], Any], fits: bool) -> None:
    made, envs = agent(), make_vector("klrl/CartPole-v1", 2, EnvConfig())
    assert suits(made) is fits
    assert not rollouts_stay(made, envs, ALONE), "on the CPU NumPy's are faster"
    made.device = torch.device("meta")
    assert rollouts_stay(made, envs, ALONE) is fits
    assert not rollouts_stay(made, make_vector("CartPole-v1", 2, EnvConfig()), ALONE)


def test_agents_act_as_before_and_are_copied_while_they_collect_on_a_device() -> None:
    env = Pendulum(4)
    agent = make(PPO, env)
    obs, _ = env.reset(seed=0)
    with on_device(agent):
        action = agent.act(obs)
        assert np.array_equal(agent.env_action(3 * action), np.clip(3 * action, -2, 2))
        assert np.array_equal(agent.env_action(torch.from_numpy(3 * action)).numpy(), np.clip(3 * action, -2, 2))
        twin = copy.deepcopy(agent)
        buffer, shown = agent.new_buffer(4), torch.from_numpy(obs)
        drawn = [each.collect(shown, buffer) for each in (agent, agent, twin, twin)]
        assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:])), "each by its own generator"
        assert not torch.equal(*drawn[:2])
    assert "env_action" not in vars(agent)
    assert isinstance(agent.collect(obs, agent.new_buffer(4)), np.ndarray)


def test_it_learns(forced: list[bool]) -> None:
    run = klrl.train("ppo", "klrl/CartPole-v1", n_envs=64, n_steps=32, total_timesteps=60_000, eval_every=0, quiet=True)
    assert forced == [True]
    assert run.score.mean > 150
