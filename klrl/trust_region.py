"""Keeping a finished update within its bound: pure functions on a vector of weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def project(weights: Tensor, old: Tensor, kl_at: Callable[[], float], limit: float, reached: float) -> float:
    """Move ``weights`` (in place) back along the line old -> weights until ``kl_at()`` is within ``limit``.

    weights, old: [P]. ``kl_at`` measures the KL at the current ``weights``; ``reached`` is what it was on entry.
    KL grows about as the square of the distance, which gives each trial's share; a trial that is still outside
    shrinks further, and after 20 the old weights are restored. Returns the share of the step that was kept.
    """
    new = weights.clone()
    share, measured = 1.0, reached
    for _ in range(20):
        share *= 0.999 * min(1.0, math.sqrt(limit / measured)) if math.isfinite(measured) else 0.5
        torch.lerp(old, new, share, out=weights)
        measured = kl_at()
        if measured <= limit:
            return share
    weights.copy_(old)
    return 0.0
