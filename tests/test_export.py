"""Exported policies: files that act as the agent does, in ONNX Runtime and in torch without klrl, or are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK

import klrl
from klrl.agents.base import Agent
from klrl.agents.student import StudentConfig
from klrl.analysis.export import _difference
from klrl.cli.main import main
from klrl.errors import UsageError
from klrl.policies.heads import CategoricalHead

BOX = spaces.Box(-1, 1, (3,), np.float32)
WIDE = spaces.Box(-np.inf, np.inf, (3,), np.float64)  # as MuJoCo's
PARTS = spaces.Dict(
    {
        "pose": BOX,
        "noise": spaces.Discrete(3, start=-1),  # as the further input is called
        "more": spaces.Dict({"bits": spaces.MultiBinary(4), "gears": spaces.MultiDiscrete([2, 3], start=[5, 0])}),
    }
)
SEEN = spaces.Dict({"camera": spaces.Box(0, 255, (36, 40, 3), np.uint8), "pose": BOX})
BOUNDED = spaces.Box(np.array([[-2], [0]], np.float32), np.array([[3], [0.5]], np.float32))


def moved(agent: Agent) -> Agent:
    """The agent with random weights and statistics: a new one's logits are nearly equal."""
    rng = torch.Generator().manual_seed(1)
    for weight in agent.policy.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=rng) / max(1, weight[0].numel()) ** 0.5)
    state = agent.encoder.state_dict()
    mean, var = (torch.rand(agent.encoder.features, generator=rng) for _ in range(2))
    agent.encoder.load_state_dict({**state, "mean": mean, "var": var + 0.1, "count": 10.0})
    return agent


def observations(space: spaces.Space[Any], count: int) -> list[Any]:
    space.seed(5)
    return [space.sample() for _ in range(count)]


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return klrl.train("ppo", "CartPole-v1", run_dir=str(tmp_path_factory.mktemp("runs")), **QUICK).folder


def test_an_onnx_file_acts_as_the_run_that_it_is_of_and_says_what_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run), "--output", "cart.onnx"])
    said = capsys.readouterr()
    assert said.out.startswith("cart.onnx: acts as klrl on 1,000 states of CartPole-v1, largest difference ")
    assert said.err == ""
    assert [path.name for path in Path().iterdir()] == ["cart.onnx"]
    agent, loaded = klrl.load(run), session(Path("cart.onnx"))
    obs = np.random.default_rng(0).normal(0, 0.3, (50, 4)).astype(np.float32)
    for given in (obs, obs[:1], obs[:7]):
        (action,) = loaded.run(None, {"obs": given})
        np.testing.assert_array_equal(action, agent.predict(given, deterministic=True)[0])
    assert (loaded.get_inputs()[0].shape, loaded.get_outputs()[0].shape) == (["batch", 4], ["batch"])
    about = loaded.get_modelmeta().custom_metadata_map
    assert (about["agent"], about["env_id"], about["klrl"]) == ("ppo", "CartPole-v1", klrl.__version__)
    assert int(about["step"]) >= QUICK["total_timesteps"]
    assert json.loads(about["action_space"]) == {"type": "Discrete", "n": 2, "start": 0, "dtype": "int64"}
    assert json.loads(about["inputs"])["obs"]["shape"] == ["batch", 4]
    assert json.loads(about["inputs"])["obs"]["dtype"] == "float32"
    assert str(Path(klrl.__file__).parent).encode() not in Path("cart.onnx").read_bytes(), "a path of this machine"


