"""How far an update moved the policy: measured exactly, on the whole batch, after the last step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Bound
from klrl.kl.divergence import NoClosedFormError, freeze, kl, parameters_of, reverse_kl, select
from klrl.kl.estimators import Estimate, kl_estimate, mc_entropy, mc_kl, own_noise

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class KLReport:
    """One update, measured. All values in nats, over the states of the batch, action dimensions summed."""

    mean: float
    """Mean over states of KL(old || new)."""
    max: float
    p50: float
    p95: float
    p99: float
    reverse: float
    """Mean over states of KL(new || old)."""
    entropy_before: float
    entropy: float
    limit: float
    """What the bounded direction may be at most; inf where nothing bounds it."""
    direction: Direction = "forward"
    """Which of the two KLs the limit is about."""
    k1: Estimate | None = None
    """The sampled estimates that other packages log, beside the exact value; None where no actions were given."""
    k3: Estimate | None = None
    coefficient: float = 0.0
    """The penalty's coefficient during this update."""
    stop_epoch: int = 0
    """The epoch in which the update was stopped early; 0 if it ran to its end."""
    rolled_back: float = 0.0
    """The share of the update that was taken back: 0 kept, 1 rolled back, between them projected to the boundary."""
    estimated: bool = False
    """Whether the KLs are Monte Carlo estimates, for want of a closed form; exact otherwise."""
    attempted: float = 0.0
    """The bounded KL that the update reached, before anything was taken back."""
    per_state: Tensor | None = field(default=None, repr=False, compare=False)
    """KL(old || new) of each state, [B], in ascending order: what the mean and the quantiles are of."""

    @property
    def bounded(self) -> float:
        """The KL that the limit is about, as the policy now stands."""
        return self.mean if self.direction == "forward" else self.reverse

    @property
    def of_limit(self) -> float:
        """The bounded KL as a share of its limit: above 1 the policy moved further than it should."""
        if self.limit == float("inf"):
            return 0.0
        if self.limit == 0.0:
            return float("inf") if self.bounded > 0.0 else 0.0
        return self.bounded / self.limit

    def write(self, record: Callable[[str, float], object]) -> None:
        """Call ``record(tag, value)`` for every figure: a logger's ``record``, a dict's ``__setitem__``."""
        for tag in ("mean", "max", "p50", "p95", "p99", "reverse", "stop_epoch", "rolled_back"):
            record(f"kl/{tag}", float(getattr(self, tag)))
        record("kl/coef", self.coefficient)
        if self.estimated:
            record("kl/estimated", 1.0)
        if self.limit != float("inf"):
            record("kl/limit", self.limit)
            record("kl/of_limit", self.of_limit)
            record("kl/attempted", self.attempted)
        for name, estimate in (("k1", self.k1), ("k3", self.k3)):
            if estimate is not None:
                record(f"kl/{name}", estimate.value)
        record("entropy/mean", self.entropy)
        record("entropy/change", self.entropy - self.entropy_before)


