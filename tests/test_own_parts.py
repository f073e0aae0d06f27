"""Classes of one's own as parts: heads, coefficients and rules by name, saved, resumed and refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, rows
from test_resume import check_same
from torch import distributions as td

import klrl
from klrl.agents.limits import KLConfig, OffPolicyKLConfig
from klrl.cli.main import main
from klrl.errors import UsageError
from klrl.kl import Start, StateRule, at_most
from klrl.policies.heads import make_head
from klrl.policies.own import name_of
from klrl.rundir import checkpoint

SMALL: dict[str, Any] = {**QUICK, "total_timesteps": 512, "final_episodes": 1, "eval_every": 0}


class Laplace(torch.nn.Module):
    """A head whose distribution is torch's own, without a Fisher information that klrl knows."""

    def __init__(self, space: Any) -> None:
        super().__init__()
        self.space, self.size = space, 1
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, output: Any) -> Any:
        return td.Independent(Wide(output, self.log_scale.exp().expand_as(output)), 1)

    def sample(self, output: Any, rng: Any) -> Any:
        noise = 0.0 if rng is None else rng.laplace(size=output.shape).astype(np.float32)
        return output + noise * np.exp(self.log_scale.detach().numpy())

    def to_env(self, action: Any) -> Any:
        return np.clip(action, self.space.low, self.space.high)

    def metrics(self) -> dict[str, float]:
        return {"train/scale": float(self.log_scale.exp())}


class Wide(td.Laplace):
    def __init__(self, loc: Any, scale: Any) -> None:
        super().__init__(loc, scale, validate_args=False)

    def map_parameters(self, function: Any) -> Any:
        return Wide(function(self.loc), function(self.scale))


class Growing:
    """A coefficient that grows by half after each update."""

    def __init__(self, start: Start) -> None:
        self.value, self.start = start.value, start

    def adapt(self, measured: float, bound: Any) -> None:
        self.value *= 1.5

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])


class Halve(StateRule):
    def __init__(self, limit: float, turn: float) -> None:
        self.limit, self.turn = limit, turn

    def factor(self, kl: Any, further: Any) -> Any:
        return torch.where((kl > self.limit) & further, 0.5, 1.0)


class Forgetful(Growing):
    def state_dict(self) -> dict[str, float]:
        return {}


class Tripled(StateRule):
    def __init__(self, limit: float, turn: float) -> None:
        pass

    def factor(self, kl: Any, further: Any) -> Any:
        return torch.ones(3)


class Crooked(Laplace):
    def forward(self, output: Any) -> Any:
        return td.Normal(output, 1.0, validate_args=False)


class Attached(Laplace):
    def sample(self, output: Any, rng: Any) -> Any:
        return self(torch.from_numpy(output)).mean.numpy() + self.log_scale.numpy()


def test_a_coefficient_and_a_rule_are_made_from_the_options() -> None:
    config = KLConfig(penalty=Growing, coef=3.0, target=0.05, per_state=Halve, state_limit=0.2, turn=0.7)  # type: ignore[arg-type]
    assert config.penalty == f"{__name__}:Growing"
    limit = config.make_limit(torch.device("cpu"))
    coefficient: Any = limit.penalty.coefficient
    assert isinstance(coefficient, Growing)
    assert (coefficient.value, coefficient.start.bound) == (3.0, at_most(0.05))
    (rule,) = limit.rules
    assert isinstance(rule, Halve)
    assert (rule.limit, rule.turn) == (0.2, 0.7)
    limit.adapt(0.1)
    assert float(limit.beta) == pytest.approx(4.5)


