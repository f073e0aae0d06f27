"""The trust region: a step whose KL has a limit, and keeping a finished update within its bound.

Pure functions on vectors of weights; what a weight means, and where a KL is measured, they are told by callables.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ESCALATIONS = 5  # how often the damping may be raised tenfold before a step is given up
_RESIDUAL = 1e-5  # conjugate gradient ends where the residual is this fraction of the gradient
_FLAT = 1e-12  # curvature along a unit vector below which there is none


class CGResult(NamedTuple):
    """What ``conjugate_gradient`` found; x is the best so far where it met no positive curvature."""

    x: Tensor
    residual: float
    """|b - A x| / |b|."""
    iterations: int
    positive: bool
    """Whether A was positive along every direction tried."""


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, max_steps: int) -> CGResult:
    """Solve A x = b for a symmetric positive A, given as ``product`` (v to A v), in float64.

    Ends after ``max_steps`` products, at a residual of 1e-5, or where the curvature v^T A v is not positive.
    b: [P], not zero. Source: Hestenes and Stiefel (1952); Nocedal and Wright (2006), algorithm 5.2.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = residual.clone(), float(residual @ residual)
    whole, steps = squared, 0
    while steps < max_steps and squared > _RESIDUAL**2 * whole:
        moved = product(direction)
        curvature = float(direction @ moved)
        if not curvature > _FLAT * float(direction @ direction):  # also where it is nan
            return CGResult(x, math.sqrt(squared / whole), steps, False)
        steps += 1
        x.add_(direction, alpha=squared / curvature)
        residual.sub_(moved, alpha=squared / curvature)
        before, squared = squared, float(residual @ residual)
        direction.mul_(squared / before).add_(residual)
    return CGResult(x, math.sqrt(squared / whole), steps, True)


class NaturalStep(NamedTuple):
    """The step s along F^-1 g with s^T F s / 2 = limit, and how it was found."""

    step: Tensor
    improvement: float
    """g^T s: what the linear model says the objective gains."""
    residual: float
    iterations: int
    damping: float


def natural_step(
    fisher: Callable[[Tensor], Tensor], gradient: Tensor, limit: float, damping: float, max_steps: int
) -> NaturalStep | None:
    """The natural gradient's step on which the quadratic model of KL is ``limit``: sqrt(2 limit / s^T F s) s.

    fisher: v to F v. gradient: [P], float64, finite and not zero. s solves (F + damping) s = g; where the curvature
    is not positive, or none is left along s, the damping is raised tenfold, up to five times. None where that did not
    help. Source: Schulman et al. (2015), appendix C.
    """
    damping_now = damping
    for _ in range(_ESCALATIONS + 1):
        found = conjugate_gradient(lambda v: fisher(v).add_(v, alpha=damping_now), gradient, max_steps)  # noqa: B023
        if found.positive:
            curvature = float(found.x @ fisher(found.x))
            if curvature > _FLAT * float(found.x @ found.x):
                step = found.x * math.sqrt(2 * limit / curvature)
                return NaturalStep(step, float(gradient @ step), found.residual, found.iterations, damping_now)
        damping_now = max(10 * damping_now, 1e-6)
    return None


class LineSearch(NamedTuple):
    """Where a line search ended."""

    fraction: float
    """Of the step that was taken; 0 where none was acceptable, and the weights are the old ones."""
    improvement: float
    kl: float
    first_kl: float
    """The KL of the whole step."""
    rejected: str
    """Why the last trial was refused: "kl", "no_improvement" or "nonfinite"; empty where one was taken."""


def line_search(
    weights: Tensor,
    step: Tensor,
    measure: Callable[[], tuple[float, float]],
    limit: float,
    max_trials: int,
    shrink: float = 0.8,
) -> LineSearch:
    """Move ``weights`` [P] in place along ``step``, as far as improves the objective and keeps KL within ``limit``.

    ``measure`` returns the improvement and the KL at the current weights. A fraction of the step that improves nothing
    is shrunk by ``shrink``; one whose KL is too large, to where the square law puts it just inside, which is often a
    much smaller cut. Where no trial is accepted the weights are restored bit for bit.
    """
    old = weights.clone()
    fraction, first_kl, rejected = 1.0, math.nan, "no_improvement"
    for trial in range(max_trials):
        weights.copy_(old + fraction * step)
        improvement, divergence = measure()
        first_kl = divergence if trial == 0 else first_kl
        if not (math.isfinite(improvement) and math.isfinite(divergence)):
            rejected, fraction = "nonfinite", fraction * shrink**3
        elif divergence > limit:
            rejected, fraction = "kl", fraction * max(0.5, math.sqrt(0.96 * limit / divergence))
        elif improvement > 0.0:
            return LineSearch(fraction, improvement, divergence, first_kl, "")
        else:
            rejected, fraction = "no_improvement", fraction * shrink
    weights.copy_(old)
    return LineSearch(0.0, 0.0, 0.0, first_kl, rejected)


def project(place: Callable[[float], None], kl_at: Callable[[], float], limit: float, reached: float) -> float:
    """Move a policy back along the line old -> new weights until ``kl_at()`` is within ``limit``.

    ``place(f)`` sets the weights to old + f * (new - old), at 0 to the old ones bit for bit; ``kl_at`` measures the KL
    there; ``reached`` is what it was at 1, where the weights are on entry.
    KL grows about as the square of the distance, which says where to try next between the largest fraction known to be
    inside and the smallest known to be outside. The search ends at 90 % of the limit, or after 12 trials at the
    largest fraction found inside: 0 where there was none. Returns that fraction.
    """
    inside, outside, fraction, measured = 0.0, 1.0, 1.0, reached
    for _ in range(12):
        guess = fraction * math.sqrt(0.98 * limit / measured) if 0.0 < measured < math.inf else 0.0
        fraction = guess if inside < guess < outside else (inside + outside) / 2
        place(fraction)
        measured = kl_at()
        if measured > limit or math.isnan(measured):
            outside = fraction
            continue
        inside = fraction
        if measured > 0.9 * limit:
            break
    place(inside)
    return inside
