"""Keeping a finished update within its bound: pure functions on a vector of weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def project(weights: Tensor, old: Tensor, kl_at: Callable[[], float], limit: float, reached: float) -> float:
    """Move ``weights`` (in place) back along the line old -> weights until ``kl_at()`` is within ``limit``.

    weights, old: [P]. ``kl_at`` measures the KL at the current ``weights``; ``reached`` is what it was on entry.
    KL grows about as the square of the distance, which says where to try next between the largest share known to be
    inside and the smallest known to be outside. The search ends at 90 % of the limit, or after 12 trials at the
    largest share found inside: 0, the old weights bit for bit, where there was none. Returns that share.
    """
    new = weights.clone()
    inside, outside, share, measured = 0.0, 1.0, 1.0, reached
    for _ in range(12):
        guess = share * math.sqrt(0.98 * limit / measured) if 0.0 < measured < math.inf else 0.0
        share = guess if inside < guess < outside else (inside + outside) / 2
        torch.lerp(old, new, share, out=weights)
        measured = kl_at()
        if measured > limit or math.isnan(measured):
            outside = share
            continue
        inside = share
        if measured > 0.9 * limit:
            break
    weights.copy_(torch.lerp(old, new, inside) if inside > 0.0 else old)
    return inside
