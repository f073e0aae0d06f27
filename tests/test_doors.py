"""What users bring: an agent of their own in public names, a network, a package that registers one."""

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, collect, rows

import klrl
from klrl.cli.main import main
from klrl.errors import UsageError

OBS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@dataclass(frozen=True)
class A2CConfig(klrl.OnPolicyConfig):
    n_steps: int = 16
    """Steps of each environment between two updates."""
    learning_rate: float = 3e-3
    """Adam's step size."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""


class A2C(klrl.OnPolicyAgent):
    """Advantage actor-critic (Mnih et al. 2016): one step on the whole rollout."""

    Config = A2CConfig

    def update(self, rollout: klrl.RolloutBuffer, progress: float = 0.0) -> klrl.UpdateResult:
        batch = self.make_batch(rollout)
        with self.hold(batch) as move:
            new = self.policy(batch.inputs)
            loss_pi = -(batch.weight @ (new.log_prob(batch.action) * batch.advantage))
            loss_v = batch.weight @ (self.critic(batch.inputs) - batch.returns).square()
            loss = loss_pi + 0.5 * loss_v - self.config.ent_coef * (batch.weight @ new.entropy())
            norm = self.take_step(self.gradient_of(loss), torch.tensor(self.config.learning_rate), 0.5)
        self.end_update(rollout)
        metrics = {"train/value_loss": loss_v.item(), "health/grad_norm": norm.item()}
        return klrl.UpdateResult(move.report, metrics | self.diagnostics(batch))


class Net(torch.nn.Module):
    """Features of an observation space of one vector."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(space.shape[0], 32), torch.nn.Linear(32, 16)
        self.register_buffer("phases", torch.rand(32))  # what is random and not learned has to be saved, too
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.dropout(torch.cos(self.first(x) + self.phases))))


def test_an_agent_of_ones_own_trains_evaluates_and_reports_its_kl() -> None:
    run = klrl.train(A2C, "CartPole-v1", total_timesteps=40_000, n_envs=8, quiet=True, kl={"target": 0.05})
    assert run.score.mean > 150
    assert run.folder.name.startswith("a2c-CartPole-v1-0")
    logged = rows(run.folder)
    assert all(row["kl/mean"] > 0 and row["kl/limit"] == 0.05 for row in logged)
    main(["eval", str(run.folder), "--episodes", "2"])
    loaded = klrl.load(run.folder)
    assert isinstance(loaded, A2C)
    assert torch.equal(loaded.policy_params.flat, run.agent.policy_params.flat)  # type: ignore[attr-defined]


def test_an_agent_of_ones_own_resumes_bit_for_bit() -> None:
    options: dict[str, Any] = {"n_envs": 4, "quiet": True, "save_every": 64, "eval_every": 0}
    whole = klrl.train(A2C, "CartPole-v1", total_timesteps=1024, run_dir="whole", **options)
    part = klrl.train(A2C, "CartPole-v1", total_timesteps=500, run_dir="part", **options)
    again = klrl.resume(part.folder, total_timesteps=1024, agent=A2C)
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)  # type: ignore[attr-defined]
    assert rows(again.folder)[-1]["kl/mean"] == rows(whole.folder)[-1]["kl/mean"]


PACKAGE = """
import torch, klrl
from dataclasses import dataclass

@dataclass(frozen=True)
class MineConfig(klrl.PPOConfig):
    bonus: float = 0.5
    \"\"\"An option of its own.\"\"\"

class Mine(klrl.PPO):
    Config = MineConfig

class Net(torch.nn.Module):
    def __init__(self, space):
        super().__init__()
        self.layer = torch.nn.Linear(space.shape[0], 8)
    def forward(self, x):
        return torch.tanh(self.layer(x))
"""


def klrl_command(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, '.'); from klrl.cli.main import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


SHORT = ("CartPole-v1", "--total-timesteps", "512", "--n-envs", "4", "--n-steps", "64", "--eval-every", "0", "--quiet")


