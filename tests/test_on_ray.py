"""Runs and sweeps on Ray, as processes of a cluster on this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks import ENV, MORE, SCRIPTS, SMALL, klrl, same, saved, start

from klrl.rundir.history import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SWEEP = [
    "sweep",
    "ppo",
    "CartPole-v1",
    "--seeds",
    "1",
    "--on",
    "ray",
    "--run-dir",
    "s",
    "--set",
    "total_timesteps=30000",
    "final_episodes=4",
    "eval_every=2",
    "eval_episodes=4",
    "learning_rate=1e-3,3e-4,1e-5,1e-6,2e-3,1e-7",
]


@pytest.fixture(autouse=True)
def _needs_ray() -> None:
    pytest.importorskip("ray")


def test_a_cluster_of_two_nodes_that_loses_a_worker_ends_with_the_run_of_one_that_lost_none() -> None:
    whole = klrl("train", *SMALL["ppo"], *MORE, "--run-dir", "whole")
    assert whole[0] == 0, whole
    command = [sys.executable, SCRIPTS / "two_nodes.py", "lost", "kill", *SMALL["ppo"], *MORE]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    folders = saved("whole"), saved("lost")
    assert same(*folders) == []
    assert len(list(Path("lost").iterdir())) == 1
    steps = [[row["step"] for _, row in read_rows(folder / "metrics.jsonl")] for folder in folders]
    assert steps[0] == steps[1]
    ours, theirs = ((folder / "config.toml").read_text() for folder in folders)
    assert re.sub("run_dir = .*", "", ours) == re.sub("run_dir = .*", "", theirs)


def test_a_sweep_is_interrupted_and_gone_on_with_and_its_poor_trials_are_stopped_early() -> None:
    process = start(*SWEEP)
    for _ in range(1200):
        if list(Path("s").glob("*/*/*/metrics.jsonl")):
            break
        time.sleep(0.1)
    time.sleep(2)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on" in err
    code, out, err = klrl(*SWEEP, "--scheduler", "asha", timeout=400)
    assert code == 0, err
    assert len(re.findall(r"seed 0  stopped .* stopped early at", out)) >= 1
    assert len(re.findall("seed 0  finished", out)) >= 1
    assert len(list(Path("s").glob("*/*/ppo-*"))) == 6  # a run each: those that had begun went on
    code, out, _ = klrl(*SWEEP, "--scheduler", "asha", timeout=400)
    assert code == 0
    assert "running" not in out
