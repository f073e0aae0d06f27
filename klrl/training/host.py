"""Ranks of one machine, which reduce through shared memory: some ten times as fast as through its network stack."""

import contextlib
import mmap
import os
import platform
import signal
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from klrl.config import cores
from klrl.errors import RankLostError
from klrl.kl import Ranks

OVERDUE: Any = getattr(signal, "SIGXCPU", signal.SIGTERM)  # Windows has none
"""What ends a rank that the others waited for in vain; whoever started it can tell that from other ends."""
_BYTES = 2**21  # of a rank's share in one collective; what is longer goes by torch.distributed
_HEAD = 4096
_SPINS = 200  # some 0.2 ms, after which a waiting rank leaves its core to others


class HostRanks(Ranks):
    """The ranks of a group whose processes run on one machine, in a file that all of them map.

    In the n-th collective each rank writes its share, and then n where the others see it; once all have, each adds the
    shares up, in rank order and in float64. Two places take turns for the shares, so that nobody overwrites what
    another still reads. A store is seen after those before it, which x86 processors promise.
    """

    def __init__(self, group: dist.ProcessGroup, path: str) -> None:
        """``path``: a file of ``size_of`` bytes that is zero, whose name may go once all ranks are made."""
        super().__init__(group)
        self.turn, self.eager = 0, self.size <= cores()
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size_of(self.size))
        self._came = np.frombuffer(self._map, np.int64, self.size)
        """The collective that each rank has come to."""
        self._pids = np.frombuffer(self._map, np.int64, self.size, 8 * self.size)
        self._pids[self.rank] = os.getpid()
        self._shares = np.frombuffer(self._map, np.uint8, offset=_HEAD).reshape(2, self.size, _BYTES)

    def _reduced(self, flat: Tensor) -> Tensor:
        if flat.device.type != "cpu" or flat.nbytes > _BYTES:
            return super()._reduced(flat)
        shares = self._exchanged(flat.numpy())
        total = np.add.reduce(shares, 0, dtype=np.float64)
        return torch.from_numpy(total.astype(shares.dtype, copy=False))

    def _gathered(self, part: Tensor) -> list[Tensor]:
        if part.device.type != "cpu" or part.nbytes > _BYTES or part.dtype == torch.bool:
            return super()._gathered(part)
        shares = self._exchanged(part.reshape(-1).numpy())
        return [torch.from_numpy(share.copy()).view(part.shape) for share in shares]

    def _exchanged(self, own: Any) -> Any:
        """Every rank's array [size, n], until the collective after the next."""
        self.turn += 1
        place = self._shares[self.turn % 2]
        place[self.rank, : own.nbytes].view(own.dtype)[:] = own
        self._came[self.rank] = self.turn
        self._meet()
        return place[:, : own.nbytes].view(own.dtype)

    def _meet(self) -> None:
        """Wait until all ranks have come to this collective."""
        came, turn = self._came, self.turn
        for _ in range(_SPINS if self.eager else 1):
            if came.min() >= turn:
                return
        begun = checked = time.monotonic()
        while came.min() < turn:
            time.sleep(0.0 if self.eager and time.monotonic() - begun < 0.005 else 0.0002)
            if (now := time.monotonic()) - checked > 0.1:
                checked = now
                late = [int(rank) for rank in np.flatnonzero(came < turn)]
                gone = [rank for rank in late if not _runs(int(self._pids[rank]))]
                if gone:
                    raise RankLostError(f"{_named(gone)} ended")
                if now - begun > self.timeout:
                    for rank in late:
                        _end(int(self._pids[rank]))
                    raise RankLostError(f"{_named(late)} did not come within {self.timeout:g} s")


def size_of(ranks: int) -> int:
    """The bytes that so many ranks share."""
    return _HEAD + 2 * ranks * _BYTES


def on_one_machine(group: dist.ProcessGroup) -> Ranks:
    """The ranks of a group on one machine: by its memory, where its processor keeps the order of stores and there is
    room; else by torch.distributed."""
    network, path = Ranks(group), ""
    known = platform.machine().lower() in ("x86_64", "amd64") and 16 * network.size <= _HEAD
    if network.rank == 0 and known:
        handle, path = tempfile.mkstemp(prefix="klrl-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        try:
            os.posix_fallocate(handle, 0, size_of(network.size))  # a write beyond what there is would end the process
        except (OSError, AttributeError):  # AttributeError: macOS and Windows cannot set room aside
            os.unlink(path)
            path = ""
        os.close(handle)
    path = network.first(path)
    ranks = HostRanks(group, path) if path else network
    network.sum(1)  # all have it, so that its name may go: no kill leaves anything behind
    if network.rank == 0 and path:
        os.unlink(path)
    return ranks


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _end(pid: int) -> None:
    """End a process that may be beyond asking, as it is stopped or in a library's code."""
    for signum in (OVERDUE, getattr(signal, "SIGCONT", OVERDUE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
