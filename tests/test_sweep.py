"""Sweeps: what a grid is made of, real processes that train its trials, and sweeps that are stopped and go on."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

from klrl.agents import registry
from klrl.cli.main import main
from klrl.errors import Interrupted, UsageError
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history
from klrl.sweep.grid import Setting, expand, file_name, parse_choices, parse_values
from klrl.sweep.sweep import SweepConfig, sweep, table
from klrl.sweep.trial import Trial, failure_reason
from klrl.training.run import resolve

TINY = ("total_timesteps=512", "n_envs=2", "n_steps=64", "batch_size=64", "n_epochs=1", "eval_every=0")
FOLDER = Path("runs/sweep-ppo-CartPole-v1")


def runs() -> list[Path]:
    return sorted(FOLDER.glob("*/ppo-CartPole-v1-*"))


def modified() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in FOLDER.glob("*/*/**/*")}


def until(true: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    while not true():
        time.sleep(0.02)
        assert process.poll() is None


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.01,0.02", [0.01, 0.02]),
        ("1e4", [10_000.0]),
        ("adaptive,none", ["adaptive", "none"]),
        ("auto,3", ["auto", 3]),
        ("true,false", [True, False]),
        ("[64,64],[128]", [[64, 64], [128]]),
        ('"a,b"', ["a,b"]),
        ("", []),
    ],
)
def test_values_are_tomls_and_else_texts(text: str, values: list[object]) -> None:
    assert parse_values(text) == values


def test_a_grid_has_every_combination_complete_and_named_by_what_was_set() -> None:
    choices = parse_choices(["kl.target=0.01,2e-2", "--hidden-sizes=[8],[16,16]", "total-timesteps=1e3"])
    settings = expand("ppo", "CartPole-v1", choices)
    assert [setting.label for setting in settings] == [
        "hidden_sizes=8 kl.target=0.01",
        "hidden_sizes=16x16 kl.target=0.01",
        "hidden_sizes=8 kl.target=0.02",
        "hidden_sizes=16x16 kl.target=0.02",
    ]
    assert settings[0].name == "hidden_sizes=8,kl.target=0.01,total_timesteps=1000"
    run, agent = resolve(registry.find("ppo"), "CartPole-v1", {"kl": {"target": 0.01}})
    assert settings[0].options["n_steps"] == agent.n_steps
    assert settings[0].options["kl"] == {**settings[0].options["kl"], "target": 0.01, "stop": agent.kl.stop}
    assert settings[0].options["n_envs"] == run.n_envs
    assert [setting.name for setting in expand("ppo", "CartPole-v1", {})] == ["default"]
    assert len(expand("ppo", "CartPole-v1", {"total_timesteps": [1e3, 1000]})) == 1


def test_an_option_that_does_nothing_in_a_part_of_a_grid_is_not_set_there() -> None:
    settings = expand("ppo", "CartPole-v1", parse_choices(["bottleneck.size=0,4", "bottleneck.target=1,3"]))
    assert [setting.label for setting in settings] == [
        "bottleneck.size=0 bottleneck.target=2.0",
        "bottleneck.size=4 bottleneck.target=1.0",
        "bottleneck.size=4 bottleneck.target=3.0",
    ]


def test_folder_names_are_safe_and_short() -> None:
    assert file_name("sweep-ppo-a:b/C-v0") == "sweep-ppo-a_b_C-v0"
    assert len(file_name("x" * 300)) < 200
    assert file_name("x" * 300) != file_name("x" * 301)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "kl.targt=1"], "unknown option 'kl.targt' (did you mean 'kl.target'?)"),
        (["--set", "kl.target=0.1,abc"], "--kl.target must be a number, got 'abc'"),
        (["--set", "n_envs=2", "n_steps=1"], "--n-steps must be at least 2, got 1"),
        (["--set", "hidden_sizes=wide"], "--hidden-sizes must be a whole number, got 'wide'"),
        (["--set", "kl.target"], "--set kl.target: must be OPTION=VALUE"),
        (["--set", "kl.target="], "must be OPTION=VALUE"),
        (["--set"], "must be OPTION=VALUE"),
        (["--set", "seed=1,2"], "the sweep has --seeds for that"),
        (["--set", "gamma=0.9", "--set", "gamma=0.8"], "gamma is given twice"),
        (["--set", "kl.target=0.1", "--set", "kl=3"], "kl is given twice"),
        (["--set", "env.kwargs.speed=1,2"], "--env.kwargs {'speed': 1} does not fit"),
        (["--set", "bottleneck.target=1,3"], "--bottleneck.target does nothing without --bottleneck.size"),
        (["--set", "reference.run=nowhere", "reference.target=1"], "--reference.run: no run or checkpoint at nowhere"),
        (["--set", "clip_range=0.2,0", "clip_rule=spo"], "--clip-rule spo needs a --clip-range above 0"),
        (["--seeds", "0"], "--seeds must be at least 1 and at most 10000, got 0"),
        (["--run-dir", "/proc/none"], "--run-dir /proc/none: No such file"),
        (["--import", "nowhere"], "--import nowhere: no module"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "ppo", "CartPole-v1", *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(Path().iterdir())


def test_an_unknown_agent_or_env_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'ppo'"):
        sweep("pop", "CartPole-v1", SweepConfig())
    with pytest.raises(UsageError, match="did you mean 'CartPole-v1'"):
        sweep("ppo", "CartPole-v11", SweepConfig())


def test_why_a_process_ended_is_its_own_line_or_its_signal() -> None:
    assert failure_reason("WARNING: x\nklrl: no such thing\n\nnoise", 2) == "no such thing"
    assert failure_reason("Traceback\nValueError: bad\n", 1) == "ValueError: bad"
    assert failure_reason("WARNING: x", -signal.SIGKILL) == "ended by SIGKILL"
    assert failure_reason("", 3) == "exit code 3"


def test_a_table_without_room_for_all_shows_who_is_at_work() -> None:
    setting = Setting("a=1", "a=1", {"agent": "ppo", "env_id": "X-v0", "total_timesteps": 10})
    trials = [Trial(setting, seed, Path("none")) for seed in range(20)]
    trials[3].status, trials[4].status, trials[19].status = "finished", "failed", "running"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(trials, 4))
    text = console.export_text()
    assert re.findall(r"seed (\d+)\s+(\w+)", text) == [
        ("0", "waiting"),
        ("1", "waiting"),
        ("4", "failed"),
        ("19", "running"),
    ]
    assert "1 running, 1 failed, 17 waiting, 1 finished" in " ".join(text.split())


@pytest.mark.slow
def test_a_sweep_that_is_stopped_or_killed_goes_on_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped by SIGINT, then killed while its processes go on, then whole: each trial is trained once, to its end."""
    choices = (
        "kl.target=0.01,0.02",
        "total_timesteps=30000",
        "n_envs=2",
        "n_steps=256",
        "batch_size=512",
        "n_epochs=1",
    )
    command = [sys.executable, "-m", "klrl", "sweep", "ppo", "CartPole-v1", "--seeds", "2", "--jobs", "2"]
    command += ["--set", choices[0], "--set", *choices[1:]]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while [path.stat().st_size > 0 for path in FOLDER.glob("*/*/metrics.jsonl")] != [True, True]:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                return
        workers.extend(children(os.getpid()))
        os.kill(os.getpid(), signal.SIGINT)

    workers: list[int] = []
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(Interrupted) as stop:
        sweep("ppo", "CartPole-v1", SweepConfig(seeds=2, jobs=2, set=(choices,)))
    thread.join()
    assert stop.value.signum == signal.SIGINT
    assert capsys.readouterr().err == "stopped with 0 of 4 trials finished; the same command goes on\n"
    assert len(workers) >= 2
    assert not [pid for pid in workers if pid in children(os.getpid())]
    begun = runs()
    assert len(begun) == 2
    assert [len(checkpoint.steps(run / "checkpoints")) for run in begun] == [1, 1]

    second = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(children(second.pid)) == 2, second)
    second.kill()
    second.wait()
    assert runs() == begun

    sweep("ppo", "CartPole-v1", SweepConfig(seeds=2, jobs=4, set=(choices,)))
    assert capsys.readouterr().out.count("another process is at work on it") == 2
    assert set(begun) < set(runs())
    histories = [read_history(run) for run in runs()]
    assert [(run.options["kl"]["target"], run.seed) for run in histories] == [
        (t, s) for t in (0.01, 0.02) for s in (0, 1)
    ]
    for history in histories:
        assert history.state == "finished"
        assert history["step"].tolist() == sorted(set(history["step"].tolist()))
        assert 30_000 <= history.steps < 30_512
    assert (FOLDER / "report.html").stat().st_size > 10_000

    before = modified()
    sweep("ppo", "CartPole-v1", SweepConfig(seeds=2, set=(choices,)))
    assert modified() == before