@pytest.mark.parametrize("agent", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
def test_a_run_with_ones_own_coefficient_and_rule_goes_on_as_a_whole_one(agent: str) -> None:
    kl: dict[str, Any] = {"penalty": Growing, "per_state": Halve, "state_limit": 1e-4, "target": 0.02}
    if agent == "ppo":
        check_same("ppo", "CartPole-v1", 512, final_episodes=1, kl=kl)
    else:
        check_same("sac", "Pendulum-v1", 300, final_episodes=1, kl={**kl, "every": 70}, learning_starts=100)


@pytest.mark.parametrize(
    ("agent", "options"),
    [
        pytest.param(
            "ppo",
            {"head": "beta", "critic_hidden_sizes": [24], "critic_learning_rate": 1e-3},
            marks=pytest.mark.slow,
        ),
        ("trpo", {"head": "beta", "activation": "silu", "layer_norm": True}),
        ("ppo", {"head": Laplace, "activation": "gelu"}),
        pytest.param("ppo", {"head": "state-dependent-std", "kl": {"per_state": "reverse"}}, marks=pytest.mark.slow),
    ],
    ids=["ppo-beta", "trpo-beta", "ppo-own", "ppo-state"],
)
def test_a_run_of_these_forms_goes_on_as_a_whole_one(agent: str, options: dict[str, Any]) -> None:
    check_same(agent, "Pendulum-v1", 400, final_episodes=1, **options)


def test_a_head_of_ones_own_is_read_back_only_where_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = klrl.train("ppo", "Pendulum-v1", head=Laplace, **SMALL)
    assert "train/scale" in rows(run.folder)[-1]
    obs = np.array([[1.0, 0.0, 0.0]], np.float32)
    assert torch.equal(klrl.load(run.folder).distribution(obs).mean, run.agent.distribution(obs).mean)
    assert checkpoint.load(checkpoint.resolve(run.folder))["state"]["options"]["head"] == name_of(Laplace)
    student = klrl.distill(run.folder, **{**SMALL, "teacher_updates": 1})
    assert isinstance(student.agent.policy.head, Laplace)
    with pytest.raises(UsageError, match="a governor mixes two"):
        klrl.Governed(run.agent, klrl.load(run.folder), 0.1)
    with pytest.raises(SystemExit):
        main(["compare", str(run.folder), str(run.folder)])
    assert "compare takes two policies of one of klrl's families, not Independent" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(UsageError, match=f"head '{__name__}:Laplace' is no imported nn.Module class: --import"):
        klrl.load(run.folder)


def test_trpo_says_that_it_needs_a_fisher_information() -> None:
    with pytest.raises(UsageError, match="the Fisher information of Wide is not known in closed form"):
        klrl.TRPO(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), {"head": Laplace})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"head": "json:JSONDecoder"}, "head 'json:JSONDecoder' is no imported nn.Module class: --head module:Class"),
        (
            {"kl": {"penalty": "subprocess:Popen"}},
            "coefficient subprocess:Popen cannot be used: it has no method",
        ),
        ({"head": Crooked}, "head .*:Crooked cannot be used: ValueError: its distributions' batch shape is not"),
        ({"head": Attached}, "head .*:Attached cannot be used: RuntimeError: Can't call numpy"),
        ({"head": torch.nn.Linear}, "head torch.nn.modules.linear:Linear cannot be used: it has no method sample"),
        ({"kl": {"penalty": "adaptve"}}, r"--kl.penalty must be one of .* \(did you mean 'adaptive'\?\), got adaptve"),
        ({"kl": {"penalty": "nowhere:X"}}, "coefficient 'nowhere:X' is no imported class: --import nowhere, if you"),
        (
            {"kl": {"per_state": Tripled}},
            r"rule .*:Tripled cannot be used: .* it weighs two states by \[1.0, 1.0, 1.0\]",
        ),
        ({"kl": {"penalty": Forgetful}}, "coefficient .*:Forgetful cannot be used: KeyError: 'value'"),
        ({"kl": {"penalty": Halve}}, "coefficient .*:Halve cannot be used: it has no method adapt and no state_dict"),
        (
            {"kl": {"per_state": Growing}},
            "rule .*:Growing' is no imported StateRule: --kl.per-state module:Class",
        ),
        ({"kl": {"per_state": "gates"}}, r"--kl.per-state must be one of .* \(did you mean 'gate'\?\), got gates"),
    ],
    ids=str,
)
def test_what_is_no_such_part_is_refused_in_a_line_before_anything_is_written(
    options: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError, match=line):
        klrl.train("ppo", "Pendulum-v1", **options, **SMALL)
    assert not Path("runs").exists()


class OfRatios(Halve):
    factor = StateRule.factor

    def weight(self, ratio: Any, advantage: Any, kl: Any) -> Any:
        return torch.where((ratio - 1).abs() > self.limit, 0.5, 1.0)