def measure(
    old: td.Distribution,
    new: td.Distribution,
    bound: Bound | None = None,
    *,
    log_ratio: Tensor | None = None,
    valid: Tensor | None = None,
    direction: Direction = "forward",
    samples: int = 256,
) -> KLReport:
    """Compare two policies on the same B states and return the report of the move from ``old`` to ``new``.

    ``log_ratio``: log new(a) - log old(a), [B], of actions drawn from ``old``, for the estimates k1 and k3.
    ``samples``: how many per state where there is no closed form (mixtures); the report is then ``estimated``.
    ``valid``: bool [B], the states that count (False on an autoreset's filler rows); all by default.

    Raises ValueError where the result is not one value per state (use ``joint``) or no state is valid.
    """
    device = next((parameter.device for parameter in parameters_of(old)), None)
    with torch.no_grad(), own_noise(device=device):  # a report follows from the policies, and disturbs nobody
        estimated = False
        try:
            forward, backward = kl(old, new), reverse_kl(old, new)
        except NoClosedFormError:
            estimated = True
            forward, backward = mc_kl(old, new, samples).value, mc_kl(new, old, samples).value
        if forward.dim() != 1:
            raise ValueError(
                f"KL has shape {tuple(forward.shape)}, but a report needs one value per state, shape [B]: "
                "wrap the distributions in joint(...)"
            )
        before, after = (_entropy(dist, samples) for dist in (old, new))
        if valid is not None and not bool(valid.all()):
            forward, backward, before, after = forward[valid], backward[valid], before[valid], after[valid]
            log_ratio = None if log_ratio is None else log_ratio[valid]
        if forward.numel() == 0:
            raise ValueError("no valid state to measure the KL on")
        ordered = forward.sort().values
        last = ordered.numel() - 1
        ranks = torch.tensor([round(share * last) for share in (0.5, 0.95, 0.99, 1.0)], device=ordered.device)
        means = torch.stack([x.double().mean() for x in (forward, backward, before, after)])
        p50, p95, p99, largest = ordered[ranks].tolist()
        mean, reverse, entropy_before, entropy = means.tolist()
    return KLReport(
        estimated=estimated,
        per_state=ordered,
        attempted=mean if direction == "forward" else reverse,
        mean=mean,
        max=largest,
        p50=p50,
        p95=p95,
        p99=p99,
        reverse=reverse,
        entropy_before=entropy_before,
        entropy=entropy,
        limit=float("inf") if bound is None else bound.limit,
        direction=direction,
        k1=None if log_ratio is None else kl_estimate(log_ratio, "k1"),
        k3=None if log_ratio is None else kl_estimate(log_ratio, "k3"),
    )


def _entropy(dist: td.Distribution, samples: int) -> Tensor:
    """The exact entropy, or a sampled one where torch has none (mixtures, squashed normals)."""
    try:
        return dist.entropy()
    except NotImplementedError:
        return mc_entropy(dist, samples).value


class Tracked:
    """What ``track`` hands out: ``check()`` inside the block, ``report`` once it has ended."""

    def __init__(self, measure_now: Callable[[], KLReport]) -> None:
        self._measure_now = measure_now
        self._report: KLReport | None = None

    def check(self) -> KLReport:
        """The report of the move so far, as if the block ended here: to stop an update that has gone far enough."""
        return self._measure_now()

    @property
    def report(self) -> KLReport:
        """The finished update's KLReport. Raises RuntimeError inside the block, where nothing is measured yet."""
        if self._report is None:
            raise RuntimeError("the update has not ended: read the report after the with block, or call check()")
        return self._report


@contextmanager
def track(
    policy_dist: Callable[..., td.Distribution],
    bound: Bound | None = None,
    *,
    obs: Tensor | None = None,
    actions: Tensor | None = None,
    subsample: int | None = None,
    direction: Direction = "forward",
) -> Iterator[Tracked]:
    """Measure any update, anyone's: old policy frozen on entry, new policy compared with it on exit.

    ``policy_dist()`` returns the policy's distribution on a fixed batch of states, or ``policy_dist(obs)`` where
    ``obs``, [B, ...], is given. ``actions``: one per state, drawn from the old policy, for the estimates k1 and k3.
    Nothing about the update itself changes. If the block raises, nothing is measured.

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

    def now() -> td.Distribution:
        return select(policy_dist(), rows) if obs is None else policy_dist(obs[rows])

    with torch.no_grad():
        first = policy_dist() if obs is None else None
        if subsample is not None:
            states = len(obs) if obs is not None else first.batch_shape[0]  # type: ignore[union-attr]
            if not 1 <= subsample <= states:
                raise ValueError(f"subsample must be between 1 and the {states} states, got {subsample}")
            # A generator of its own: torch's global one belongs to the update.
            rows = torch.randperm(states, generator=torch.Generator().manual_seed(0))[:subsample]
        taken = None if actions is None else actions[rows]
        old = freeze(now() if first is None else select(first, rows))

    @torch.no_grad()
    def measure_now() -> KLReport:
        new = now()
        log_ratio = None if taken is None else new.log_prob(taken) - old.log_prob(taken)
        return measure(old, new, bound, log_ratio=log_ratio, direction=direction)

    update = Tracked(measure_now)
    yield update
    update._report = measure_now()
