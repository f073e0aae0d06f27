"""Monte Carlo estimates of KL(old || new) from log-ratios, each with its standard error.

They stand beside an exact value or take its place where none exists; they never steer an update in klrl.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.divergence import explain_nan


class StateEstimates(NamedTuple):
    """A sample mean and its standard error for each state, [B], in nats."""

    value: Tensor
    stderr: Tensor


class Estimate(NamedTuple):
    """A sample mean and its standard error, in nats."""

    value: float
    stderr: float


def kl_estimate(log_ratio: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Estimate:
    """Estimate KL(old || new) from ``log_ratio`` = log new(a) - log old(a) with a drawn from old, shape [B].

    k1 = -log r is unbiased and may be negative; k2 = (log r)^2 / 2 is biased, small and never negative;
    k3 = r - 1 - log r is unbiased and never negative. Source: Schulman, "Approximating KL Divergence" (2020).

    Raises ValueError for another kind and for an empty ``log_ratio``.
    """
    if log_ratio.numel() == 0:
        raise ValueError("log_ratio is empty: a KL estimate needs at least one sample")
    x = log_ratio.detach().double().flatten()
    match kind:
        case "k1":
            samples = -x
        case "k2":
            samples = 0.5 * x * x
        case "k3":
            samples = torch.expm1(x) - x
        case _:
            raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")
    stderr = float(samples.std() / samples.numel() ** 0.5) if samples.numel() > 1 else float("inf")
    return Estimate(float(samples.mean()), stderr)


def mc_kl(old: td.Distribution, new: td.Distribution, n: int = 256) -> StateEstimates:
    """Estimate KL(old || new) per state from ``n`` samples of ``old`` for each, by k3: unbiased and never negative.

    For pairs without a closed form (mixtures). Needs ``old.sample`` and both ``log_prob``; no gradients. A sample that
    ``new`` cannot produce makes the estimate infinite. Raises ValueError for fewer than 2 samples.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard error, got {n}")
    with torch.no_grad():
        sample = old.sample(torch.Size([n]))
        x = (new.log_prob(sample) - old.log_prob(sample)).double()
        terms = torch.expm1(x) - x
        if bool(terms.isnan().any()):
            explain_nan(old, new)
        return _over_samples(terms)


def mc_entropy(dist: td.Distribution, n: int = 256) -> StateEstimates:
    """Estimate the entropy per state from ``n`` samples for each: for squashed normals and mixtures, which have none in
    closed form.

    Of a transformed distribution only the transform's part is sampled: H(T(X)) = H(X) + E[log |dT/dx|], with the
    Jacobian taken at the sample of the base, so that a saturated tanh neither overflows nor loses digits. No gradients.
    Raises ValueError for fewer than 2 samples.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard error, got {n}")
    size = torch.Size([n])
    with torch.no_grad():
        if not isinstance(dist, td.TransformedDistribution):
            return _over_samples(-dist.log_prob(dist.sample(size)).double())
        x, base = dist.base_dist.sample(size), dist.base_dist
        terms = torch.zeros((), dtype=torch.float64)
        for transform in dist.transforms:
            y = transform(x)
            jacobian: Tensor = transform.log_abs_det_jacobian(x, y).double()  # type: ignore[no-untyped-call]
            terms = terms + _per_state(jacobian, 1 + len(dist.batch_shape))
            x = y
        return _over_samples(terms + _per_state(base.entropy().double(), len(dist.batch_shape)))


def _per_state(x: Tensor, dims: int) -> Tensor:
    """Summed over all dimensions after the first ``dims``."""
    return x.flatten(dims).sum(-1) if x.dim() > dims else x


def _over_samples(terms: Tensor) -> StateEstimates:
    return StateEstimates(terms.mean(0).float(), (terms.std(0) / len(terms) ** 0.5).float())