def test_a_rule_about_ratios_is_for_agents_that_have_one() -> None:
    of_ppo, of_sac = (config(per_state=OfRatios) for config in (KLConfig, OffPolicyKLConfig))  # type: ignore[arg-type]
    assert isinstance(of_ppo.make_limit(torch.device("cpu")).rules[0], OfRatios)
    with pytest.raises(UsageError, match="OfRatios is about a surrogate's ratio: this agent needs"):
        of_sac.make_limit(torch.device("cpu"))


def test_a_class_within_a_function_is_told_to_come_out_of_it() -> None:
    class Inner(Laplace):
        pass

    with pytest.raises(UsageError, match="define it outside of a function"):
        make_head(spaces.Box(-1, 1, (1,)), name=name_of(Inner))


MINE = """
import klrl.kl
class Mine(klrl.kl.Dual):
    def __init__(self, start):
        super().__init__(start.value, rate=0.5 / start.bound.limit)
class MineToo(klrl.kl.Gate):
    def __init__(self, limit, turn):
        super().__init__(limit)
"""


def test_the_command_imports_what_it_names_and_nothing_that_a_file_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("own_kl.py").write_text(MINE)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if key != "quiet"]
    named = ["--kl.penalty", "own_kl:Mine", "--kl.per_state=own_kl:MineToo"]
    try:
        main(["train", "ppo", "CartPole-v1", *named, "--quiet", *words])
        (folder,) = Path("runs").iterdir()
        del sys.modules["own_kl"]
        for command in (["resume", str(folder), "--total-timesteps", "1024"], ["eval", str(folder)]):
            with pytest.raises(SystemExit) as stop:
                main(command)
            assert stop.value.code == 2
            assert "--import own_kl, if you trust it" in capsys.readouterr().err.splitlines()[-1]
        with pytest.raises(SystemExit):
            main(["train", "ppo", "CartPole-v1", "--config", str(folder / "config.toml")])
        assert "takes code from 'own_kl'" in capsys.readouterr().err
        assert "own_kl" not in sys.modules
        main(["resume", str(folder), "--total-timesteps", "1024", "--import", "own_kl"])
        with pytest.raises(SystemExit):
            main(["train", "ppo", "CartPole-v1", "--head", "nowhere:Head"])
        assert "--head nowhere:Head: no module named 'nowhere' is installed" in capsys.readouterr().err
        for word, line in (
            ("kl.penalty=nowhere:X", "--kl.penalty nowhere:X: no module named 'nowhere' is installed"),
            ("kl.per_state=own_kl:Other", "rule 'own_kl:Other' is no imported StateRule: --kl.per-state"),
        ):
            with pytest.raises(SystemExit):
                main(["sweep", "ppo", "CartPole-v1", "--set", word])
            assert line in capsys.readouterr().err
    finally:
        sys.modules.pop("own_kl", None)


def test_the_help_lists_the_names_and_says_that_a_class_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "ppo", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert "{adaptive,lagrange,fixed,annealed,cyclical,reciprocal,none,module:Class}" in text
    assert "{none,gate,reverse,project,module:Class}" in text
    assert "{plain,state-dependent-std,beta,module:Class}" in text
    main(["completion", "bash"])
    assert 'words="none gate reverse project"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"network": 3}, "network= takes an nn.Module, or what makes one for a space, not 3"),
        ({"network": lambda space: 3}, "network= is to make an nn.Module, and made 3"),
        ({"network": lambda space: torch.nn.Flatten(0)}, r"returns \[8\] for 2 rows: it must return \[B, F\]"),
        ({"network": torch.nn.Linear(4, 8), "layer_norm": True}, "--layer-norm does nothing beside --network"),
        ({"network": torch.nn.Linear(4, 8), "hidden_sizes": (7,)}, "--hidden-sizes does nothing beside --network"),
        ({"stop_at_return": float("nan")}, "--stop-at-return must be a number"),
    ],
)
def test_what_cannot_be_or_does_nothing_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        klrl.train("ppo", "CartPole-v1", **options, quiet=True)
    assert not Path("runs").exists()
