"""Ranks: several processes learn as one would, decide together, and end and go on together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import content, differences

from klrl.kl import ALONE, Ranks
from klrl.rundir.trees import difference, restored

SCRIPTS = Path(__file__).parent / "ranks"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL: dict[str, list[str]] = {
    "ppo": ["ppo", "Pendulum-v1", "--n-envs", "4", "--n-steps", "64", "--total-timesteps", "6000"],
    "trpo": ["trpo", "Pendulum-v1", "--n-envs", "4", "--n-steps", "64", "--total-timesteps", "6000"],
    "sac": [
        "sac",
        "Pendulum-v1",
        "--n-envs",
        "2",
        "--hidden-sizes",
        "16",
        "16",
        "--batch-size",
        "32",
        "--kl.every",
        "100",
        "--learning-starts",
        "300",
        "--gradient-steps",
        "1",
        "--total-timesteps",
        "3000",
    ],
}
MORE = [
    "--final-episodes",
    "4",
    "--eval-episodes",
    "3",
    "--eval-every",
    "4",
    "--save-every",
    "1000",
    "--processes",
    "2",
    "--quiet",
]


def torchrun(script: str, processes: int, tmp_path: Path) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, SCRIPTS / script, tmp_path / "found.json"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text())


def start(*arguments: str, **more: Any) -> "subprocess.Popen[str]":
    """The command ``klrl``, whose output is kept."""
    command = [sys.executable, "-m", "klrl", *arguments]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def klrl(*arguments: str, timeout: float = 120) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def ranks_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """The process ids of the ranks, in order."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    ranks = {}
    for pid in map(int, found.stdout.split()):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        ranks |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def saved(run_dir: str, step: int = 1) -> Path:
    """The folder of the only run, once it has a checkpoint of that step or a later one."""
    for _ in range(600):
        for path in Path(run_dir).glob("*/checkpoints/step-*"):
            if int(path.name[5:]) >= step:
                return path.parent.parent
        time.sleep(0.1)
    raise AssertionError("no checkpoint")


def same(a: Path, b: Path) -> list[str]:
    """Where two runs' last checkpoints differ, but for times."""
    return [line for line in differences(content(a), content(b)) if "time" not in line.partition(":")[0]]


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return torchrun("equal.py", 2, tmp_path_factory.mktemp("equal"))  # type: ignore[no-any-return]


def test_two_ranks_make_the_updates_of_one_process_with_all_their_environments(gaps: dict[str, float]) -> None:
    assert len(gaps) == 48
    # TRPO's conjugate gradient amplifies the rounding of float32 sums whose order differs.
    assert {name: gap for name, gap in gaps.items() if gap > (1e-5 if name.startswith("trpo ") else 1e-6)} == {}


def test_a_rank_that_is_over_the_limit_alone_leaves_no_loop_that_the_other_stays_in(tmp_path: Path) -> None:
    found = torchrun("decided.py", 2, tmp_path)
    assert found["alone"] == ["waits", "left"]  # as in peers: rank 1 broke out, rank 0 waits for its gradient
    assert found["ranks"][0] == found["ranks"][1]
    for way in ("memory", "network"):
        together = found["ranks"][0][way]["together"]
        assert together["0.02"][0] == 0
        assert together["0.02"][1] < 0.02 < together["0.02"][2]
        assert together["0.005"][0] == 2
        assert together["0.005"][1] > 0.005
        assert found["ranks"][0][way]["uneven"] == {
            "mean": 5.0,
            "p95": 11.0,
            "max": 11.0,
            "masked": 3.0,
            "masked max": 6.0,
            "moments": [5.0, pytest.approx(15.5**0.5)],
            "rows": [1.0, 2.0, 6.0, 11.0, 90.0],
            "objects": [11.0, 90.0],
            "first": 5,
            "none": [0, 3],
            "few": [[0.0, 0.0]],
            "copied": [1, 1],
            "large": 6_000_000.0,
        }


def test_one_process_alone_reduces_nothing() -> None:
    assert (ALONE.size, ALONE.rank) == (1, 0)
    assert Ranks().numbers(3.0, 4.0) == [[3.0, 4.0]]
    assert Ranks().first("x") == "x"
    assert Ranks().any(False) is False


def test_a_tree_is_had_back_from_another_and_its_difference() -> None:
    one = {"a": {"x": 1, "y": [1, 2]}, "b": {}, "c": None, "d": 1.0}
    for other in ({"a": {"x": 2, "y": [1, 2]}, "b": {"z": 1}, "c": {"q": 3}, "d": 1}, one, {"a": 5}):
        assert restored(one, difference(other, one)) == other
        assert type(restored(one, difference(other, one)).get("d")) is type(other.get("d"))
    assert difference(one, one) == {}


