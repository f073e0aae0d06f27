"""Kills of a random rank at random moments: each end is named, none hangs, each run goes on bit for bit."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_ranks import MORE, SMALL, klrl, ranks_of, same, saved, start


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [20])
def test_kills_of_random_ranks_are_named_and_resumed_bit_for_bit(count: int) -> None:
    chance, exact = random.Random(1), 0
    # Enough steps for some seconds on fast machines, too.
    small, more = [*SMALL["ppo"][:-1], "12000"], [*MORE, "--save-every", "500"]
    assert klrl("train", *small, *more, "--run-dir", "whole")[0] == 0
    for i in range(count):
        process = start("train", *small, *more, "--run-dir", f"run{i}")
        folder = saved(f"run{i}")
        time.sleep(chance.random() * 2)
        rank, ranks = chance.randrange(2), ranks_of(process)
        if len(ranks) < 2:  # it was done already
            process.communicate(timeout=60)
            continue
        os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:  # the rank had nothing left to do
            continue
        assert (process.returncode, err) == (1, f"klrl: rank {rank} was ended by SIGKILL\n")
        assert time.monotonic() - killed < 30
        code, _, err = klrl("resume", str(folder))
        assert code == 0 or "has its 12,000 steps" in err, err
        assert same(saved("whole"), folder) == []
        exact += 1
        print(f"kill {i + 1}: rank {rank}, resumed", flush=True)
    print(f"{exact} of {count} were killed before their end, named, and resumed exactly")
    assert exact >= 0.8 * count
