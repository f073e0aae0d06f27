"""A loop's state on all ranks, as one checkpoint: what they share once, what each has of its own, their replay rows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klrl.agents.base import State
from klrl.buffers.protocol import Buffer
from klrl.kl import Ranks
from klrl.rundir import checkpoint
from klrl.rundir.trees import difference, restored


class Sent:
    """A rank's new rows, on their way to the one that saves."""

    def __init__(self, size: int, written: int, new: dict[str, Tensor]) -> None:
        self.size, self.written, self.new = size, written, new

    def rows(self, start: int) -> dict[str, Tensor]:
        """Those from ``start`` on, as ``checkpoint.first_unsaved`` had it."""
        return self.new


def save(
    folder: Path,
    step: int,
    state: State,
    score: float | None,
    buffer: Buffer,
    saved_rows: list[dict[str, Any]],
    ranks: Ranks,
) -> None:
    """Save the states of all ranks: rank 0 writes its own, and of the others what differs from it."""
    with ranks.patient():
        rows: list[Any] = [buffer]
        if ranks.size > 1:
            start = checkpoint.first_unsaved(buffer, checkpoint.rows_of(ranks.rank, saved_rows))
            new = buffer.rows(start) if ranks.rank and start < buffer.written else {}
            own = difference(state, ranks.first(state))
            found: list[Any] = ranks.objects((own, buffer.size, buffer.written, new))[1:]
            state = {**state, "ranks": {str(rank): theirs for rank, (theirs, *_) in enumerate(found, 1)}}
            rows += [Sent(*sent) for _, *sent in found]
        if ranks.rank == 0:
            checkpoint.save(folder, step, state, score, rows, saved_rows)
            checkpoint.prune(folder)
        saved_rows[:] = ranks.first(saved_rows)


def saved_processes(state: State) -> int:
    """How many ranks saved a checkpoint's state."""
    return 1 + len(state.get("ranks", {}))


def of_rank(state: State, rank: int) -> State:
    """A rank's state from a checkpoint's."""
    others = state.get("ranks", {})
    mine: State = {key: part for key, part in state.items() if key != "ranks"}
    return restored(mine, others[str(rank)]) if rank else mine


def put_rows(buffer: Buffer, source: Path, entries: list[dict[str, Any]], ranks: Ranks) -> None:
    """Give each rank its own replay rows, which rank 0 reads."""
    for rank in range(ranks.size):
        mine = checkpoint.rows_of(rank, entries)
        for entry in mine:
            read = list(checkpoint.load_rows(source, [entry])) if ranks.rank == 0 else []
            for start, rows in ranks.first(read):
                if rank == ranks.rank:
                    buffer.put_rows(start, rows)


def deal_rows(buffer: Buffer, source: Path, state: State, entries: list[dict[str, Any]], ranks: Ranks) -> None:
    """Deal all replay rows of a run out to another number of ranks, oldest first, a row to each in turn."""
    if not entries:
        return
    buffers = [of_rank(state, rank)["loop"]["buffer"] for rank in range(saved_processes(state))]
    dealt: dict[str, Tensor] = {}
    if ranks.rank == 0:
        of_ranks: list[dict[str, Tensor]] = []
        for rank, saved in enumerate(buffers):
            parts = [part for _, part in checkpoint.load_rows(source, checkpoint.rows_of(rank, entries))]
            of_ranks.append({name: _joined(name, parts) for name in parts[0]})
            of_ranks[-1] = {name: _last(name, rows, saved["size"]) for name, rows in of_ranks[-1].items()}
        ages = torch.cat([torch.arange(-saved["size"], 0) for saved in buffers])
        order = ages.argsort(stable=True)  # what each rank wrote last comes last
        dealt = {name: _joined(name, of_ranks).index_select(_axis(name), order) for name in of_ranks[0]}
    buffer.take_over(ranks.first(dealt), slice(ranks.rank, None, ranks.size))
    buffer.steps = sum(saved["steps"] for saved in buffers) // ranks.size


def _axis(name: str) -> int:
    """Along which of a replay buffer's arrays its rows lie: images have one for before and after."""
    return 0 if name == "rows" else 1


def _joined(name: str, parts: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([part[name] for part in parts], _axis(name))


def _last(name: str, rows: Tensor, count: int) -> Tensor:
    """The last ``count`` rows: a file may still hold some that were overwritten since."""
    return rows.narrow(_axis(name), rows.shape[_axis(name)] - count, count)
