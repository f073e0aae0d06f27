"""When the ranks of a run hear of each other while each steps its environments: of steps, signals and who is done."""

import math
import os
import signal
import time
import zlib

import torch
from torch import nn

from klrl.agents.base import Agent
from klrl.console import FOLLOW
from klrl.errors import RanksDifferError
from klrl.kl import Ranks
from klrl.training.episodes import Episodes
from klrl.training.signals import Signals

_SECONDS = 0.5  # between two meetings, about


class Meetings:
    """Counts this rank's calls of ``step``; after as many of them on each rank, all meet.

    How many, the last meeting decided: what the slowest rank does in half a second, but no more than may lie before
    the run's last step, so that it ends at the same step however fast its ranks were. A process alone meets itself at
    each call, or where counting steps waits for a device, after ``every`` calls.
    """

    def __init__(
        self, ranks: Ranks, signals: Signals, episodes: Episodes, n_envs: int, total_timesteps: int, every: int = 1
    ) -> None:
        self.ranks, self.signals, self.episodes = ranks, signals, episodes
        self.n_envs, self.total_timesteps = n_envs * ranks.size, total_timesteps
        self.steps = 0
        """Environment steps of all ranks, as of the last meeting."""
        self._follows = ranks.size > 1 or FOLLOW in os.environ
        self._parent, self._count, self._due = os.getppid(), -1, every
        self._since, self._pace = time.monotonic(), 0.0

    def step(self) -> None:
        """Be called before each vector step: meet where it is time."""
        self._count += 1
        if self._count >= self._due:
            self.meet()
            self._count = 0

    def meet(self, done: bool = False, check: bool = True) -> bool:
        """Meet the others; whether all are ``done``. Raises Interrupted on all ranks where one has had a signal, unless
        that is not to be checked: then the next step's meeting does."""
        if self._follows and os.getppid() != self._parent and not self.signals.signum:
            self.signals.signum = signal.SIGTERM  # whoever started this is gone, and would have ended it
        everyone = [[self.episodes.steps, self.signals.signum, 0.0, done]]
        if self.ranks.size > 1:
            if self._count > 0:
                self._pace = (time.monotonic() - self._since) / self._count
            everyone = self.ranks.numbers(self.episodes.steps, self.signals.signum, self._pace, done)
        steps, signals, paces, ends = zip(*everyone, strict=True)
        self.steps, stop = int(sum(steps)), int(max(signals))
        if stop:  # a signal that came while the ranks met is not among theirs, and is told at the next meeting
            self.signals.signum = stop
            if check:
                self.signals.check()
        if self.ranks.size > 1:
            left = math.ceil((self.total_timesteps - self.steps) / self.n_envs)
            known = min(2 * self._due, int(_SECONDS / max(*paces, 1e-6)))  # at first, a step's time is not known
            self._due = 1 if stop else max(1, min(left, known))
        self._count, self._since = -1, time.monotonic()  # the next call comes before a step, not after one
        return all(ends)


def compare_weights(ranks: Ranks, agent: Agent, update: int) -> None:
    """Raise RanksDifferError where an update left other weights on a rank than on rank 0."""
    if ranks.size > 1:
        modules = [part for part in vars(agent).values() if isinstance(part, nn.Module)]
        weights = torch.cat([weight.detach().flatten() for part in modules for weight in part.parameters()]).cpu()
        sums = [found for (found,) in ranks.numbers(zlib.crc32(weights.numpy().tobytes()))]
        if odd := [rank for rank, found in enumerate(sums) if found != sums[0]]:
            raise RanksDifferError(
                f"rank {odd[0]} has other weights than rank 0 after update {update}: an agent of one's own has to sum "
                "its gradients over agent.ranks"
            )