@pytest.mark.parametrize(
    "agent", ["ppo", pytest.param("trpo", marks=pytest.mark.slow), pytest.param("sac", marks=pytest.mark.slow)]
)
def test_a_run_that_lost_a_rank_is_resumed_bit_for_bit_and_with_another_number_of_ranks(agent: str) -> None:
    whole = klrl("train", *SMALL[agent], *MORE, "--run-dir", "whole")
    assert whole[0] == 0, whole
    process = start("train", *SMALL[agent], *MORE, "--run-dir", "killed")
    folder = saved("killed", 500)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "klrl: rank 1 was ended by SIGKILL\n"
    code, _, err = klrl("resume", str(folder))
    assert (code, err) == (0, "")
    assert same(saved("whole"), folder) == []
    code, _, err = klrl("resume", str(folder), "--processes", "1", "--total-timesteps", "8000")
    assert code == 0
    assert err == "klrl: this run had 2 ranks, and goes on with 1: its episodes begin anew\n"


@pytest.mark.parametrize("whom", ["rank", pytest.param("launcher", marks=pytest.mark.slow)])
def test_sigterm_to_a_rank_or_to_the_launcher_saves_once_and_exits_with_143(whom: str) -> None:
    process = start("train", *SMALL["ppo"], *MORE, "--total-timesteps", "1000000", "--run-dir", "stopped")
    folder = saved("stopped")
    os.kill(ranks_of(process)[1] if whom == "rank" else process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert err.startswith("stopped after ")
    assert str(folder.name) in err
    step = int(err.split()[2].replace(",", ""))
    assert (folder / "checkpoints" / f"step-{step:012d}").is_dir()


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_and_ended() -> None:
    process = start(
        "train", *SMALL["ppo"], *MORE, "--total-timesteps", "1000000", "--rank-timeout", "3", "--run-dir", "h"
    )
    saved("h")
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert time.monotonic() - stopped < 25
    assert err == "klrl: rank 1 did not come to where the others waited for it, and was ended\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


FAILS = """
import gymnasium as gym, os, klrl
class Fails(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    steps = 0
    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}
    def step(self, action):
        self.steps += 1
        if self.steps == 500 and os.environ["RANK"] == "1":
            raise RuntimeError("the motor is off")
        return self.observation_space.sample(), 1.0, self.steps % 50 == 0, False, {}
gym.register("Fails-v0", Fails)
class Forgets(klrl.PPO):
    def total(self, compute, losses, *groups):
        return compute()  # of this rank alone
"""


def test_what_ends_one_rank_ends_all_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("fails.py").write_text(FAILS)
    monkeypatch.setitem(ENV, "PYTHONPATH", str(Path.cwd()))
    more = [*MORE, "--import", "fails", "--n-envs", "2", "--n-steps", "32", "--run-dir", "f"]
    code, _, err = klrl("train", "ppo", "Fails-v0", *more)
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("klrl: rank 1: env 2 failed at step") or err.startswith("klrl: rank 1: env 3 failed at step")
    assert "the motor is off" in err
    code, _, err = klrl("train", "forgets", "Pendulum-v1", *more)
    assert code == 1
    assert err.count("\n") == 1
    assert "rank 1 has other weights than rank 0 after update 1" in err
    code, _, err = klrl("train", "ppo", "Pendulum-v1", *MORE, "--n-steps", "1")
    assert code == 2
    assert err == "klrl: --n-steps must be at least 2, got 1\n"


@pytest.mark.slow
def test_torchrun_restarts_go_on_with_the_run() -> None:
    whole = klrl("train", *SMALL["ppo"], *MORE, "--run-dir", "whole")
    assert whole[0] == 0, whole
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    words = ["-m", "klrl", "train", *SMALL["ppo"], *MORE, "--run-dir", "again"]
    process = subprocess.Popen([*command, *words], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = saved("again", 500)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(list(Path("again").iterdir())) == 1
    assert same(saved("whole"), folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 8])
def test_more_ranks_than_cores_train(processes: int) -> None:
    code, out, err = klrl(
        "train", *SMALL["ppo"], *MORE, "--processes", str(processes), "--n-envs", "1", "--run-dir", "m"
    )
    assert (code, err) == (0, "")
    assert "evaluation" in out