def test_a_failing_trial_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", *TINY[:2], "n_epochs=1", "eval_every=0", "--set", "n_steps=64,10000000000000"]
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "ppo", "CartPole-v1", "--seeds", "1", "--jobs", "2", *words])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    reason = "--n-steps 10,000,000,000,000 of 2 environments do not fit into memory"
    assert "n_steps=10000000000000  seed 0  running\n" in out
    assert f"n_steps=10000000000000  seed 0  failed  {reason}" in out
    assert "n_steps=64              1 of 1" in out
    assert out.splitlines()[-1] == f"report      {FOLDER}/report.html"
    failed, summary = err.splitlines()
    assert failed.startswith(f"klrl: n_steps=10000000000000 seed 0 failed: {reason}")
    assert summary == "klrl: 1 of 2 trials failed; the same command tries them again"
    (run,) = runs()
    assert 512 <= read_history(run).steps < 640


def test_a_run_with_other_options_is_not_the_trials_own() -> None:
    (setting,) = expand("ppo", "CartPole-v1", parse_choices(TINY))
    trial = Trial(setting, 0, FOLDER / setting.name)
    for name, options in (("1", setting.options | {"gamma": 0.5}), ("2", setting.options | {"threads": 2})):
        run = trial.folder / f"ppo-CartPole-v1-0-{name}"
        run.mkdir(parents=True)
        (run / "config.toml").write_text(tomli_w.dumps(options))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 600, "eval/mean_reward": 9.0, "wall": 1.0}) + "\n")
        assert not trial.read()  # the one that is its own has no checkpoint
        assert (trial.history is None) == (name == "1")
    (run / "checkpoints" / "step-000000000600").mkdir(parents=True)
    assert trial.read()
    assert trial.status == "finished"
    assert not Trial(setting, 1, trial.folder).read()


