"""When the ranks of a run hear of each other while each steps its environments: of steps, signals and who is done."""

import math
import os
import signal
import time
import zlib

import torch
from torch import nn

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
    each call.
    """

    def __init__(self, ranks: Ranks, signals: Signals, episodes: Episodes, n_envs: int, total_timesteps: int) -> None:
        self.ranks, self.signals, self.episodes = ranks, signals, episodes
        self.n_envs, self.total_timesteps = n_envs * ranks.size, total_timesteps
        self.steps = 0
        """Environment steps of all ranks, as of the last meeting."""
        self._follows = ranks.size > 1 or FOLLOW in os.environ
        self._parent, self._count, self._due, self._since = os.getppid(), 0, 1, time.monotonic()

    def step(self) -> None:
        """Count a vector step, and meet where it is time."""
        self._count += 1
        if self._count >= self._due:
            self.meet()

    def meet(self, done: bool = False) -> bool:
        """Meet the others; whether all are ``done``. Raises Interrupted on all ranks where one has had a signal."""
        if self._follows and os.getppid() != self._parent and not self.signals.signum:
            self.signals.signum = signal.SIGTERM  # whoever started this is gone, and would have ended it
        if self.ranks.size == 1:
            self.steps = self.episodes.steps
            self.signals.check()
            return done
        pace = (time.monotonic() - self._since) / self._count if self._count else 0.0
        found = self.ranks.numbers(self.episodes.steps, self.signals.signum, pace, done)
        everyone = list(zip(*found, strict=True))
        self.steps, slowest = int(sum(everyone[0])), max(everyone[2])
        self.signals.signum = int(max(everyone[1]))
        self.signals.check()
        left = math.ceil((self.total_timesteps - self.steps) / self.n_envs)
        self._due = max(1, min(left, int(_SECONDS / max(slowest, 1e-6))))
        self._count, self._since = 0, time.monotonic()
        return all(everyone[3])


def compare_weights(ranks: Ranks, policy: nn.Module, update: int) -> None:
    """Raise RanksDifferError where an update left other weights on a rank than on rank 0."""
    if ranks.size > 1:
        weights = torch.cat([weight.detach().flatten() for weight in policy.parameters()]).cpu()
        sums = [found for (found,) in ranks.numbers(zlib.crc32(weights.numpy().tobytes()))]
        if odd := [rank for rank, found in enumerate(sums) if found != sums[0]]:
            raise RanksDifferError(
                f"rank {odd[0]} has other weights than rank 0 after update {update}: an agent of one's own has to sum "
                "its gradients over agent.ranks"
            )
