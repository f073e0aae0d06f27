"""Whose code runs: what the user names with --import, and nothing that a run, a config or the current folder names."""

import contextlib
import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK

import klrl
from klrl.agents import registry
from klrl.cli.main import main
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history
from klrl.sweep.grid import Setting
from klrl.sweep.sweep import SweepConfig, sweep
from klrl.sweep.trial import Trial

SPRUNG = "import pathlib\npathlib.Path('sprung').touch()\n"
MINE = """
import gymnasium, klrl, torch

class Theirs(klrl.PPO):
    pass

class Net(torch.nn.Sequential):
    def __init__(self, space):
        super().__init__(torch.nn.Linear(4, 8))

gymnasium.register("Theirs-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The current folder is on the path, as with ``python -m``; modules from there are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**QUICK, "total_timesteps": 256, "run_dir": str(tmp_path_factory.mktemp("runs"))}
    return klrl.train("ppo", "CartPole-v1", **options).folder


def prepared(sound: Path, **options: Any) -> Path:
    """A run whose checkpoint, with sums that fit, says something else of its options."""
    content = checkpoint.load(checkpoint.resolve(sound))
    content["state"]["options"] |= options
    checkpoint.save(Path("theirs/checkpoints"), content["step"], content["state"])
    return Path("theirs")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", ["eval", "resume", "compare", "record"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"imports": ["trap"]}, "trap"),
        ({"imports": ["venv.__main__"]}, "venv.__main__"),
        ({"env_id": "trap:Env-v0"}, "trap"),
        ({"env_id": "antigravity:Env-v0"}, "antigravity"),
        ({"network": "trap:Net"}, "trap"),
        ({"network": "theirs.trap:Net"}, "theirs.trap"),
    ],
    ids=str,
)
def test_a_run_imports_nothing_by_itself(
    command: str, options: dict[str, Any], named: str, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepared(sound, **options)
    for folder in (Path(), run):
        (folder / "trap.py").write_text(SPRUNG)
    words = [command, str(run), *([str(sound)] if command == "compare" else [])]
    more = ["--total-timesteps", "512"] if command == "resume" else []
    line = refused(capsys, *words, *more)
    assert f"--import {named}, if you trust it" in line
    assert not Path("sprung").exists()
    assert named not in sys.modules


def test_what_the_user_names_is_imported(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MINE)
    own = {"imports": ["mine"], "env_id": "mine:Theirs-v0", "network": ""}
    main(["eval", str(prepared(sound, **own)), "--import", "mine", "--episodes", "1"])
    assert "over 1 episodes of mine:Theirs-v0" in capsys.readouterr().out


def test_another_environment_needs_no_import_of_the_runs_own(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(sound, imports=["nowhere"], env_id="nowhere:X-v0")
    main(["eval", str(run), "--env-id", "CartPole-v1", "--episodes", "1"])
    assert "of CartPole-v1" in capsys.readouterr().out
    assert isinstance(klrl.load(run), klrl.PPO)


def test_a_config_file_imports_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Path("trap.py").write_text(SPRUNG)
    for text in ('imports = ["trap"]', 'network = "trap:Net"'):
        Path("their.toml").write_text(text)
        line = refused(capsys, "train", "ppo", "CartPole-v1", "--config", "their.toml")
        assert line.startswith("klrl: their.toml takes code from 'trap'")
    Path("their.toml").write_text("imports = 3")
    assert "--imports must be a text, got 3" in refused(capsys, "train", "ppo", "CartPole-v1", "--config", "their.toml")
    assert not Path("sprung").exists()


def test_a_module_that_ends_the_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text("raise SystemExit(0)\n")
    assert "importing 'script' failed: SystemExit" in refused(capsys, "eval", "x", "--import", "script")


def test_an_agent_trained_from_a_script_is_found_by_its_module() -> None:
    """In a process of its own: there the class is another one, of the same name."""
    Path("script.py").write_text(MINE.replace("Theirs", "Scripted"))
    script: Any = importlib.import_module("script")
    run = klrl.train(script.Scripted, "CartPole-v1", network=script.Net, **{**QUICK, "total_timesteps": 256})
    code = "import sys, klrl; print(type(klrl.load(sys.argv[1], imports=['script'])))"
    done = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True)
    assert done.stdout == "<class 'script.Scripted'>\n", done.stderr


def test_an_agent_is_found_once_its_package_is_imported_by_keyword() -> None:
    Path("mine_too.py").write_text(MINE.replace("Theirs", "Ours"))
    options = {**QUICK, "total_timesteps": 256}
    assert klrl.train("ours", "Ours-v0", imports=["mine_too"], **options).folder.name.startswith("ours-")


def test_what_lies_in_the_current_folder_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("trap.py").write_text(SPRUNG)
    for folder in ("", "site"):
        info = Path(folder, f"trap{folder}-1.0.dist-info")
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trap{folder}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[klrl.agents]\ntrapped{folder} = trap:Agent\n")
    monkeypatch.syspath_prepend("site")
    assert "trappedsite" in registry.names()
    assert "trapped" not in registry.names()
    with pytest.raises(klrl.UsageError, match="unknown agent 'trapped'"):
        registry.find("trapped")
    assert not Path("sprung").exists()
    assert EntryPoint("x", "y", "z").dist is None, "which counts as installed"


def test_the_option_takes_one_name_and_leaves_the_runs_alone(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "--import", "json", str(sound), str(sound), "--steps", "20", "--episodes", "1"])
    assert "they agree at every state" in capsys.readouterr().out


def test_a_network_that_is_not_there_is_blamed_on_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "ppo", "CartPole-v1"], ["sweep", "ppo", "CartPole-v1"]):
        line = refused(capsys, *words, "--network", "nowhere:Net")
        assert line == "klrl: --network nowhere:Net: no module named 'nowhere' is installed"
        for name in ("Net", "json:Net"):
            line = refused(capsys, *words, "--network", name)
            assert f"network {name!r} is no imported nn.Module class: --network module:Class names one" in line
    line = refused(capsys, "train", "ppo", "CartPole-v1", "--config", "none.toml")
    assert line == "klrl: --config none.toml: No such file or directory"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trials_look_modules_up_where_the_sweep_does(
    whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the current folder does not stand in for one of Python's or klrl's; a network and import go along."""
    sys.path.remove(str(Path.cwd()))
    for name in ("random", "klrl"):
        Path(f"{name}.py").write_text(SPRUNG)
    Path("lib").mkdir()
    Path("lib/mine_three.py").write_text(MINE.replace("Theirs", f"Three{whole}"))
    monkeypatch.syspath_prepend(str(Path("lib").resolve()))
    commands: list[list[str]] = []
    if not whole:  # a process all the same, which imports klrl and ends
        command = Trial._command
        monkeypatch.setattr(Trial, "_command", lambda self: commands.append(command(self)) or ["list", "--help"])
    words = ("total_timesteps=128", "n_envs=2", "n_steps=64", "eval_every=0")
    config = SweepConfig(1, (words,), quiet=True, imports=("mine_three",), network="mine_three:Net")
    with contextlib.nullcontext() if whole else pytest.raises(ChildProcessError):
        sweep("ppo", f"Three{whole}-v0", config)
    assert ("1 of 1" in capsys.readouterr().out) is whole
    assert not Path("sprung").exists()
    (settings,) = Path("runs").rglob("config.toml" if whole else "options.toml")
    assert 'network = "mine_three:Net"' in settings.read_text()
    assert all(words[-1] == "--import=mine_three" for words in commands)


def test_a_trial_that_is_resumed_is_given_its_imports_again(sound: Path) -> None:
    options = {"agent": "ppo", "env_id": "a.b:Env-v0", "imports": ["c"], "network": "d:Net"}
    trial = Trial(Setting("x", "x", options), 0, Path("none"))
    trial.history = read_history(sound)
    assert trial._command() == ["resume", str(sound), "--import=c", "--import=d", "--import=a.b"]