def test_what_was_stopped_before_its_first_checkpoint_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    (setting,) = expand("ppo", "CartPole-v1", parse_choices(TINY))
    trial = Trial(setting, 0, FOLDER / setting.name)
    for name in ("1", "2"):
        (trial.folder / f"ppo-CartPole-v1-0-{name}").mkdir(parents=True)
    for name, text in (("config.toml", tomli_w.dumps(setting.options)), ("metrics.jsonl", '{"step": 128}\n')):
        (runs()[0] / name).write_text(text)
    other = trial.folder / "ppo-CartPole-v1-1-1"
    other.mkdir()
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    assert trial.begin()
    assert runs() == [other]
    while trial.status == "running":
        trial.poll()
    assert (trial.status, trial.problem) == ("failed", "exit code 0")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_hanging_processes_at_once() -> None:
    Path("hanging.py").write_text(
        "import time\nimport gymnasium as gym\nfrom pathlib import Path\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Hanging(CartPoleEnv):\n    def step(self, action):\n        Path('hangs').touch()\n"
        "        time.sleep(3600)\n"
        "gym.register('Hanging-v0', entry_point=Hanging)\n"
    )
    command = [sys.executable, "-m", "klrl", "sweep", "ppo", "Hanging-v0", "--import", "hanging", "--seeds", "1"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": "."}, stderr=subprocess.DEVNULL)
    until(Path("hangs").exists, process)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=2) == 130
    assert len(workers) == 1
    assert not Path(f"/proc/{workers[0]}").exists()