@pytest.mark.slow
def test_an_imported_package_brings_agents_and_networks_to_the_command() -> None:
    Path("my_package.py").write_text(PACKAGE)
    unknown = klrl_command("train", "mine", *SHORT)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("klrl: unknown agent 'mine'")
    words = ("--import", "my_package", "--bonus", "0.25", "--network", "my_package:Net")
    trained = klrl_command("train", "mine", *SHORT, *words)
    assert trained.returncode == 0, trained.stderr
    (folder,) = Path("runs").glob("mine-CartPole-v1-0-*")
    config = (folder / "config.toml").read_text()
    assert "bonus = 0.25" in config
    assert 'network = "my_package:Net"' in config
    for command in ("eval", "resume"):
        more = ("--episodes", "1") if command == "eval" else ("--total-timesteps", "1100")
        done = klrl_command(command, str(folder), "--import", "my_package", *more)
        assert done.returncode == 0, done.stderr
    with pytest.raises(UsageError, match="unknown agent 'mine'"):
        klrl.load(folder)
    refused = klrl_command("train", "ppo", *SHORT, "--network", "my_package:Nothing")
    assert refused.returncode == 2
    assert "network 'my_package:Nothing' is no imported nn.Module class" in refused.stderr
    assert "bonus" in klrl_command("train", "mine", "--import", "my_package", "--help").stdout


def test_an_installed_package_registers_its_agent_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("site").mkdir()
    Path("site/my_package.py").write_text(PACKAGE)
    info = Path("site/my_package-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[klrl.agents]\nmine = my_package:Mine\n")
    monkeypatch.setenv("PYTHONPATH", "site")
    trained = klrl_command("train", "mine", *SHORT)
    assert trained.returncode == 0, trained.stderr
    (folder,) = Path("runs").glob("mine-*")
    assert klrl_command("eval", str(folder), "--episodes", "1").returncode == 0


@pytest.mark.parametrize("agent", ["ppo", "trpo", "sac"])
@pytest.mark.parametrize("own", [Net, Net(spaces.Box(-1, 1, (4,)))], ids=["class", "module"])
def test_any_module_does_as_the_network_and_comes_back(agent: str, own: Any) -> None:
    sizes = {"learning_starts": 64, "hidden_sizes": (16,), "kl": {"every": 100}} if agent == "sac" else {"n_steps": 64}
    run = klrl.train(agent, "CartPole-v1", network=own, seed=3, total_timesteps=600, n_envs=4, quiet=True, **sizes)
    features: Any = run.agent.policy.network.features  # type: ignore[union-attr]
    assert isinstance(features, Net)
    before = (own(run.agent.observation_space) if isinstance(own, type) else own).first.weight
    assert not torch.equal(features.first.weight, before), "it learns"
    obs = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    loaded = klrl.load(run.folder, network=own)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], run.agent.predict(obs, deterministic=True)[0])
    run.agent.save("saved")
    assert np.array_equal(type(loaded).load("saved").value(obs), loaded.value(obs)), "its class is known here"
    mine, theirs = (klrl.kl.kl(run.agent.distribution(obs), one.distribution(obs)) for one in (run.agent, loaded))
    assert mine.tolist() == theirs.tolist() == [0.0] * 9, "no dropout, and the same phases"


def test_the_kl_of_sac_is_that_of_its_own_network_with_what_is_random_in_it() -> None:
    box, two = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)
    agents = [klrl.SAC(box, two, klrl.SACConfig(hidden_sizes=(8,)), seed=seed, network=Net) for seed in (1, 2)]
    agents[1].load_state_dict(agents[0].state_dict())
    for agent in agents:
        agent._open(agent.encoder(OBS))
        old, new = (module(agent.encoder(OBS)) for module in (agent.old_policy, agent.policy))
        assert klrl.kl.kl(old, new).tolist() == [0.0] * 5


