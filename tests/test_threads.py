"""NumPy's threads during an update, and after it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import train
from threadpoolctl import threadpool_info, threadpool_limits

from klrl.agents.fused import FusedCritic
from klrl.agents.ppo import PPOConfig
from klrl.agents.trpo import TRPOConfig


@pytest.mark.parametrize("config", [PPOConfig(n_steps=8, n_epochs=1), TRPOConfig(n_steps=8, n_critic_updates=1)])
def test_numpy_takes_no_more_threads_in_an_update_than_torch_may(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    seen: list[int] = []
    gradient = FusedCritic.gradient
    monkeypatch.setattr(FusedCritic, "gradient", lambda *args: seen.extend(threads()) or gradient(*args))
    with threadpool_limits(3, user_api="blas"):
        train(config, "CartPole-v1", 1)
        assert set(seen) == {torch.get_num_threads()} == {1}
        assert set(threads()) == {3}, "as it was"
    seen.clear()
    torch.set_num_threads(2)
    train(config, "CartPole-v1", 1)
    assert set(seen) == {1}, "no more than there were"


OVERLAPPING = """
import os
os.environ.pop("OPENBLAS_NUM_THREADS", None)
import numpy, torch
from threading import Event, Thread
from threadpoolctl import threadpool_info
from klrl.policies.threads import on_torchs_threads

def threads():
    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

def one(enters, leaves):
    with on_torchs_threads:
        enters.set()
        leaves.wait(10)
        seen.append(threads())

torch.set_num_threads(1)
before, seen, events = threads(), [], [Event() for _ in range(4)]
pair = [Thread(target=one, args=(events[i], events[2 + i])) for i in range(2)]
for i in range(2):
    pair[i].start()
    events[i].wait(10)
for i in range(2):  # who came first leaves first
    events[2 + i].set()
    pair[i].join()
assert seen == [1, 1], seen
assert threads() == before, (threads(), before)
"""


def test_updates_in_several_threads_leave_numpys_threads_as_they_were() -> None:
    # In a process of its own: once the main thread has set OpenBLAS's threads, as these tests do, no other can.
    subprocess.run([sys.executable, "-c", OVERLAPPING], check=True)