def test_a_torch_file_runs_without_klrl(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run), "--format", "torch", "--checkpoint", "best"])
    assert capsys.readouterr().out.startswith("policy.pt2: acts as klrl")
    code = """
import json, sys
sys.modules["klrl"] = None  # an import of it fails
import torch
about = {"klrl.json": ""}
policy = torch.export.load("policy.pt2", extra_files=about).module()
obs = torch.linspace(-0.3, 0.3, 40).reshape(10, 4)
print(json.dumps([policy(obs).tolist(), policy(obs[:1]).tolist(), json.loads(about["klrl.json"])["env_id"]]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    obs = np.linspace(-0.3, 0.3, 40, dtype=np.float32).reshape(10, 4)
    wanted = klrl.load(run, "best").predict(obs, deterministic=True)[0].tolist()
    assert json.loads(done.stdout) == [wanted, wanted[:1], "CartPole-v1"]
    assert str(Path(klrl.__file__).parent).encode() not in Path("policy.pt2").read_bytes()


AGENTS: dict[str, Any] = {
    "ppo, a normal": lambda: klrl.PPO(WIDE, BOUNDED),
    "ppo, an offset": lambda: klrl.PPO(spaces.Discrete(5, start=2), spaces.Discrete(4, start=-2)),
    "trpo, choices of different sizes": lambda: klrl.TRPO(PARTS, spaces.MultiDiscrete([2, 4], start=[1, 7])),
    "ppo, a bottleneck": lambda: klrl.PPO(BOX, spaces.MultiBinary(3), {"bottleneck": {"size": 2}}),
    "sac, squashed": lambda: klrl.SAC(WIDE, BOUNDED),
    "sac, joint actions": lambda: klrl.SAC(PARTS, spaces.MultiDiscrete([2, 3, 4], start=[1, 0, -5], dtype=np.int32)),
    "a student that sees less": lambda: klrl.Student(
        PARTS, BOUNDED, StudentConfig(head="squashed", observation_keys=("pose", "more"))
    ),
    "images": lambda: klrl.PPO(SEEN, BOUNDED),
    "a network of one's own": lambda: klrl.PPO(BOX, BOUNDED, network=lambda space: torch.nn.GRUCell(3, 8)),
}


CASES = [(name, noise) for name in AGENTS for noise in (False, True)]
QUICK_ONES = CASES[3], CASES[8], CASES[11]


@pytest.mark.parametrize(
    ("name", "noise"), [pytest.param(*c, marks=[] if c in QUICK_ONES else [pytest.mark.slow]) for c in CASES]
)
def test_every_policy_has_a_file_that_takes_what_its_environment_shows(name: str, noise: bool) -> None:
    agent = moved(AGENTS[name]())
    path = klrl.export(agent, "policy.pt2", format="torch", noise=noise).path
    policy = torch.export.load(path).module()
    for obs in observations(agent.observation_space, 5):
        batch = agent.encoder.layout.arrays(obs)
        shown = batch if isinstance(batch, dict) else {"": batch}
        parts = {name: torch.as_tensor(shown[name])[None] for name in agent.encoder.parts}
        given = [torch.zeros(1, *_noise_shape(agent))] if noise else []
        found = policy(parts.get("", parts), *given)[0].numpy()  # noise of 0 leaves the mode
        wanted = agent.predict(obs, deterministic=True)[0]
        assert found.dtype == wanted.dtype
        assert agent.action_space.contains(found if found.shape else found[()])
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def _noise_shape(agent: Agent) -> tuple[int, ...]:
    policy = agent.policy_at(agent.encoder.probe())
    return tuple((policy.logits if hasattr(policy, "logits") else policy.loc).shape[1:])


def test_noise_draws_the_actions_that_the_policy_gives_it() -> None:
    rng, obs = np.random.default_rng(2), np.stack(observations(BOX, 20))
    agent = moved(klrl.PPO(BOX, BOUNDED))
    policy, about = _loaded(agent)
    noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    found, normal = policy(torch.from_numpy(obs), noise).numpy(), agent.distribution(obs)
    sample = (normal.loc + normal.log_std.exp() * noise).numpy().reshape(20, 2, 1)
    np.testing.assert_allclose(found, sample.clip(BOUNDED.low, BOUNDED.high), atol=1e-5)
    assert (found != sample).any(), "some are clipped"
    assert about["inputs"]["noise"] == {"shape": ["batch", 2], "dtype": "float32", "is": "standard normal"}

    agent = moved(klrl.SAC(BOX, spaces.MultiDiscrete([2, 3], start=[0, 4])))
    policy, about = _loaded(agent)
    noise = rng.gumbel(size=(20, 1, 6)).astype(np.float32)
    number = (agent.distribution(obs).logits[:, 0].numpy() + noise[:, 0]).argmax(-1)
    found = policy(torch.from_numpy(obs), torch.from_numpy(noise))
    np.testing.assert_array_equal(found.numpy(), np.stack([number // 3, number % 3 + 4], -1))
    assert len(np.unique(number)) > 3
    assert about["inputs"]["noise"]["is"].startswith("standard Gumbel")


def _loaded(agent: Agent) -> tuple[Any, dict[str, Any]]:
    """The agent's policy with noise, from a file, and what that says of itself."""
    about = {"klrl.json": ""}
    path = klrl.export(agent, format="torch", noise=True).path
    return torch.export.load(path, extra_files=about).module(), json.loads(about["klrl.json"])


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_every_policy_has_an_onnx_file(name: str) -> None:
    agent = moved(AGENTS[name]())
    for noise in (False, True):
        loaded = session(klrl.export(agent, "policy.onnx", noise=noise).path)
        names = [f"obs.{part}" if part else "obs" for part in agent.encoder.parts]
        assert [part.name for part in loaded.get_inputs()] == [*names, *(["noise"] if noise else [])]


