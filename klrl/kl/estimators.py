"""Monte Carlo estimates of KL(old || new) from log-ratios, each with its standard error.

They stand beside an exact value or take its place where none exists; they never steer an update in klrl.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.divergence import NoClosedFormError, raise_nan
from klrl.kl.parameters import name_of


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
    k3 = r - 1 - log r is never negative, and unbiased where old has mass wherever new has.
    Source: Schulman, "Approximating KL Divergence" (2020).

    The value plus and minus 1.96 standard errors is meant to hold the KL 95 times in 100. Simulated 2,000 times between
    normals, k1's did 94 to 95 times from 256 samples on. k3 takes the mean of the ratio itself, whose variance is
    infinite where one standard deviation grows by 1.42, and whose largest values a sample misses long before: its
    interval held the KL 91 to 96 times of 2,048 samples (85 to 94 of 256, as few as 73 of 64) where it has one. Its
    error is inf, which says that the sample does not tell it, where the ratio's largest values spread as if it had no
    fourth moment, so that the standard error had no variance: Hill's index (1975) is 1/4 or above. k2's error is about
    its own mean.

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
    value = float(samples.mean())
    known = samples.numel() > 1 and not math.isinf(value) and (kind != "k3" or _tail_index(x) < 0.25)
    return Estimate(value, float(samples.std() / samples.numel() ** 0.5) if known else math.inf)


def _tail_index(log_ratio: Tensor) -> float:
    """Hill's estimate of the index of the ratio's upper tail; its moments beyond 1 / index are infinite.

    From as many of the largest as Vehtari et al. (2024, section 3.2) take of importance ratios: n/5 or 3 sqrt n.
    """
    n = log_ratio.numel()
    tail = log_ratio.topk(max(2, math.ceil(min(n / 5, 3 * n**0.5)))).values
    return float((tail - tail[-1]).sum() / (len(tail) - 1))


def mc_kl(old: td.Distribution, new: td.Distribution, n: int = 256) -> StateEstimates:
    """Estimate KL(old || new) per state, from ``n`` samples of each of the two for each.

    For pairs without a closed form (mixtures). With m = (old + new) / 2 and r = new / old it is the mean over m of
    old/m * (r - 1 - log r): unbiased whatever the supports, never negative, and of a weight that is at most 2, where
    the mean over old alone (k3) has infinite variance as soon as one standard deviation grows by 1.42.
    Source: multiple importance sampling with the balance heuristic, Veach and Guibas (1995), section 3.3.

    The value plus and minus 1.96 standard errors held the KL 92 to 95 times in 100 with the default ``n``, 80 to 94
    with 32 and 95 to 96 with 2,048: 4,000 simulations each of normals of 1 and 17 dimensions between a tenth and five
    times as wide and up to 10 standard deviations apart, and of mixtures. What is rarer than 1 / n under both is not
    seen, nor is its error.

    Needs ``sample`` and ``log_prob`` of both; no gradients. A sample of old that ``new`` cannot produce makes the
    estimate infinite. Raises ValueError for fewer than 2 samples, for parameters that are nan, and where one of the two
    cannot be sampled or score samples.
    """
    size = _size(n)
    with torch.no_grad():
        try:
            ratios = [(_log_prob(new, x) - _log_prob(old, x)).double() for x in (old.sample(size), new.sample(size))]
        except NotImplementedError:
            names = f"{name_of(old)} and {name_of(new)}"
            raise NoClosedFormError(f"{names}: one has no sample or log_prob to estimate their KL from") from None
        # old/m = 2 / (1 + r), times r - 1 - log r; 2 where old has no mass.
        terms = [2 * (torch.tanh(x / 2) - x * torch.sigmoid(-x)) for x in ratios]
        terms = [torch.where(x == math.inf, 2.0, t.clamp_min(0.0)) for x, t in zip(ratios, terms, strict=True)]
        if any(bool(t.isnan().any()) for t in terms):
            raise_nan(old, new)
        parts = [_over_samples(t) for t in terms]
    value, stderr = (torch.stack(x) for x in zip(*parts, strict=True))
    return StateEstimates(value.mean(0), stderr.square().sum(0).sqrt() / 2)


def mc_entropy(dist: td.Distribution, n: int = 256) -> StateEstimates:
    """Estimate the entropy per state from ``n`` samples for each: for squashed normals and mixtures, which have none in
    closed form.

    Of a transformed distribution only the transform's part is sampled: H(T(X)) = H(X) + E[log |dT/dx|], with the
    Jacobian taken at the sample of the base, so that a saturated tanh neither overflows nor loses digits. No gradients.
    Raises ValueError for fewer than 2 samples, and for a transform that is not bijective.
    """
    with torch.no_grad():
        return _over_samples(_surprise(dist, _size(n))[1])


def _surprise(dist: td.Distribution, size: torch.Size) -> tuple[Tensor, Tensor]:
    """A sample and, [n, *batch], -log p of it, or what has the same mean and varies less."""
    dims = 1 + len(dist.batch_shape)
    if isinstance(dist, td.Independent):
        sample, terms = _surprise(dist.base_dist, size)
        return sample, _per_state(terms, dims)
    if type(dist) is not td.TransformedDistribution:
        sample = dist.sample(size)
        try:
            return sample, dist.entropy().double().expand(*size, *dist.batch_shape)
        except NotImplementedError:
            return sample, -dist.log_prob(sample).double()
    x, terms = _surprise(dist.base_dist, size)
    terms = _per_state(terms, dims)
    for transform in dist.transforms:
        if not transform.bijective:
            raise ValueError(f"{type(transform).__name__} is not bijective: the entropy would need its inverse images")
        y = transform(x)
        jacobian: Tensor = transform.log_abs_det_jacobian(x, y).double()  # type: ignore[no-untyped-call]
        terms = terms + _per_state(jacobian, dims)
        x = y
    return x, terms


def _per_state(x: Tensor, dims: int) -> Tensor:
    """Summed over all dimensions after the first ``dims``."""
    return x.flatten(dims).sum(-1) if x.dim() > dims else x


def _log_prob(dist: td.Distribution, sample: Tensor) -> Tensor:
    """log p of the sample, -inf outside of the support, where torch would raise."""
    try:
        return dist.log_prob(sample)
    except ValueError:
        inside: Tensor = dist.support.check(sample)  # type: ignore[union-attr]
        within = inside.view(*inside.shape, *[1] * (sample.dim() - inside.dim()))
        return torch.where(inside, dist.log_prob(torch.where(within, sample, dist.sample(sample.shape[:1]))), -math.inf)


def _size(n: int) -> torch.Size:
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard error, got {n}")
    return torch.Size([n])


def _over_samples(terms: Tensor) -> StateEstimates:
    mean = terms.mean(0)
    stderr = torch.where(mean.isinf(), math.inf, terms.std(0) / len(terms) ** 0.5)
    return StateEstimates(mean.float(), stderr.float())
