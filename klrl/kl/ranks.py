"""The processes that train one policy together, as sums and rows over all of them; by default there is one alone."""

import io
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from klrl.errors import RankLostError

T = TypeVar("T")


class Ranks:
    """The ranks of a process group of torch.distributed, or this process alone.

    Every method is a collective: all ranks call it, in the same order, and all get the same result, bit for bit. What
    is decided from such results is therefore decided once, and no rank leaves a loop that the others stay in. Raises
    RankLostError where another rank ended, or did not come within ``timeout``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 1800.0) -> None:
        """``group``: such as ``torch.distributed.group.WORLD``, once it is initialised; None is this process alone.
        ``timeout``: seconds that a rank waits for the others."""
        self.group, self.timeout = group, timeout
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.seconds = 0.0
        """The time spent in collectives so far, waiting included."""

    def __reduce__(self) -> Any:
        """What is copied or pickled goes on alone: a group belongs to the processes that formed it."""
        return Ranks, ()

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The sums over all ranks of tensors of one dtype and device: one all-reduce of all of them."""
        if self.size == 1:
            return parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        with self._collective():
            flat = self._reduced(flat)
        pieces = torch.split(flat, [part.numel() for part in parts])
        return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def average(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The means over all ranks, as ``total``."""
        return tuple(part / self.size for part in self.total(*parts)) if self.size > 1 else parts

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """The sums over all ranks of numbers, in float64."""
        if self.size == 1:
            return numbers
        return tuple(self.total(torch.tensor(numbers, dtype=torch.float64))[0].tolist())

    def numbers(self, *own: float) -> list[list[float]]:
        """The numbers of every rank, in order."""
        if self.size == 1:
            return [list(own)]
        with self._collective():
            return torch.stack(self._gathered(torch.tensor(own, dtype=torch.float64))).tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(float(flag))[0] > 0

    def moments(self, values: Any) -> tuple[float, float]:
        """Mean and standard deviation of the numbers in all ranks' arrays, which may differ in length."""
        total, count = self.sum(float(values.sum()), float(len(values)))
        mean = total / max(count, 1)
        return mean, math.sqrt(self.sum(float(((values - mean) ** 2).sum()))[0] / max(count, 1))

    def rows(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, ...], all with this rank's B, with the rows of rank 0, then those of rank 1, and so on."""
        if self.size == 1:
            return columns
        with self._collective():
            own = torch.tensor([float(len(columns[0]))], dtype=torch.float64, device=columns[0].device)
            counts = [int(count) for count in self._gathered(own)]
            return tuple(self._joined(column.contiguous(), counts) for column in columns)

    def _joined(self, column: Tensor, counts: list[int]) -> Tensor:
        padded = column.new_zeros(max(counts), *column.shape[1:])
        padded[: len(column)] = column
        return torch.cat([part[:count] for part, count in zip(self._gathered(padded), counts, strict=True)])

    def objects(self, own: T) -> list[T]:
        """Every rank's object, in order: nested dicts, lists and tuples of tensors and JSON values."""
        if self.size == 1:
            return [own]
        torch.save(own, data := io.BytesIO())
        sent = torch.frombuffer(data.getbuffer(), dtype=torch.uint8)
        ends = itertools.accumulate(int(length) for (length,) in self.numbers(len(sent)))
        parts = torch.tensor_split(self.rows(sent)[0], list(ends)[:-1])
        return [torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True) for part in parts]

    def first(self, own: T) -> T:
        """Rank 0's object, as ``objects``."""
        if self.size == 1:
            return own
        torch.save(own if self.rank == 0 else None, data := io.BytesIO())
        sent = torch.frombuffer(data.getbuffer(), dtype=torch.uint8)
        length = int(self.numbers(len(sent))[0][0])
        flat = sent if self.rank == 0 else torch.zeros(length, dtype=torch.uint8)
        (flat,) = self.total(flat)  # of which only rank 0's is not 0
        return torch.load(io.BytesIO(flat.numpy().tobytes()), weights_only=True)

    @contextmanager
    def patient(self, seconds: float = 1800.0) -> Iterator[None]:
        """Wait for the others that long in the block, where some read or write much and others nothing."""
        before, self.timeout = self.timeout, max(seconds, self.timeout)
        try:
            yield
        finally:
            self.timeout = before

    def _reduced(self, flat: Tensor) -> Tensor:
        """The sum over all ranks of a vector that may be overwritten."""
        self._wait(dist.all_reduce(flat, group=self.group, async_op=True))
        return flat

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._wait(dist.all_gather(parts, part, group=self.group, async_op=True))
        return parts

    def _wait(self, work: Any) -> None:
        work.wait(timedelta(seconds=self.timeout))

    @contextmanager
    def _collective(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RankLostError:
            raise
        except RuntimeError as problem:
            raise RankLostError(" ".join(str(problem).split())) from None
        finally:
            self.seconds += time.perf_counter() - start


ALONE = Ranks()
"""This process, where no others train with it."""