class Deceives(torch.nn.Linear):
    """Is another function once it is exported."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(3, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + torch.compiler.is_compiling()


class Branches(torch.nn.Linear):
    """Does what depends on the numbers it is given."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(3, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if float(input.sum()) > 0 else input.new_zeros(len(input), 4)


MASKED = spaces.Dict({"observation": BOX, "action_mask": spaces.Box(0, 1, (5,), np.int8)})


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(("seen", "does"), [(WIDE, BOUNDED), (MASKED, spaces.MultiDiscrete([2, 3]))])
def test_a_memory_goes_in_and_out_and_a_mask_is_obeyed(cell: str, seen: Any, does: Any) -> None:
    options = {"memory": cell, "memory_size": 5, "hidden_sizes": (8,)}
    agent = moved(klrl.PPO(seen, does, options))
    klrl.export(agent, "policy.pt2", format="torch")
    loaded, state, remembered = torch.export.load("policy.pt2").module(), torch.zeros(1, agent.policy.state_size), None
    for obs in observations(seen, 6):
        parts = obs if isinstance(obs, dict) else {"": obs}
        given = {name: torch.from_numpy(part)[None] for name, part in parts.items()}
        action, state = loaded(given if isinstance(obs, dict) else given[""], None, state)
        wanted, remembered = agent.predict(obs, remembered, deterministic=True)
        np.testing.assert_allclose(action[0].numpy(), wanted, atol=1e-5)
        np.testing.assert_allclose(state[0].numpy(), remembered, atol=1e-5)


@pytest.mark.slow
def test_an_onnx_file_of_a_memory_takes_noise_and_state() -> None:
    agent = moved(klrl.PPO(MASKED, spaces.Discrete(5), {"memory": "lstm", "memory_size": 5}))
    klrl.export(agent, "policy.onnx", noise=True)
    loaded = session(Path("policy.onnx"))
    assert [one.name for one in loaded.get_inputs()] == ["obs.observation", "obs.action_mask", "noise", "state"]
    assert [one.name for one in loaded.get_outputs()] == ["action", "next_state"]


def test_a_file_that_acts_otherwise_is_not_left() -> None:
    Path("policy.pt2").write_text("an earlier one")
    with pytest.raises(UsageError, match=r"the file's actions differ from klrl's by .*: nothing was written"):
        klrl.export(moved(klrl.PPO(BOX, BOUNDED, network=Deceives)), format="torch")
    with pytest.raises(UsageError, match="a FeatureNetwork cannot be exported: "):
        klrl.export(klrl.PPO(BOX, BOUNDED, network=Branches), format="torch")
    assert Path("policy.pt2").read_text() == "an earlier one"
    assert len(list(Path().iterdir())) == 1


def test_discrete_actions_may_differ_only_where_logits_tie() -> None:
    agent = klrl.PPO(BOX, spaces.MultiDiscrete([2, 2]), {"hidden_sizes": []})
    network: Any = agent.policy.network
    network.mlp.layers[0].weight.data.zero_()
    network.mlp.layers[0].bias.data.copy_(torch.tensor([1.0, 1.0, 0.0, 0.25]))
    obs = np.zeros((2, 3), np.float32)
    assert _difference(agent, obs, [np.array([[0, 1], [0, 1]])]) == 0
    assert _difference(agent, obs, [np.array([[0, 1], [1, 1]])]) == 0, "these two are equal"
    assert _difference(agent, obs, [np.array([[0, 0], [0, 1]])]) == 0.25
    with pytest.raises(UsageError, match="the file gives int32"):
        _difference(agent, obs, [np.zeros((2, 2), np.int32)])


class OwnHead(CategoricalHead):
    deployed = property()  # type: ignore[assignment]  # an attribute that is not there


def test_what_cannot_be_exported_is_named_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["export", *words])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no run or checkpoint at nowhere" in refused("nowhere")
    assert "--output no/x.onnx: there is no folder no" in refused(str(run), "--output", "no/x.onnx")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert refused(str(run)) == f'klrl: this needs {module}: pip install "klrl[onnx]"'
    agent = klrl.PPO(BOX, spaces.Discrete(2))
    with pytest.raises(UsageError, match="export takes a run, a checkpoint or an agent, not <"):
        klrl.export(klrl.Governed(agent, agent, 0.1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown option 'fromat'"):
        klrl.export(agent, fromat="torch")
    agent.policy.head = OwnHead(spaces.Discrete(2))
    with pytest.raises(UsageError, match=r"a OwnHead cannot be exported: it has no method deployed"):
        klrl.export(agent, format="torch")
    assert list(Path().iterdir()) == []
