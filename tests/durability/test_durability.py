"""What survives: kills at any time, at every system call of a save, damaged files, invalid commands.

The default run takes a sample; ``pytest -m "" -s tests/durability`` is the whole, and prints README's table.
Children are forked, so that each kill costs no import of torch.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import klrl
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import EnvironmentFailedError, UsageError
from klrl.rundir import checkpoint

SAVE_EVERY = 256


def sample(few: int, whole: int) -> Any:
    return pytest.mark.parametrize(
        "count", [few, pytest.param(whole, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
    )


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does the work, its output swallowed, and exits with 0 once it is done, else with 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def say(text: str) -> None:
    print(f"\n| {text} |", flush=True)


@sample(5, 100)
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_kills_during_training_lose_at_most_one_save_interval(agent: str, count: int) -> None:
    chance, kills, lost, reached = random.Random(0), 0, [], [0]
    options: dict[str, Any] = {"n_envs": 2, "save_every": SAVE_EVERY, "eval_every": 0, "quiet": True}
    if agent == "ppo":
        options |= {"n_steps": 64, "batch_size": 64, "n_epochs": 2}
    else:
        options |= {"learning_starts": 64, "batch_size": 32, "hidden_sizes": (16,), "train_freq": 4}
        options |= {"kl": {"every": 16}}
    folder: Path | None = None

    def go() -> None:
        if folder is None:
            klrl.train(agent, "CartPole-v1", total_timesteps=10**7, **options)
        else:
            klrl.resume(folder)

    while kills < count:
        pid = forked(go)
        time.sleep(0.3 + chance.random() * 0.7)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it was at work when it was killed"
        kills += 1
        folders = sorted(Path("runs").iterdir()) if Path("runs").exists() else []
        if not folders or not checkpoint.steps(folders[-1] / "checkpoints"):
            continue  # killed before its first save
        folder = folders[-1]
        path, content = checkpoint.newest(folder, with_rows=True)
        assert path == checkpoint.resolve(folder), "none is corrupt"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        reached.append(content["step"])
        lost.append(max(0, max(logged, default=0) - content["step"]))
        assert lost[-1] <= SAVE_EVERY + 128
        assert logged == sorted(set(logged)), "no step twice"
    assert reached == sorted(reached)
    worst = f"at most {max(lost, default=0)} steps lost, saved every {SAVE_EVERY}"
    say(f"{kills} SIGKILLs during training ({agent}) | 0 corrupt, {worst}")


class Rows:
    """A replay buffer as a checkpoint sees it."""

    size, written = 0, 0

    def rows(self, start: int) -> dict[str, torch.Tensor]:
        return {"rows": torch.arange(start, self.written, dtype=torch.float32)[:, None].expand(-1, 50).contiguous()}


def saving(steps: int, tell: int = -1, again: bool = False) -> None:
    """Save the next steps one by one; with ``again``, the last step once more in place of what is there."""
    rows, saved = Rows(), []  # type: ignore[var-annotated]
    found = checkpoint.steps(Path("run"))
    first = checkpoint.load(found[-1])["step"] + 1 if found else 1
    if found:
        saved = checkpoint.load(found[-1])["rows"]
    for step in range(first - again, first - again + steps):
        rows.written = 100 * step
        rows.size = min(rows.written, 1000)
        checkpoint.save(Path("run"), step, {"x": torch.full((20_000,), float(step))}, float(-step), [rows], saved)
        if tell >= 0:
            os.write(tell, step.to_bytes(4, "big"))
        checkpoint.prune(Path("run"))


def whole(at_least: int) -> int:
    """The newest checkpoint's step: it is whole, with its rows, and not older than ``at_least``."""
    if at_least == 0 and not checkpoint.steps(Path("run")):
        return 0
    checkpoint.clean(Path("run"))
    path = checkpoint.steps(Path("run"))[-1]
    content = checkpoint.load(path, with_rows=True)
    step = int(content["step"])
    assert step >= at_least
    assert torch.equal(content["state"]["x"], torch.full((20_000,), float(step)))
    rows = torch.cat([part["rows"][:, 0] for _, part in checkpoint.load_rows(path, content["rows"])])
    assert torch.equal(rows[-min(1000, 100 * step) :], torch.arange(100.0 * step)[-min(1000, 100 * step) :])
    return step