def test_a_network_that_cannot_be_used_is_named_in_one_line() -> None:
    box = spaces.Box(-1, 1, (4,))
    for bad, message in (
        (torch.nn.Linear(5, 3), r"network Linear cannot be used: RuntimeError: mat1 and mat2"),
        (torch.nn.Flatten(0), "network Flatten returns .* it must return"),
        (lambda space: torch.nn.Unflatten(1, (2, 2)), "network Unflatten returns"),
    ):
        with pytest.raises(UsageError, match=message):
            klrl.PPO(box, spaces.Discrete(2), network=bad)


def test_images_and_dicts_reach_ones_own_network_as_floats() -> None:
    seen: list[Any] = []

    class Look(torch.nn.Module):
        def __init__(self, space: Any) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: Any) -> torch.Tensor:
            seen.append(x)
            parts = [x] if isinstance(x, torch.Tensor) else [x[key] for key in sorted(x)]
            return self.scale * torch.cat([part.flatten(1) for part in parts], 1)

    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    klrl.PPO(image, spaces.Discrete(2), network=Look)
    assert seen[0].shape == (2, 3, 36, 36)
    assert seen[0].dtype == torch.float32
    klrl.PPO(spaces.Dict(eye=image, speed=spaces.Box(-1, 1, (2,))), spaces.Discrete(2), network=Look)
    assert {key: tuple(part.shape) for key, part in seen[-1].items()} == {"image eye": (2, 3, 36, 36), "vector": (2, 2)}


@pytest.fixture(params=["ppo", "trpo", "sac"])
def agent(request: pytest.FixtureRequest) -> klrl.Agent:
    """A trained agent; SAC's stands in the middle of a window."""
    more = {"learning_starts": 64, "hidden_sizes": (16,), "kl": {"every": 900}} if request.param == "sac" else {}
    options = {key: value for key, value in QUICK.items() if request.param != "sac" or "n_steps" not in key}
    for key in ("n_epochs", "batch_size") if request.param != "ppo" else ():
        options.pop(key, None)
    return klrl.train(request.param, "CartPole-v1", **{**options, "total_timesteps": 700}, **more).agent


def next_update(agent: klrl.Agent) -> Any:
    """What the agent learns from steps of its own."""
    envs: Any = gym.make_vec("CartPole-v1", 4)
    buffer: Any = agent.new_buffer(4)
    if isinstance(agent, klrl.SAC):
        obs, _ = envs.reset(seed=0)
        for _ in range(40):
            action = agent.act(obs)
            last, (obs, *rest, _) = obs, envs.step(agent.env_action(action))
            buffer.add(last, action, *rest, obs)
            if agent.ready(buffer):
                agent.update(buffer)
    else:
        collect(agent, envs, buffer, envs.reset(seed=0)[0])  # type: ignore[arg-type]
        agent.update(buffer)
    return agent.distribution(OBS)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_learns_what_the_original_learns_and_leaves_it_alone(agent: klrl.Agent, how: str) -> None:
    if how == "save":
        agent.save("saved")
        agent.save("saved")  # replaces it
        twin = type(agent).load("saved")
    else:
        twin = copy.deepcopy(agent) if how == "deepcopy" else pickle.loads(pickle.dumps(agent))
    before = agent.distribution(OBS)
    learned = next_update(twin)
    assert klrl.kl.kl(before, agent.distribution(OBS)).tolist() == [0.0] * 5, "the original stood still"
    assert float(klrl.kl.kl(before, learned).sum()) > 0, "the copy did not"
    assert klrl.kl.kl(learned, next_update(agent)).tolist() == [0.0] * 5


def test_values_are_those_of_the_critic(agent: klrl.Agent) -> None:
    value = agent.value(OBS)
    assert value.shape == (5,)
    assert len(set(value.tolist())) > 1


def test_a_saved_agent_is_refused_elsewhere() -> None:
    box, two = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)
    klrl.PPO(box, two).save("a")
    with pytest.raises(UsageError, match="a holds an agent 'ppo', not a TRPO"):
        klrl.TRPO.load("a")
    assert isinstance(klrl.load("a"), klrl.PPO)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="mine exists and was not written by klrl"):
        klrl.PPO(box, two).save("mine")
    assert Path("mine/thesis.txt").read_text() == "years"


