"""What is printed is a convenience: without a reader, a terminal or a stream, a run goes on and saves."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import QUICK, rows

import klrl
from klrl.cli.main import main
from klrl.console import say
from klrl.rundir import checkpoint

SHOWN: dict[str, Any] = QUICK | {"quiet": False, "verbose": True, "total_timesteps": 1000}
WORDS = ["--total-timesteps", "1000", "--n-envs", "2", "--n-steps", "64", "--eval-every", "0", "--verbose"]


def broken_pipe() -> io.TextIOWrapper:
    end, other = os.pipe()
    os.close(end)
    return os.fdopen(other, "w")


def closed_terminal() -> io.TextIOWrapper:
    end, other = os.openpty()
    os.close(end)
    return os.fdopen(other, "w")


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def closed_file() -> io.TextIOWrapper:
    with open(os.devnull, "w") as file:
        return file


@pytest.mark.parametrize("make", [broken_pipe, closed_terminal, full_disk, closed_file, lambda: None])
@pytest.mark.parametrize("verbose", [True, False])
def test_a_run_whose_output_nobody_can_read_goes_on_and_is_saved(
    make: Callable[[], Any], verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = make(), make()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run = klrl.train("ppo", "CartPole-v1", **SHOWN | {"verbose": verbose})
    assert checkpoint.step_of(checkpoint.steps(run.folder / "checkpoints")[-1]) >= 1000
    assert len(rows(run.folder)) > 1
    for stream in (out, err):
        if stream is not None and not stream.closed:
            print("and what follows goes nowhere", file=stream, flush=True)
            stream.close()


def test_that_nobody_reads_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = broken_pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    say("one")
    say("two")
    pipe.close()
    assert capsys.readouterr().err == "klrl: stdout: Broken pipe; the run goes on without it\n"


def test_what_the_system_refuses_keeps_its_exit_code_where_stderr_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = broken_pipe()
    monkeypatch.setattr(sys, "stderr", pipe)
    with pytest.raises(SystemExit) as stop:
        main(["train", "ppo", "CartPole-v1", "--gamma", "7"])
    pipe.close()
    assert stop.value.code == 2


class Ending(CartPoleEnv):
    """Sends its own process a signal at its 300th step."""

    steps = 0

    def step(self, action: Any) -> Any:
        Ending.steps += 1
        if Ending.steps == 300:
            os.kill(os.getpid(), signal.SIGHUP)
        return super().step(action)


gym.register("Ending-v0", entry_point=Ending, max_episode_steps=500)


def test_a_hangup_saves_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unheard(*_: object) -> None:
        raise AssertionError("the run did not wait for the signal")

    before = signal.signal(signal.SIGHUP, unheard)
    try:
        monkeypatch.setattr(Ending, "steps", 0)
        with pytest.raises(SystemExit) as stop:
            main(["train", "ppo", "Ending-v0", *WORDS])
        assert stop.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is unheard
        (folder,) = Path("runs").iterdir()
        assert capsys.readouterr().err.endswith(f"go on with: klrl resume {folder}\n")
        klrl.resume(folder)
        monkeypatch.setattr(Ending, "steps", 300)
        whole = klrl.train(
            "ppo", "Ending-v0", run_dir="whole", total_timesteps=1000, n_envs=2, n_steps=64, eval_every=0
        )
        assert rows(folder) == rows(whole.folder)
        monkeypatch.setattr(Ending, "steps", 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        klrl.train("ppo", "Ending-v0", total_timesteps=500, n_envs=2, n_steps=64, quiet=True)
        assert Ending.steps > 300, "nohup's run goes on"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("{klrl} | head -1", 0),
        ("{klrl} >&-", 0),
        ("{klrl} >&- 2>&-", 0),
        ("{klrl} > /dev/full 2>/dev/full", 0),
        ("{klrl} --gamma 3 >&- 2>&-", 2),
    ],
)
def test_the_command_ends_as_it_would_with_a_reader(shell: str, code: int) -> None:
    command = f"{sys.executable} -m klrl train ppo CartPole-v1 {' '.join(WORDS)}"
    line = "set -o pipefail; " + shell.format(klrl=command)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    for folder in Path("runs").iterdir() if code == 0 else ():
        assert checkpoint.step_of(checkpoint.steps(folder / "checkpoints")[-1]) >= 1000
        assert len(rows(folder)) > 1


@pytest.mark.slow
def test_a_hangup_of_a_run_with_workers_whose_terminal_is_gone() -> None:
    end, other = os.openpty()
    words = [*WORDS, "--total-timesteps", "1e6", "--env.vectorization", "async"]
    process = subprocess.Popen(
        [sys.executable, "-m", "klrl", "train", "ppo", "CartPole-v1", *words],
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    os.read(end, 20)
    os.close(end)
    while not any(path.read_text().count("\n") > 3 for path in Path("runs").glob("*/metrics.jsonl")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=20) == 129
    (folder,) = Path("runs").iterdir()
    assert checkpoint.steps(folder / "checkpoints")


def test_resume_takes_the_options_that_change_nothing_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = klrl.train("ppo", "CartPole-v1", **QUICK | {"total_timesteps": 300})
    more = ["resume", str(run.folder), "--total-timesteps"]
    counts = []
    for steps, option in (("600", "--verbose"), ("900", "--quiet")):
        capsys.readouterr()
        main([*more, steps, option, "--threads", "2", "--device", "cpu"])
        counts.append(len(capsys.readouterr().out.splitlines()))
    assert counts[0] > counts[1] == 3
    main([*more, "1200"])
    assert len(capsys.readouterr().out.splitlines()) == 3, "as it was begun"
    assert klrl.resume(run.folder, total_timesteps=1500).config.threads == 2
    for options, message in (
        ({"quite": True}, r"unknown option 'quite' \(did you mean 'quiet'\?\)"),
        ({"threads": -1}, "--threads must be at least 0"),
        ({"quiet": True, "verbose": True}, "--quiet and --verbose contradict each other"),
        ({"device": "cuda:99"}, "--device cuda:99: "),
    ):
        with pytest.raises(klrl.UsageError, match=message):
            klrl.resume(run.folder, total_timesteps=1800, **options)


class Unreadable(io.StringIO):
    """A stream of somebody's own, without a file, that fails."""

    def write(self, text: str) -> int:
        raise OSError(5, "gone")

    def fileno(self) -> int:
        raise AttributeError("none")


def test_a_stream_of_ones_own_that_fails_is_left_alone_after_its_first_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Unreadable())
    for _ in range(3):
        say("a line")
    sys.stdout.close()
    assert capsys.readouterr().err == "klrl: stdout: gone; the run goes on without it\n"


def test_a_stream_need_not_know_whether_it_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tee:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Tee())
    assert klrl.train("ppo", "CartPole-v1", **SHOWN | {"verbose": False}).folder.exists()


def test_what_an_encoding_does_not_have_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("runs/\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert raw.getvalue() == b"runs/\\xe9\n"
