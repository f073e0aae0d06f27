"""Run by torchrun: what two ranks decide about states of which only one's moved far, as JSON."""

import copy
import json
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributions import Categorical

from klrl.kl import KLLimit, Ranks, at_most, kl, state_mean
from klrl.kl.measure import states
from klrl.training.launch import joined

STATES, EPOCHS = 6, 3


def policies(rank: int, epoch: int) -> tuple[Categorical, Categorical]:
    """Old and new on a rank's states: rank 1's KL alone grows past 0.02."""
    old, far = torch.zeros(STATES, 3), torch.zeros(STATES, 3)
    far[:, 0] = (0.16 if rank else 0.01) * epoch
    return Categorical(logits=old), Categorical(logits=far)


def stops_alone(rank: int) -> str:
    """The loop of peers: each rank leaves by its own KL, and the gradients' all-reduce comes after."""
    for epoch in range(1, EPOCHS + 1):
        if float(kl(*policies(rank, epoch)).mean()) > 0.02:
            return "left"
        try:
            dist.all_reduce(torch.ones(10), async_op=True).wait(timedelta(seconds=1))
        except RuntimeError:
            return "waits"
    return "done"


def stops_together(ranks: Ranks, target: float) -> list[Any]:
    limit, at = KLLimit(at_most(target), penalty="none", stop=1.0, ranks=ranks), [1]
    limit.penalises = False
    with limit.update(lambda: policies(ranks.rank, at[0])[1], old=policies(ranks.rank, 0)[0]) as move:
        for epoch in range(1, EPOCHS + 1):
            at[0] = epoch
            ranks.total(torch.ones(10))
            if move.exceeded(at=epoch):
                break
    return [move.report.stopped_at, move.report.mean, move.report.max]


def uneven(ranks: Ranks) -> dict[str, Any]:
    """Statistics of three states of rank 0 and one of rank 1's two."""
    values = torch.tensor([[1.0, 2.0, 6.0], [11.0, 90.0]][ranks.rank] if ranks.rank < 2 else [])
    mask = torch.tensor([[True, True, True], [True, False]][ranks.rank])
    none = torch.zeros_like(mask) if ranks.rank else mask  # all of rank 1's rows only reset an environment
    array = values[mask].double().numpy()
    return {
        "mean": float(state_mean(values, mask, ranks)),
        "p95": states(values, "p95", mask, ranks),
        "max": states(values, "max", mask, ranks),
        "masked": float(state_mean(values, none, ranks)),
        "masked max": states(values, "max", none, ranks),
        "moments": list(ranks.moments(array)),
        "rows": ranks.rows(values)[0].tolist(),
        "objects": ranks.objects({"rank": ranks.rank, "values": values})[1]["values"].tolist(),
        "first": ranks.first(ranks.rank + 5),
        "none": list(ranks.rows(torch.zeros(0, 3))[0].shape),
        "few": ranks.rows(torch.zeros(1 - ranks.rank, 2))[0].tolist(),
        "copied": [copy.deepcopy(ranks).size, pickle.loads(pickle.dumps(ranks)).size],
        "large": float(ranks.total(torch.ones(3_000_000))[0].sum()),
    }


def main(output: Path) -> None:
    torch.set_num_threads(1)
    with joined() as near:
        group = dist.group.WORLD
        assert group is not None
        found: dict[str, Any] = {}
        for way, ranks in {"memory": near, "network": Ranks(group, 30)}.items():
            together = {str(target): stops_together(ranks, target) for target in (0.02, 0.005)}
            found[way] = {"uneven": uneven(ranks), "together": together}
        every = near.objects(found)
        own = near.objects(stops_alone(near.rank))
        if near.rank == 0:
            output.write_text(json.dumps({"ranks": every, "alone": own}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
