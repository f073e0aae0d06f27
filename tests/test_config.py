"""What options take, from Python, a file or the command line, and what is refused before anything is made of it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK

import klrl
from klrl.agents import registry
from klrl.errors import UsageError
from klrl.spelling import suggest
from klrl.training.options import RunConfig
from klrl.training.process import pick_device
from klrl.training.run import resolve


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: klrl.PPOConfig(gamma=7), "--gamma must be at least 0 and at most 1, got 7"),
        (lambda: klrl.SACConfig(tau=-1), "--tau must be at least 0 and at most 1, got -1"),
        (lambda: klrl.KLConfig(stop=-1), "--kl.stop must be at least 0, got -1"),
        (lambda: klrl.TRPOConfig(kl={"targt": 1}), r"unknown option 'kl.targt' \(did you mean 'kl.target'\?\)"),
        (lambda: klrl.PPOConfig(n_epochs="ten"), "--n-epochs must be a whole number, got 'ten'"),
        (lambda: RunConfig(device="tpu"), "--device must be auto, cpu, cuda or cuda:N, got tpu"),
        (lambda: klrl.PPOConfig(hidden_sizes="64"), "--hidden-sizes must be a whole number, got '64'"),
    ],
)
def test_a_config_is_refused_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("ppo", {"learning_rate": 1e300}, r"--learning-rate must be above 0 and at most 1e\+38"),
        ("ppo", {"total_timesteps": 10**30}, r"--total-timesteps must be at least 1 and at most 1e\+15"),
        ("ppo", {"n_envs": 10**9}, "--n-envs must be at least 1 and at most 65536"),
        ("ppo", {"eval_episodes": 10**9}, "--eval-episodes must be at least 1 and at most 65536"),
        ("ppo", {"hidden_sizes": [10**9]}, "--hidden-sizes must be at least 1 and at most 16384"),
        ("ppo", {"n_steps": 10**15}, "--n-steps 1,000,000,000,000,000 of 8 environments do not fit into memory"),
        ("ppo", {"threads": 10**9}, "--threads must be at least 1 and at most 1024"),
        ("ppo", {"env": {"timeout": 1e30}}, "--env.timeout must be above 0 and at most 1000000"),
        ("ppo", {"kl": {"target": -1e300}}, "--kl.target must be at least 0"),
        ("sac", {"batch_size": 10**9}, "--batch-size must be at least 1 and at most 1000000"),
        ("sac", {"buffer_size": 10**15}, "--buffer-size 1,000,000,000,000,000 does not fit into memory"),
    ],
    ids=str,
)
def test_absurd_numbers_are_refused_before_anything_is_made_of_them(
    agent: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        klrl.train(agent, "CartPole-v1", **options)
    assert not Path("runs").exists()


def test_values_of_numpy_and_torch_and_paths_are_recorded_as_plain_ones() -> None:
    options = QUICK | {
        "total_timesteps": np.int64(400),
        "seed": np.uint32(7),
        "gamma": np.float32(0.5),
        "learning_rate": torch.tensor(1e-3, dtype=torch.float64),
        "normalize_reward": np.bool_(False),
        "hidden_sizes": np.int64(16),
        "run_dir": Path("here"),
        "device": torch.device("cpu"),
        "kl": {"target": np.float64(0.03)},
    }
    run = klrl.train("ppo", "CartPole-v1", **options)
    written = tomllib.loads((run.folder / "config.toml").read_text())
    assert json.loads(json.dumps(written)) == written
    wanted = {"total_timesteps": 400, "seed": 7, "gamma": 0.5, "learning_rate": 1e-3, "normalize_reward": False}
    wanted |= {"hidden_sizes": [16], "run_dir": "here", "device": "cpu"}
    assert {key: written[key] for key in wanted} == wanted
    assert written["kl"]["target"] == 0.03
    config: Any = run.agent.config
    assert [type(value) for value in (run.config.seed, config.gamma, config.kl.target)] == [int, float, float]
    assert config.hidden_sizes == (16,)
    assert klrl.load(run.folder).config == config


def test_arguments_of_the_environment_are_recorded_as_plain_values() -> None:
    config, _ = resolve(klrl.PPO, None, {"env": {"kwargs": {"gravity": np.float64(-8), "map": [Path("a.txt")]}}})
    assert json.dumps(config.env.kwargs) == '{"gravity": -8.0, "map": ["a.txt"]}'


def test_no_seed_draws_one_that_is_recorded() -> None:
    drawn = {RunConfig(seed=None).seed for _ in range(4)}  # type: ignore[arg-type]
    assert len(drawn) == 4
    assert all(0 <= seed < 2**32 for seed in drawn)
    box, two = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)
    klrl.PPO(box, two, seed=None)
    klrl.PPO(box, two, seed=np.int64(3))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--seed must be at least 0"):
        klrl.PPO(box, two, seed=-1)


def test_a_numbered_gpu_is_taken_and_one_that_is_not_there_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunConfig(device=torch.device("cuda", 1)).device == "cuda:1"  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1", None) == "cuda:1"
    with pytest.raises(UsageError, match="--device cuda:2: the last CUDA device here is cuda:1"):
        pick_device("cuda:2", None)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("agent", [name for name in registry.BUILT_IN if name != "student"])  # which needs a teacher
def test_a_preset_trains_with_any_number_of_environments(agent: str, n_envs: int) -> None:
    more: dict[str, Any] = {"learning_starts": 64, "kl": {"every": 50}} if agent == "sac" else {}
    run = klrl.train(agent, "CartPole-v1", n_envs=n_envs, total_timesteps=150, eval_every=0, quiet=True, **more)
    assert run.config.n_envs == n_envs


def test_an_option_is_known_by_the_name_it_has_elsewhere() -> None:
    for given, here in (
        ("lr", "learning_rate"),
        ("num_envs", "n_envs"),
        ("target_kl", "kl.target"),
        ("clip_coef", "clip_range"),
        ("update_epochs", "n_epochs"),
        ("timesteps", "total_timesteps"),
        ("stop", "kl.stop"),
        ("Gamma", "gamma"),
        ("env_kwargs", "env.kwargs"),
        ("learning_rat", "learning_rate"),
    ):
        with pytest.raises(UsageError, match=f"unknown option '{given}' .did you mean '{here}'"):
            klrl.train("ppo", "CartPole-v1", **{given: 1})
    with pytest.raises(UsageError, match=r"unknown option 'target_entropy_share' .*'target_entropy_fraction'"):
        klrl.SAC(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), {"target_entropy_share": 0.3})
    assert suggest("--ent-rate", ["--ent-coef", "--ent-coef-lr"]) == " (did you mean '--ent-coef-lr'?)"
    assert suggest("--lr=3e-4", ["--learning-rate", "--gamma"]) == " (did you mean '--learning-rate'?)"
    assert suggest("lr", ["batch_size"]) == "", "nothing that is not there"


def test_an_agent_is_found_in_any_case_and_a_misspelled_or_swapped_one_named() -> None:
    assert registry.find("PPO") is registry.find("Ppo") is klrl.PPO
    for agent, env, message in (
        ("pppo", "CartPole-v1", r"unknown agent 'pppo' \(did you mean 'ppo'\?\)"),
        ("CartPole-v1", "ppo", "the agent comes first, then the env: ppo CartPole-v1, not CartPole-v1 ppo"),
    ):
        with pytest.raises(UsageError, match=message):
            klrl.train(agent, env)


def test_a_default_that_would_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine\.gamma has no type, and would change no default: annotate it"):

        class Mine(klrl.PPOConfig):
            gamma = 0.5
