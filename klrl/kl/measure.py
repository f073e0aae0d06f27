"""How far an update moved the policy: measured exactly, on the whole batch, after the last step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Bound
from klrl.kl.divergence import NoClosedFormError, kl, parameters_of, reverse_kl
from klrl.kl.estimators import Estimate, kl_estimate, mc_entropy, mc_kl
from klrl.kl.state import own_noise

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
    """What the limited direction may be at most; inf where nothing limits it."""
    direction: Direction = "forward"
    """Which of the two KLs the limit is about."""
    k1: Estimate | None = None
    """The sampled estimates that other packages log, beside the exact value; None where no actions were given."""
    k3: Estimate | None = None
    coefficient: float = 0.0
    """The penalty's coefficient during this update."""
    stopped_at: int = 0
    """The epoch, or an off-policy agent's gradient step, at which the update was stopped early; 0 if it was not."""
    rolled_back: float = 0.0
    """The fraction of the update that was taken back: 0 kept, 1 all, between them projected to the boundary."""
    estimated: bool = False
    """Whether the KLs are Monte Carlo estimates, for want of a closed form; exact otherwise."""
    attempted: float = 0.0
    """The limited KL that the update reached, before anything was taken back."""
    per_state: Tensor | None = field(default=None, repr=False, compare=False)
    """KL(old || new) of each state, [B], in ascending order: what the mean and the quantiles are of."""

    @property
    def limited(self) -> float:
        """The KL that the limit is about, as the policy now stands."""
        return self.mean if self.direction == "forward" else self.reverse

    @property
    def of_limit(self) -> float:
        """The limited KL as a fraction of its limit: above 1 the policy moved further than it should."""
        if self.limit == float("inf"):
            return 0.0
        if self.limit == 0.0:
            return float("inf") if self.limited > 0.0 else 0.0
        return self.limited / self.limit

    def write(self, record: Callable[[str, float], object]) -> None:
        """Call ``record(tag, value)`` for every figure: a logger's ``record``, a dict's ``__setitem__``."""
        for tag in ("mean", "max", "p50", "p95", "p99", "reverse", "stopped_at", "rolled_back"):
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


def state_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over states of ``values`` [B], float64, of those in ``mask`` (bool [B]) alone where it is given.

    Every mean that decides something about an update is taken here, as a sum over a count.
    """
    if mask is None:
        return values.sum(dtype=torch.float64) / values.numel()
    return torch.where(mask, values, 0.0).sum(dtype=torch.float64) / mask.sum()


def measure(
    old: td.Distribution,
    new: td.Distribution,
    bound: Bound | None = None,
    *,
    log_ratio: Tensor | None = None,
    mask: Tensor | None = None,
    direction: Direction = "forward",
    samples: int = 256,
) -> KLReport:
    """Compare two policies on the same B states and return the report of the move from ``old`` to ``new``.

    ``log_ratio``: log new(a) - log old(a), [B], of actions drawn from ``old``, for the estimates k1 and k3.
    ``samples``: how many per state where there is no closed form (mixtures); the report is then ``estimated``.
    ``mask``: bool [B], the states that count (False on rows that only reset an environment); all by default.

    Raises ValueError where the result is not one value per state (use ``joint``) or no state counts.
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
        means = torch.stack([state_mean(x, mask) for x in (forward, backward, before, after)])
        if mask is not None:
            forward, log_ratio = forward[mask], None if log_ratio is None else log_ratio[mask]
        if forward.numel() == 0:
            raise ValueError("no valid state to measure the KL on")
        ordered = forward.sort().values
        last = ordered.numel() - 1
        ranks = torch.tensor([round(share * last) for share in (0.5, 0.95, 0.99, 1.0)], device=ordered.device)
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
