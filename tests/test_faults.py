"""What a night on a shared machine brings: environments and workers that fail, signals, full disks, two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers import rows

import klrl
from klrl.analysis.report import ReportConfig, report
from klrl.envs.make import EnvConfig, make_vector
from klrl.envs.wrappers import EpisodePosition
from klrl.errors import EnvironmentFailedError, NonFiniteError, UsageError
from klrl.rundir import checkpoint

SMALL: dict[str, Any] = {"n_envs": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 2, "quiet": True, "eval_every": 0}


class Failing(gym.Wrapper[Any, Any, Any, Any]):
    """Raises, dies, hangs or shows something odd at one step of each of its episodes."""

    def __init__(self, how: str, at: int = 30) -> None:
        super().__init__(gym.make("klrl.envs:klrl/Truncation-v0") if how == "reward" else gym.make("CartPole-v1"))
        self.how, self.at, self.steps = how, at, 0

    def reset(self, **kwargs: Any) -> Any:
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, reward, terminated, _, info = super().step(action)
        if self.steps == self.at:
            if self.how == "raise":
                raise RuntimeError("the simulator\nlost its mind")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(3600)
        return obs, (1e30 if self.how == "reward" else reward), terminated, False, info


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_environment_that_raises_is_named(kind: str) -> None:
    with pytest.raises(EnvironmentFailedError, match=r"env [01] failed at step 9 of episode 0: RuntimeError: the sim"):
        klrl.train("ppo", lambda: Failing("raise", 9), total_timesteps=500, env={"vectorization": kind}, **SMALL)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_environment_that_raises_may_count_as_truncated(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = {"vectorization": kind, "on_error": "restart"}
    run = klrl.train("ppo", lambda: Failing("raise", 9), total_timesteps=500, env=env, **SMALL)
    row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["rollout/ep_len_mean"] == 9
    assert row["health/restarted_episodes"] > 50
    assert "env 1 failed at step 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "said"), [("die", r"the worker of env [01] .*died"), ("hang", "gave no answer for 1 s")]
)
def test_a_worker_that_dies_or_hangs_is_named_and_leaves_nobody(how: str, said: str) -> None:
    envs = make_vector(lambda: Failing(how, 3), 2, EnvConfig(vectorization="async", timeout=1.0))
    pids = [process.pid for process in envs.workers.processes]  # type: ignore[attr-defined]
    envs.reset(seed=0)
    start = time.perf_counter()
    for _ in range(2):
        envs.step(np.zeros(2, np.int64))
    with pytest.raises(EnvironmentFailedError, match=said):
        envs.step(np.zeros(2, np.int64))
    envs.close()
    assert time.perf_counter() - start < 5
    assert not alive(pids)


@pytest.mark.parametrize("agent", ["ppo", "trpo"])
def test_rewards_too_large_for_float32_skip_updates_and_ten_in_a_row_stop(agent: str) -> None:
    raw = {"normalize_reward": False, "normalize_advantage": False}
    small = {key: value for key, value in SMALL.items() if agent == "ppo" or key != "n_epochs"}
    with pytest.raises(NonFiniteError, match="10 updates in a row were skipped, the last as value_loss is"):
        klrl.train(agent, lambda: Failing("reward"), total_timesteps=5000, **raw, **small)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch) -> None:
    write, saves = checkpoint._write, []

    def full(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            saves.append(path)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        klrl.train("ppo", "CartPole-v1", total_timesteps=2000, save_every=256, **SMALL)
    (folder,) = Path("runs").iterdir()
    assert not list((folder / "checkpoints").glob(".writing*"))
    kept = [checkpoint.load(path)["step"] for path in checkpoint.steps(folder / "checkpoints")]
    assert len(kept) == 2
    assert kept[1] < 1000


SIGNALLED: dict[str, dict[str, Any]] = {
    "ppo": {"total_timesteps": 6_000, "n_envs": 2, "env": {"vectorization": "async"}},
    "sac": {"total_timesteps": 1500, "learning_starts": 200, "gradient_steps": 1, "kl": {"every": 100}},
}


@pytest.mark.parametrize(
    ("agent", "name", "code"),
    [
        ("ppo", "SIGINT", 130),
        pytest.param("sac", "SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param("ppo", "SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param("sac", "SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_a_resumed_run_is_as_if_it_had_not_come(agent: str, name: str, code: int) -> None:
    options = {"seed": 1, "quiet": True, "eval_every": 0, **SIGNALLED[agent]}
    train = [sys.executable, "-m", "klrl", "train", agent, "CartPole-v1", *_words(options)]
    process = subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not any(path.stat().st_size for path in Path("runs").glob("*/metrics.jsonl")):
        time.sleep(0.02)
        assert process.poll() is None
    workers = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == process.pid]
    assert len(workers) >= (2 if agent == "ppo" else 0)
    start = time.perf_counter()
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert time.perf_counter() - start < 5
    assert not alive(workers)
    (folder,) = Path("runs").iterdir()
    assert err.splitlines()[-1].startswith("stopped after")
    assert err.split()[-1] == str(folder)
    klrl.resume(folder)
    whole = klrl.train(agent, "CartPole-v1", run_dir="whole", **options)
    assert rows(folder) == rows(whole.folder)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = "import time, klrl\nfrom klrl.envs.make import EnvConfig, make_vector\nfrom test_faults import Failing\n"
    code += "klrl.train('ppo', lambda: Failing('hang', 3), n_envs=2, quiet=True, env={'vectorization': 'sync'})"
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | path, stderr=subprocess.DEVNULL)
    while not list(Path("runs").glob("*/events*")):
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)  # it now hangs inside a step, which the first signal lets finish
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=2) != 0


def _words(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in options.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, dict):
            words += [word for inner, x in value.items() for word in (f"{name}.{inner}", str(x))]
        elif value is True:
            words.append(name)
        else:
            words += [name, *map(str, value if isinstance(value, list) else [value])]
    return words


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_twenty_runs_started_at_once_have_twenty_folders() -> None:
    code = "from klrl.rundir.folder import make_folder; print(make_folder('runs', 'x'))"
    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(lambda _: subprocess.check_output([sys.executable, "-c", code], text=True), range(20)))
    assert len(set(done)) == 20


def test_a_run_that_is_alive_or_done_is_not_resumed() -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=256, **SMALL)
    with pytest.raises(UsageError, match=r"--total-timesteps 200: .*runs/.* has \d+ steps already"):
        klrl.resume(run.folder, total_timesteps=200)
    with pytest.raises(UsageError, match=r"has its 256 steps; --total-timesteps N trains it further"):
        klrl.resume(run.folder)
    code = "from pathlib import Path; from klrl.rundir.folder import locked\n"
    code += f"with locked(Path({str(run.folder)!r})):\n  print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UsageError, match=f"is still running, in process {holder.pid}"):
            klrl.resume(run.folder, total_timesteps=512)
        holder.communicate(b"\n")
    klrl.resume(run.folder, total_timesteps=512)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=1024, save_every=256, **SMALL)
    last = checkpoint.resolve(run.folder)
    (last / "tensors.safetensors").write_bytes(b"")
    assert klrl.load(run.folder) is not None
    assert "is used instead" in capsys.readouterr().err
    with pytest.raises(UsageError, match="damaged"):
        klrl.load(last)
    before = rows(run.folder)
    resumed = klrl.resume(run.folder)
    assert [{**row, "eval": 0} for row in rows(resumed.folder)] == [{**row, "eval": 0} for row in before]


def test_what_links_lead_to_is_left_alone() -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=256, **SMALL)
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    for name in (".writing-config.toml", ".writing-metrics.jsonl", ".writing-report.html", "report.html"):
        (elsewhere / name).write_text("precious")
        (run.folder / name).symlink_to((elsewhere / name).resolve())
    klrl.resume(run.folder, total_timesteps=512)
    report([str(run.folder)], ReportConfig())
    assert all(path.read_text() == "precious" for path in elsewhere.iterdir())
    kept = run.folder / "checkpoints"
    kept.rename("moved")
    kept.symlink_to(Path("moved").resolve())
    Path("moved/.writing-mine").mkdir()
    Path("moved/rows-precious.txt").touch()
    with pytest.raises(UsageError, match="is a link: a run holds its own checkpoints"):
        klrl.resume(run.folder, total_timesteps=1024)
    assert Path("moved/.writing-mine").exists()
    assert Path("moved/rows-precious.txt").exists()


def test_lines_that_are_no_rows_do_not_stop_a_resume_or_a_report() -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=256, **SMALL)
    with (run.folder / "metrics.jsonl").open("ab") as lines:
        for line in (b"5", b"null", b'["step"]', b'{"step": "x"}', b'{"step": 1}', b"[" * 10_000, b"\xff"):
            lines.write(line + b"\n")
    klrl.resume(run.folder, total_timesteps=512)
    assert report([str(run.folder)], ReportConfig(format="md"))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_one_to_the_trainer() -> None:
    options = {"seed": 1, "quiet": True, "eval_every": 0, **SIGNALLED["ppo"]}
    train = [sys.executable, "-m", "klrl", "train", "ppo", "CartPole-v1", *_words(options)]
    process = subprocess.Popen(train, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while not any(path.stat().st_size for path in Path("runs").glob("*/metrics.jsonl")):
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    (folder,) = Path("runs").iterdir()
    klrl.resume(folder)
    assert rows(folder) == rows(klrl.train("ppo", "CartPole-v1", run_dir="whole", **options).folder)


@pytest.mark.parametrize("end", ["del envs; gc.collect(); time.sleep(0.5); left()", ""])
def test_workers_that_nobody_closed_end(end: str) -> None:
    code = f"""
