"""Calibration of class probabilities: whether what is predicted with probability p comes true p of the time.

Predictions are unnormalised logits [N, n], -inf where a class is impossible (of probabilities, their logarithms); a
target is a class number for each, [N], or a distribution over the classes, [N, n]. Float64 inside.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl.kl.closed_form import log_probs_64

_LARGEST = 100.0  # temperature; the least is its inverse
_MOST_STEPS = 200
_PRECISION = 1e-10  # of log T


class Reliability(NamedTuple):
    """Predictions by the probability of the most likely class, in bins of equal width; nan in an empty bin. Each [M]"""

    number: Tensor
    confidence: Tensor
    """The mean probability of the most likely class."""
    accuracy: Tensor
    """How often it came true; of a target that is a distribution, its mean probability there."""


def temperature_scale(logits: Tensor, target: Tensor) -> float:
    """The temperature T, 0.01 to 100, of softmax(logits / T) with the least ``nll`` on held-out predictions.

    Above 1 where the predictions are too sure of themselves. The nll is convex in 1 / T, so its one minimum is found,
    in log T, by Newton's method, with bisection wherever a step leaves the interval that is known to hold it. Where
    every most likely class comes true the minimum is at T = 0, and 0.01 is returned; where the target agrees no better
    than chance, it is at infinity or beyond, and 100 is; where all classes are equally likely T does nothing, and 1 is.
    Raises ValueError for other shapes, no predictions, nan, and a target that the logits call impossible, whose nll is
    infinite at every T. Source: Guo et al. (2017), section 4.2.
    """
    z, wanted = _checked(logits, target)
    possible = z > -math.inf
    if bool((wanted[~possible] > 0).any()):
        raise ValueError("the target has a class whose logit is -inf: its nll is infinite at every temperature")
    z = z - z.amax(-1, keepdim=True)
    finite = torch.where(possible, z, 0.0)
    if not bool(finite.any()):
        return 1.0
    agreement = (wanted * finite).sum(-1)

    def slopes(x: float) -> tuple[float, float]:
        """The derivative of the nll in 1 / T, at T = e^-x, and that derivative's own in x."""
        p = log_probs_64(z * math.exp(x)).exp()
        mean = (p * finite).sum(-1, keepdim=True)
        variance = (p * (finite - mean).square()).sum(-1)
        return float((mean.squeeze(-1) - agreement).mean()), math.exp(x) * float(variance.mean())

    low, high = -math.log(_LARGEST), math.log(_LARGEST)
    if slopes(low)[0] >= 0:
        return _LARGEST
    if slopes(high)[0] <= 0:
        return 1 / _LARGEST
    x, last = 0.0, high - low
    for _ in range(_MOST_STEPS):
        slope, curvature = slopes(x)
        low, high = (x, high) if slope < 0 else (low, x)
        following = x - slope / curvature if curvature > 0 else math.inf
        # A step that is no shorter than half the one before gets nowhere, as far out where probabilities are 0 and 1.
        if not low < following < high or abs(following - x) > 0.5 * last:
            following = 0.5 * (low + high)
        last, x = abs(following - x), following
        if last < _PRECISION:
            break
    return math.exp(-x)


def nll(logits: Tensor, target: Tensor) -> float:
    """The mean negative log-likelihood of the target in nats, >= 0, infinite where the logits call it impossible.

    Of a target that is a distribution, the cross-entropy: its own entropy, and KL(target || softmax(logits)).
    Raises ValueError as ``temperature_scale``, but for that impossible target.
    """
    z, wanted = _checked(logits, target)
    return float(torch.where(wanted > 0, -wanted * log_probs_64(z), 0.0).sum(-1).mean())


def reliability(logits: Tensor, target: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy of the most likely class, in ``bins`` of equal width over the probabilities (0, 1].

    Raises ValueError as ``nll``, and for less than one bin. Source: Guo et al. (2017), section 2.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    z, wanted = _checked(logits, target)
    sure, chosen = log_probs_64(z).exp().max(-1)
    right = wanted.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    place = (sure * bins).ceil().long().clamp(1, bins) - 1
    number, *sums = (
        torch.zeros(bins, dtype=torch.float64, device=sure.device).index_add_(0, place, x)
        for x in (torch.ones_like(sure), sure, right)
    )
    return Reliability(number, *(total / number for total in sums))


def expected_calibration_error(logits: Tensor, target: Tensor, bins: int = 15) -> float:
    """ECE, 0 to 1: how far confidence and accuracy of the most likely class lie apart, the mean over all predictions.

    That of the empty bins counts nothing. It is never below 0, so few predictions give a calibrated one some, too.
    Raises ValueError as ``reliability``. Source: Naeini et al. (2015); Guo et al. (2017), equation 3.
    """
    found = reliability(logits, target, bins)
    gaps = torch.where(found.number > 0, (found.accuracy - found.confidence).abs(), 0.0)
    return float((found.number * gaps).sum() / found.number.sum())


def _checked(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 [N, n], the target as a distribution."""
    if logits.dim() != 2 or not logits.numel():
        raise ValueError(f"logits must have shape [N, n], of at least one prediction, got {tuple(logits.shape)}")
    z, (rows, classes) = logits.detach().double(), logits.shape
    if bool(z.isnan().any()) or bool((z == math.inf).any()) or bool((z.amax(-1) == -math.inf).any()):
        raise ValueError("logits must not be nan or inf, nor -inf for every class of a prediction")
    if target.shape == (rows,) and not target.is_floating_point():
        if bool(((target < 0) | (target >= classes)).any()):
            raise ValueError(f"target must hold class numbers of 0 to {classes - 1}")
        return z, torch.nn.functional.one_hot(target.long(), classes).double()
    if target.shape != logits.shape:
        raise ValueError(
            f"target must hold class numbers [{rows}] or distributions [{rows}, {classes}], got {target.dtype} of "
            f"shape {tuple(target.shape)}"
        )
    wanted = target.detach().double()
    if not bool((wanted >= 0).all()) or not bool(((wanted.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("target must hold distributions: probabilities >= 0 that sum to 1")
    return z, wanted
