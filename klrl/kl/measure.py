"""How far an update moved the policy: measured exactly, on the whole batch, after the last step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.control import Bound
from klrl.kl.divergence import NoClosedFormError, kl, reverse_kl
from klrl.kl.estimators import Estimate, kl_estimate, mc_entropy, mc_kl
from klrl.kl.parameters import parameters_of
from klrl.kl.ranks import ALONE, Ranks
from klrl.kl.state import own_noise

Direction = Literal["forward", "reverse"]
Of = Literal["mean", "p95", "max"]


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
    """Which of the two KLs the limits are about."""
    of: Of = "mean"
    """What of the states' KLs ``limit`` is about."""
    limited: float = 0.0
    """That, as the policy now stands."""
    furthest: float = 0.0
    """The largest KL of a state, in the limited direction."""
    max_limit: float = math.inf
    """What ``furthest`` may be at most; inf where nothing limits it."""
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
    def of_limit(self) -> float:
        """The limited KL as a fraction of its limit: above 1 the policy moved further than it should."""
        return fraction(self.limited, self.limit)

    @property
    def max_of_limit(self) -> float:
        """The largest KL of a state as a fraction of its limit: above 1 a state moved further than any should."""
        return fraction(self.furthest, self.max_limit)

    @property
    def excess(self) -> float:
        """The larger of the two fractions: at most 1 where both limits hold."""
        return max(self.of_limit, self.max_of_limit)

    def write(self, record: Callable[[str, float], object]) -> None:
        """Call ``record(tag, value)`` for every figure: a logger's ``record``, a dict's ``__setitem__``."""
        for tag in ("mean", "max", "p50", "p95", "p99", "reverse", "stopped_at", "rolled_back"):
            record(f"kl/{tag}", float(getattr(self, tag)))
        record("kl/coef", self.coefficient)
        if self.estimated:
            record("kl/estimated", 1.0)
        if self.limit != math.inf:
            record("kl/limit", self.limit)
            record("kl/of_limit", self.of_limit)
            record("kl/attempted", self.attempted)
        if self.max_limit != math.inf:
            record("kl/max_limit", self.max_limit)
            record("kl/max_of_limit", self.max_of_limit)
        for name, estimate in (("k1", self.k1), ("k3", self.k3)):
            if estimate is not None:
                record(f"kl/{name}", estimate.value)
        record("entropy/mean", self.entropy)
        record("entropy/change", self.entropy - self.entropy_before)


def fraction(reached: float, limit: float) -> float:
    """``reached`` as a fraction of ``limit``: 0 of an infinite one, infinite of 0 where it was left."""
    if limit == 0.0:
        return math.inf if reached > 0.0 else 0.0
    return 0.0 if limit == math.inf else reached / limit