@sample(8, 200)
def test_kills_during_saves_corrupt_nothing(count: int) -> None:
    chance, done = random.Random(1), 0
    for _ in range(count):
        out, tell = os.pipe()
        pid = forked(lambda: saving(1000, tell))  # noqa: B023
        os.close(tell)
        time.sleep(0.02 + chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told = os.read(out, 1 << 16)
        os.close(out)
        done = whole(max(done, int.from_bytes(told[-4:], "big")))
    assert done > 1
    say(f"{count} SIGKILLs during saves | 0 corrupt, 0 finished saves lost")


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_every_system_call_of_a_save_leaves_a_whole_checkpoint(again: bool) -> None:
    calls = {"open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir"}

    def save_until(limit: int) -> None:
        seen = 0

        def before(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            if event == "c_call" and argument.__name__ in calls:
                seen += 1
                if seen == limit:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(before)
        saving(1, again=again)

    saving(3)
    if again:  # as when a run's only checkpoint is written once more
        for path in checkpoint.steps(Path("run"))[:-1]:
            shutil.rmtree(path)
    shutil.copytree("run", "as it was")
    killed, done = 0, False
    while not done:
        pid = forked(partial(save_until, killed + 1))
        status = os.waitpid(pid, 0)[1]
        done = status == 0
        assert done or os.WIFSIGNALED(status)
        assert whole(3) in ((3,) if again else (3, 4))
        killed += not done
        shutil.rmtree("run")
        shutil.copytree("as it was", "run")
    assert killed > 15
    kind = "that replaces one" if again else "of a new step"
    say(f"a SIGKILL before each of the {killed} system calls of a save {kind} | 0 corrupt")


@sample(40, 400)
def test_every_truncation_and_bit_flip_is_detected(count: int) -> None:
    saving(4)
    path, chance = checkpoint.steps(Path("run"))[-1], random.Random(2)
    files = [*path.iterdir(), *Path("run").glob("rows-*")]
    for i in range(count):
        file = files[i // 2 % len(files)]
        data = file.read_bytes()
        broken = bytearray(data)
        if i % 2:
            del broken[chance.randrange(len(data)) :]
        else:
            broken[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(broken))
        with pytest.raises(UsageError, match=r"damaged|missing"):
            checkpoint.load(path, with_rows=True)
        file.write_bytes(data)
    whole(4)
    say(f"{count // 2} truncations and {count // 2} bit flips | {count} detected")


WORDS = {
    "--total-timesteps": ["-1", "0", "many", "1.5", "1e-3", "nan"],
    "--n-envs": ["0", "-4", "eight", "1e400", ""],
    "--seed": ["-1", "1e12", "x"],
    "--kl.target": ["-0.1", "nan", "inf", "big"],
    "--kl.penalty": ["adaptiv", "", "2"],
    "--kl.on-overshoot": ["roll", "none"],
    "--kl.check": ["epochs"],
    "--device": ["tpu", "gpu"],
    "--learning-rate": ["-1", "0", "nan"],
    "--gamma": ["1.1", "-0.1", "x"],
    "--batch-size": ["0", "7.5", "-3", "999"],
    "--hidden-sizes": ["0", "-5", "a"],
    "--activation": ["gelu?"],
    "--run-dir": ["/proc/nowhere", "/dev/null/x"],
    "--config": ["missing.toml", "/"],
    "--import": ["no.such.module"],
    "--env.kwargs": ["=3", "nonsense=1", "gravity"],
    "--env.timeout": ["0", "-1"],
    "--env.on-error": ["ignore"],
    "--no-such-option": ["1"],
    "--kl.targett": ["0.1"],
}


def invalid(chance: random.Random) -> list[str]:
    kind = chance.randrange(8)
    if kind == 0:
        return [chance.choice(["trian", "", "-x", "ppo", "run"])]
    if kind == 1:
        return ["train", chance.choice(["pp0", "dqn", "PPO "]), "CartPole-v1"]
    if kind == 2:
        names = ["CartPole", "CartPole-v99", "no_such_module:X-v0", ":", "../x", "Blackjack-v1"]
        return ["train", "ppo", chance.choice(names)]
    if kind == 3:
        return [chance.choice(["eval", "resume"]), chance.choice(["nowhere", "/", "/etc/passwd", ".", "x" * 300])]
    option = chance.choice(list(WORDS))
    agent = chance.choice(["ppo", "trpo", "sac"])
    return ["train", agent, "Pendulum-v1", option, chance.choice(WORDS[option])]


@sample(40, 120)
def test_invalid_commands_are_one_line_and_exit_code_2(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(3)
    for _ in range(count):
        words = invalid(chance)
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capsys.readouterr()
        assert stop.value.code == 2, (words, out, err)
        assert err.count("\n") == 1, (words, err)
        assert "Traceback" not in err
        assert not list(Path().iterdir()), words
    with capsys.disabled():
        say(f"{count} invalid command lines | {count} times one line and exit code 2, no folder")


@sample(2, 50)
def test_killed_workers_are_named_within_five_seconds(count: int) -> None:
    chance, slowest = random.Random(4), 0.0
    for _ in range(count):
        envs = make_vector("CartPole-v1", 3, EnvConfig(vectorization="async", timeout=5.0))
        envs.reset(seed=0)
        victim = chance.randrange(3)
        os.kill(envs.workers.processes[victim].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        start = time.perf_counter()
        with pytest.raises(EnvironmentFailedError, match=f"the worker of env .*{victim} "):
            envs.step(np.zeros(3, np.int64))
        envs.close()
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 5
    say(f"{count} killed workers | {count} named errors, the slowest after {slowest:.1f} s")