def test_behaviour_cloning_with_an_optimizer_of_ones_own_then_training_goes_on() -> None:
    agent = klrl.PPO(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), klrl.PPOConfig(n_steps=64, batch_size=64))
    optimizer = torch.optim.Adam(agent.policy.parameters(), lr=1e-2)
    obs = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
    wanted = torch.from_numpy(obs[:, :1] > 0).long()
    for _ in range(60):
        optimizer.zero_grad()
        loss = -agent.policy(agent.encoder(obs)).log_prob(wanted).mean()
        loss.backward()
        optimizer.step()
    agreed = (agent.predict(obs, deterministic=True)[0] == wanted[:, 0].numpy()).mean()
    assert agreed > 0.95
    cloned = agent.distribution(obs)
    next_update(agent)
    moved = float(klrl.kl.kl(cloned, agent.distribution(obs)).mean())
    assert 0 < moved < 0.5, "klrl goes on from the cloned policy"


def test_frozen_layers_stay_frozen_and_the_rest_learns(agent: klrl.Agent) -> None:
    mlp: Any = agent.policy.network.mlp
    mlp.layers[0].requires_grad_(False)
    first, last = mlp.layers[0].weight.clone(), mlp.layers[-1].weight.clone()
    next_update(agent)
    assert torch.equal(mlp.layers[0].weight, first)
    assert not torch.equal(mlp.layers[-1].weight, last)


def test_an_agent_of_ones_own_goes_on_from_weights_that_were_touched() -> None:
    agent = A2C(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    next_update(agent)
    mlp: Any = agent.policy.network.mlp
    mlp.layers[0].requires_grad_(False)
    mlp.layers[1] = torch.nn.Linear(64, 64)
    first, second = mlp.layers[0].weight.clone(), mlp.layers[1].weight.clone()
    next_update(agent)
    assert torch.equal(mlp.layers[0].weight, first), "frozen"
    assert not torch.equal(mlp.layers[1].weight, second), "new, and learning"


def test_what_is_no_agent_is_refused_in_one_line() -> None:
    for bad in (A2CConfig, klrl.OnPolicyAgent, 3):
        with pytest.raises(UsageError, match=r"is no agent: train takes a name, or a subclass of klrl\.Agent"):
            klrl.train(bad, "CartPole-v1")  # type: ignore[arg-type]


def test_an_agent_that_never_reports_or_takes_a_name_of_klrls_is_refused() -> None:
    class Silent(A2C):
        def update(self, rollout: klrl.RolloutBuffer, progress: float = 0.0) -> Any:
            super().update(rollout, progress)

    with pytest.raises(UsageError, match="silent: neither update nor finish_window gave an UpdateResult"):
        klrl.train(Silent, "CartPole-v1", total_timesteps=300, n_envs=4, quiet=True)
    mine = type("PPO", (klrl.PPO,), {})
    with pytest.raises(UsageError, match="the name 'ppo' is of an agent of klrl's"):
        klrl.train(mine, "CartPole-v1")


def test_options_are_checked_where_an_agent_is_made() -> None:
    box, two = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)
    for agent, config, message in (
        (klrl.PPO, {"n_epochs": -1}, "--n-epochs must be at least 1, got -1"),
        (klrl.TRPO, {"kl": klrl.KLConfig(on_overshoot="project")}, "unknown option 'kl.penalty'"),
        (klrl.PPO, klrl.SACConfig(), "unknown option 'buffer_size'"),
        (klrl.PPO, {"kl": {"stop": -1}}, "--kl.stop must be at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            agent(box, two, config)
    assert klrl.PPO(box, two, {"n_steps": 64, "kl": {"target": 0.05}}).config.kl.target == 0.05
    held = klrl.PPO(box, two, klrl.PPOConfig(kl=klrl.KLTarget(0.01)))  # type: ignore[arg-type]
    assert held.config.kl == klrl.KLConfig(target=0.01)