def check_states(shape: torch.Size, mask: Tensor | None, log_prob: Tensor | None) -> None:
    """Raise ValueError unless a policy's batch ``shape`` is [B], and what is given has one value for each state."""
    if len(shape) != 1:
        how = "wrap it in joint(...)" if shape else "give its parameters a dimension of one state"
        raise ValueError(f"the policy has batch shape {tuple(shape)}, not [B]: {how}")
    for name, given in (("mask", mask), ("log-probabilities of the actions", log_prob)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must have one value per state: {tuple(given.shape)}, {shape}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True for the states that count, not {mask.dtype}: mask.bool()")


def state_mean(values: Tensor, mask: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """The mean over states of ``values`` [B], float64, of those in ``mask`` (bool [B]) alone where it is given.

    Every mean that decides something about an update is taken here, as a sum over a count, each over all ``ranks``.
    """
    total = (values if mask is None else torch.where(mask, values, 0.0)).sum(dtype=torch.float64)
    count = total.new_tensor(values.numel()) if mask is None else mask.sum(dtype=torch.float64)
    total, count = ranks.total(total, count)
    return total / count


def states(values: Tensor, of: Of, mask: Tensor | None = None, ranks: Ranks = ALONE) -> float:
    """The mean, the 95th percentile (a state's, not interpolated) or the largest of ``values`` [B] in ``mask``, over
    the states of all ``ranks``."""
    if of == "mean":
        return float(state_mean(values, mask, ranks))
    (values,) = ranks.rows(values if mask is None else values[mask])
    if values.numel() == 0:
        return math.nan
    return float(values.max() if of == "max" else values.kthvalue(1 + _rank(0.95, values.numel())).values)


def _rank(share: float, count: int) -> int:
    return round(share * (count - 1))


def measure(
    old: td.Distribution,
    new: td.Distribution,
    bound: Bound | None = None,
    *,
    log_ratio: Tensor | None = None,
    mask: Tensor | None = None,
    direction: Direction = "forward",
    of: Of = "mean",
    max_limit: float = math.inf,
    samples: int = 256,
    ranks: Ranks = ALONE,
) -> KLReport:
    """Compare two policies on the same B states and return the report of the move from ``old`` to ``new``.

    ``log_ratio``: log new(a) - log old(a), [B], of actions drawn from ``old``, for the estimates k1 and k3.
    ``samples``: how many per state where there is no closed form (mixtures); the report is then ``estimated``.
    ``mask``: bool [B], the states that count (False on rows that only reset an environment); all by default.
    ``bound`` is about the states' mean KL, or what ``of`` says, and ``max_limit`` about each state's. With several
    ``ranks`` the report is of the states of all, and the same on each.

    Raises ValueError where the result is not one value per state (use ``joint``) or no state counts.
    """
    device = next((parameter.device for parameter in parameters_of(old)), None)
    with torch.no_grad(), own_noise(device=device):  # a report follows from the policies, and disturbs nobody
        problem, found = None, None
        try:
            found = _compare(old, new, samples)
        except ValueError as its:
            problem = its
        if ranks.any(found is None):  # so that no rank goes on alone
            raise problem or ValueError("another rank's policy has no KL")
        assert found is not None
        estimated, *figures = found
        means = torch.stack([state_mean(x, mask, ranks) for x in figures])
        columns = [*figures[:2], *([] if log_ratio is None else [log_ratio])]
        columns = columns if mask is None else [column[mask] for column in columns]
        forward, backward, *sampled = ranks.rows(*columns)
        log_ratio = sampled[0] if sampled else None
        if forward.numel() == 0:
            raise ValueError("no valid state to measure the KL on")
        ordered = forward.sort().values
        places = [_rank(share, ordered.numel()) for share in (0.5, 0.95, 0.99, 1.0)]
        p50, p95, p99, largest = ordered[torch.tensor(places, device=ordered.device)].tolist()
        mean, reverse, entropy_before, entropy = means.tolist()
        if direction == "forward":
            limited, furthest = {"mean": mean, "p95": p95, "max": largest}[of], largest
        else:
            limited, furthest = reverse if of == "mean" else states(backward, of), states(backward, "max")
    return KLReport(
        estimated=estimated,
        per_state=ordered,
        attempted=limited,
        mean=mean,
        max=largest,
        p50=p50,
        p95=p95,
        p99=p99,
        reverse=reverse,
        entropy_before=entropy_before,
        entropy=entropy,
        limit=math.inf if bound is None else bound.limit,
        direction=direction,
        of=of,
        limited=limited,
        furthest=furthest,
        max_limit=max_limit,
        k1=None if log_ratio is None else kl_estimate(log_ratio, "k1"),
        k3=None if log_ratio is None else kl_estimate(log_ratio, "k3"),
    )


def _compare(old: td.Distribution, new: td.Distribution, samples: int) -> tuple[bool, Tensor, Tensor, Tensor, Tensor]:
    """Whether the KLs are estimates, KL(old || new) and KL(new || old), and both entropies, each [B]."""
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
    return estimated, forward, backward, _entropy(old, samples), _entropy(new, samples)


def _entropy(dist: td.Distribution, samples: int) -> Tensor:
    """The exact entropy, or a sampled one where torch has none (mixtures, squashed normals)."""
    try:
        return dist.entropy()
    except NotImplementedError:
        return mc_entropy(dist, samples).value
