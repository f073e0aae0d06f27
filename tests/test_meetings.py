"""When ranks meet, and what a signal that comes in an update does to it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK
from test_ranks import same

import klrl
from klrl.errors import Interrupted
from klrl.kl import Ranks
from klrl.rundir.history import read_rows
from klrl.training.episodes import Episodes
from klrl.training.meeting import Meetings
from klrl.training.signals import Signals


class Two(Ranks):
    """Two ranks of which the other steps as this one does, at ``pace`` seconds a step, and may have had a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.pace, self.signum, self.met = 2, 0.0, 0, 0

    def numbers(self, *own: float) -> list[list[float]]:
        self.met += 1
        steps, signum, pace, done = own
        return [list(own), [steps, max(signum, self.signum), max(self.pace, pace), done]]


def meetings(total: int = 10**6) -> tuple[Two, Episodes, Meetings]:
    ranks, episodes = Two(), Episodes(4)
    return ranks, episodes, Meetings(ranks, Signals(), episodes, 4, total)


def test_ranks_meet_about_twice_a_second_whatever_a_step_takes() -> None:
    for pace, least, most in ((0.0, 8, 15), (0.001, 8, 16), (0.1, 180, 260), (2.0, 990, 1001)):
        ranks, _, meeting = meetings()
        ranks.pace = pace
        for i in range(1000):
            meeting.step()
            if i % 200 == 100:
                meeting.meet(check=False)  # as after an update, whose next step comes at once
        assert least <= ranks.met <= most, (pace, ranks.met)


def test_ranks_end_at_the_first_step_at_or_beyond_the_total_however_fast_they_are() -> None:
    for pace in (0.0, 0.2):
        ranks, episodes, meeting = meetings(total=1000)
        ranks.pace = pace
        count = 0
        while True:
            meeting.step()
            if meeting.steps >= 1000:
                break
            episodes.steps, count = episodes.steps + 4, count + 1
        assert count == 125


def test_a_signal_of_another_rank_is_everyones_at_the_next_meeting() -> None:
    ranks, _, meeting = meetings()
    ranks.signum = signal.SIGTERM
    meeting.meet(check=False)
    meeting.step()
    with pytest.raises(Interrupted) as stop:
        meeting.step()
    assert stop.value.signum == signal.SIGTERM


def test_a_signal_that_comes_while_ranks_meet_is_everyones_at_the_meeting_after() -> None:
    ranks, _, meeting = meetings()

    def numbers(*own: float) -> list[list[float]]:
        meeting.signals.signum = signal.SIGTERM  # once this rank has said that it had none
        return Two.numbers(ranks, *own)

    ranks.numbers = numbers  # type: ignore[method-assign]
    meeting.meet()
    with pytest.raises(Interrupted):
        meeting.meet()


@pytest.mark.parametrize("when", [3, 6])
def test_a_signal_in_an_update_loses_nothing_of_it(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = klrl.train("ppo", "CartPole-v1", run_dir="whole", **QUICK)
    update = klrl.PPO.update

    def stopped(self: klrl.PPO, *args: Any) -> Any:
        if self.n_updates + 1 == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(klrl.PPO, "update", stopped)
        with pytest.raises(Interrupted):
            klrl.train("ppo", "CartPole-v1", run_dir="stopped", **QUICK)
    (folder,) = Path("stopped").iterdir()
    klrl.resume(folder)
    assert same(whole.folder, folder) == []
    steps = [[row["step"] for _, row in read_rows(path / "metrics.jsonl")] for path in (whole.folder, folder)]
    assert steps[0] == steps[1]
