"""Environments where they take no step: being made, with what they print and start, and being closed."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import gymnasium as gym
import pytest
from test_answers import SMALL, Odd

import klrl
from klrl.envs import guards, wrappers
from klrl.envs.make import EnvConfig, make_vector


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("how", ["close raises", "close hangs"])
def test_a_close_that_fails_or_hangs_is_one_line_and_the_run_is_done(
    how: str, kind: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrappers, "CLOSE_SECONDS", 0.2)
    envs = make_vector(lambda: Odd(how), 2, EnvConfig(vectorization=kind))
    capfd.readouterr()
    envs.reset(seed=0)
    start = time.perf_counter()
    envs.close()
    assert time.perf_counter() - start < 3
    said = "OSError: port is gone" if how == "close raises" else "TimeoutError: no answer for 0.2 s"
    assert sorted(capfd.readouterr().err.splitlines()) == [f"klrl: env {i} failed at close: {said}" for i in range(2)]


def test_a_worker_that_nothing_ends_is_killed_and_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrappers, "CLOSE_SECONDS", 0.1)
    envs = make_vector(lambda: Odd("close never ends"), 1, EnvConfig(vectorization="async"))
    capfd.readouterr()
    envs.close()
    assert capfd.readouterr().err == "klrl: env 0 did not close: its worker was killed\n"


def test_an_alarm_of_someone_elses_goes_on() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    kept = signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(TimeoutError, match=r"no answer for 0\.05 s"), guards.time_limit(0.05):
            time.sleep(5)
        time.sleep(0.2)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *kept)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_environments_print_while_they_are_made_is_shown_once(
    kind: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guards._said.clear()
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))  # as it is but for pytest
    for _ in range(2):
        envs = make_vector(lambda: Odd("warns"), 3, EnvConfig(vectorization=kind))
        envs.reset(seed=0)
        envs.close()
    assert sorted(capfd.readouterr().err.splitlines()) == ["and another", "the simulator has a remark"]


class Logging(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that sets up logging, and starts a process, where it is made."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.log = logging.Logger("sim")
        self.log.addHandler(logging.StreamHandler())
        code = "import sys, time; time.sleep(0.5); sys.stderr.write('the server has a remark')"
        self.server = subprocess.Popen([sys.executable, "-c", code])


def test_what_an_environment_starts_while_it_is_made_can_still_be_heard(capfd: pytest.CaptureFixture[str]) -> None:
    guards._said.clear()
    with guards.each_line_once():
        env = Logging()
    env.log.warning("the sensor is lost")
    env.server.wait()
    time.sleep(0.2)
    assert sorted(capfd.readouterr().err.splitlines()) == ["the sensor is lost", "the server has a remark"]


def test_a_vector_environment_that_cannot_be_closed_is_evaluated_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    class Stuck(CartPoleVectorEnv):
        def close(self, **_: Any) -> None:
            raise RuntimeError("boom")

    gym.register("Stuck-v0", vector_entry_point=Stuck, kwargs={"max_episode_steps": 50})
    run = klrl.train("ppo", "Stuck-v0", total_timesteps=100, **SMALL)
    assert len(run.score.returns) == 20
    # Those of training, and those of the evaluation.
    assert capsys.readouterr().err == 2 * "klrl: env Stuck-v0 failed at close: RuntimeError: boom\n"


def test_a_library_may_print_much_while_it_holds_the_interpreter() -> None:
    code = (
        "import ctypes; from klrl.envs import guards\n"
        "with guards.each_line_once(): ctypes.PyDLL(None).write(2, b'a remark\\n' * 50_000, 450_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20, check=True)
    assert done.stderr == b"a remark\n"


def test_threads_that_make_environments_at_once_leave_stderr_as_it_was() -> None:
    before, inside, done = os.fstat(2), threading.Event(), threading.Event()

    def other() -> None:
        with guards.each_line_once():
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    with guards.each_line_once(), guards.each_line_once():
        thread.start()
        inside.wait(5)
    done.set()
    thread.join()
    assert os.path.samestat(os.fstat(2), before)
    with guards.each_line_once():
        assert not os.path.samestat(os.fstat(2), before), "and the next one guards again"