import gc, os, time
from klrl.envs.make import EnvConfig, make_vector
if __name__ == "__main__":
    envs = make_vector("CartPole-v1", 2, EnvConfig(vectorization="async"))
    envs.reset(seed=0)
    pids = [process.pid for process in envs.workers.processes]
    print(*pids, flush=True)
    def left():
        assert not any(process.is_alive() for process in __import__("multiprocessing").active_children())
    {end or "pass"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not alive([int(pid) for pid in done.stdout.split()])


def test_a_replay_may_take_longer_than_a_step() -> None:
    class Slow(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            time.sleep(0.02)
            return super().step(action)

    position = EpisodePosition(0, [np.array([0.0], np.float32)] * 60, np.zeros(3, np.float32), False)
    config = EnvConfig(vectorization="async", timeout=0.8)
    envs = make_vector(lambda: Slow(gym.make("Pendulum-v1")), 1, config, [position])
    envs.reset(seed=0)
    envs.close()


def test_a_run_folder_that_cannot_be_written_is_not_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=256, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:  # as to all but root, whom no mode stops
        if str(path).startswith(str(run.folder)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **named)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="Permission denied; the run's folder must be writable"):
        klrl.resume(run.folder, total_timesteps=512)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_vector_environment_without_parts_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    entry_point = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
    gym.register("VectorOnly-v0", vector_entry_point=entry_point, kwargs={"max_episode_steps": 500})
    run = klrl.train("ppo", "VectorOnly-v0", total_timesteps=500, **SMALL)
    resumed = klrl.resume(run.folder, total_timesteps=1000)
    assert "this environment's episodes cannot be replayed: they begin anew" in capsys.readouterr().err
    steps = [row["step"] for row in rows(resumed.folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 1000
    assert resumed.score.mean > 0


def test_an_environment_that_cannot_be_replayed_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    class Unseeded(gym.ObservationWrapper[Any, Any, Any]):
        def observation(self, observation: Any) -> Any:
            return observation + np.random.default_rng().normal(size=4).astype(np.float32) * 1e-3

    def make() -> Any:
        return Unseeded(gym.make("CartPole-v1"))

    run = klrl.train("ppo", make, total_timesteps=512, **SMALL)
    resumed = klrl.resume(run.folder, env=make, total_timesteps=1024)
    assert "cannot be replayed" in capsys.readouterr().err
    row = json.loads((resumed.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 1 <= row["health/restarted_episodes"] <= 2
