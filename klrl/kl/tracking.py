"""``track``: measure any update, anyone's, without a word in its code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Bound
from klrl.kl.limit import KLLimit, Move
from klrl.kl.measure import Direction
from klrl.kl.parameters import select


@contextmanager
def track(
    policy_dist: Callable[..., td.Distribution],
    bound: Bound | None = None,
    *,
    obs: Tensor | None = None,
    actions: Tensor | None = None,
    subsample: int | None = None,
    direction: Direction = "forward",
) -> Iterator[Move]:
    """Measure the update in the block: old policy frozen on entry, new policy compared with it on exit.

    ``policy_dist()`` returns the policy's distribution on a fixed batch of states, or ``policy_dist(obs)`` where
    ``obs``, [B, ...], is given. ``actions``: one per state, drawn from the old policy, for the estimates k1 and k3.
    Nothing about the update itself changes; ``KLLimit.update`` also holds it. If the block raises, nothing is measured.

        with track(policy, at_most(0.01), obs=obs) as update:
            for epoch in range(10):
                train_one_epoch()
                if update.check().of_limit > 1.5:
                    break
        print(update.report.mean, update.report.of_limit)

    What it costs, beside a copy of the old policy's outputs:

    - final: without ``check``, two forward passes over the B states, without gradients, and two KLs over them;
    - full: one such pass and two KLs more for every ``check``;
    - ``subsample=n``: the same on n states, drawn once on entry. Their mean is an unbiased estimate of the batch's,
      their maximum a lower bound of its maximum. Without ``obs`` the policy still returns all B states, and only the
      KLs cost less.

    Raises ValueError where ``subsample`` is not between 1 and B.
    """
    rows: Tensor | slice = slice(None)
    if subsample is not None:
        with torch.no_grad():
            states = len(obs) if obs is not None else policy_dist().batch_shape[0]
        if not 1 <= subsample <= states:
            raise ValueError(f"subsample must be between 1 and the {states} states, got {subsample}")
        # A generator of its own: torch's global one belongs to the update.
        rows = torch.randperm(states, generator=torch.Generator().manual_seed(0))[:subsample]

    def policy() -> td.Distribution:
        return select(policy_dist(), rows) if obs is None else policy_dist(obs[rows])

    limit = KLLimit(bound, direction=direction, penalty="none")
    with limit.update(policy, actions=None if actions is None else actions[rows]) as move:
        yield move
