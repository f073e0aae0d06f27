"""The KL formulas themselves, on parameter tensors.

Written in phi(x) = e^x - 1 - x, which is never negative and second order in x, as KL is in a change of the policy:
terms that small cannot be got by subtracting large ones. Gradients are in closed form, and twice differentiable.
"""

from typing import Any

import torch
from torch import Tensor

from klrl.kl import state

_SAFE = 500.0  # up to here e^x is well inside float64's range
_NO_MASS = 1e-300  # a probability below this is 0: its products with e^x could overflow before they cancel

# Nodes and weights on [0, 1].
_GAUSS_LEGENDRE = (
    (0.03376524289842403, 0.08566224618958514),
    (0.16939530676686776, 0.18038078652406936),
    (0.38069040695840156, 0.23395696728634552),
    (0.6193095930415985, 0.23395696728634552),
    (0.8306046932331322, 0.18038078652406936),
    (0.9662347571015759, 0.08566224618958514),
)


def phi(x: Tensor) -> Tensor:
    """e^x - 1 - x, elementwise and in ``x``'s dtype, >= 0: the excess of e^x over its tangent at 0."""
    if not torch.is_grad_enabled():
        return _phi(x)
    result: Tensor = _Phi.apply(x)  # type: ignore[no-untyped-call]
    return result


def _phi(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.expm1(wide).sub_(wide).clamp_min_(0.0).to(x.dtype)


class _Phi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _phi(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.expm1(x)


def sum_last(x: Tensor) -> Tensor:
    """The sum over the last dimension."""
    # As a product with ones it takes half the time where that dimension is short; but its backward pass costs more, and
    # autocast would round it.
    if x.requires_grad or torch.is_autocast_enabled(x.device.type):
        return x.sum(dim=-1)
    return x @ x.new_ones(x.shape[-1])


def log_probs_64(logits: Tensor) -> Tensor:
    """Normalised log-probabilities in float64, shape [..., n]."""
    # By hand, as torch.log_softmax takes several times as long on rows as short as an action space.
    x = logits.to(torch.float64, copy=True)
    if not exp_is_safe(x):
        x = x - x.amax(dim=-1, keepdim=True)
    return x.sub_(sum_last(x.exp()).log().unsqueeze(-1))


def exp_is_safe(x: Tensor) -> bool:
    """Whether e^x is safe to take of every element; False where one is nan."""
    if not x.numel():
        return True
    if not (state.may_look() and x.is_cpu):  # a GPU's numbers would have to be waited for: the careful way
        return False
    least, most = torch.aminmax(x.detach())
    return float(least) > -_SAFE and float(most) < _SAFE


def categorical_kl(logits_old: Tensor, logits_new: Tensor) -> Tensor:
    """KL(old || new) of categoricals given by unnormalised logits of shape [..., n]; the result has shape [...].

    -inf marks a forbidden action. Computed in float64, returned in ``logits_new``'s dtype. Gradients, finite wherever
    the KL is: d/d logits_new = softmax(new) - softmax(old); d/d logits_old = p * (log p - log q - KL).
    """
    result: Tensor = _CategoricalKL.apply(logits_old, logits_new)  # type: ignore[no-untyped-call]
    return result


def categorical_kl_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The same without gradients, from each side's ``log_probs_64``, which a loop of measurements computes once."""
    # Few arrays, used again: on a batch of thousands, fresh memory costs as much as the arithmetic.
    x = log_q - log_p
    safe = exp_is_safe(x)
    terms = torch.expm1(x).sub_(x)
    p = torch.exp(log_p, out=x)
    terms *= p  # p * phi(log q/p); their sum is the KL, as that of q - p is 0
    if not safe:
        # Where old forbids an action (p = 0, x = inf or nan) the term's limit is q; where only new does, it is inf.
        terms = torch.where(p < _NO_MASS, log_q.exp(), terms)
    return sum_last(terms).clamp_min_(0.0)


class _CategoricalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_old: Tensor, logits_new: Tensor) -> Tensor:
        log_p, log_q = log_probs_64(logits_old), log_probs_64(logits_new)
        ctx.save_for_backward(logits_old, logits_new, log_p, log_q)
        return categorical_kl_of(log_p, log_q).to(logits_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits_old, logits_new, log_p, log_q = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for: it needs the way from the logits
            log_p, log_q = log_probs_64(logits_old), log_probs_64(logits_new)
        grad = grads[0].unsqueeze(-1)
        to_old = to_new = None
        if ctx.needs_input_grad[0]:
            to_old = categorical_kl_to_old(log_p, log_q).to(logits_old.dtype) * grad
        if ctx.needs_input_grad[1]:
            to_new = categorical_kl_to_new(log_p, log_q).to(logits_new.dtype) * grad
        return to_old, to_new


def categorical_kl_to_new(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d KL(p || q) / d logits of q, [..., n]: q - p."""
    return log_q.exp() - log_p.exp()


def categorical_kl_to_old(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d KL(p || q) / d logits of p, [..., n]: p * (log p - log q - KL), where sum p * (log p - log q) = KL."""
    p = log_p.exp()
    ratio = torch.where(p <= _NO_MASS, 0.0, log_p - log_q)
    return p * (ratio - (p * ratio).sum(dim=-1, keepdim=True))


def normal_kl(mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
    """KL(old || new) per dimension of normals, elementwise: ((mu_new - mu_old)/sigma_new)^2/2 + phi(2 log ratio)/2.

    The four tensors have one shape, and so has the result.
    Source: the standard form log(s_new/s_old) + (s_old^2 + d^2)/(2 s_new^2) - 1/2, regrouped so that it cannot cancel.
    """
    parameters = (mean_old, log_std_old, mean_new, log_std_new)
    if not torch.is_grad_enabled():
        return _normal_kl(*parameters)
    result: Tensor = _NormalKL.apply(*parameters)  # type: ignore[no-untyped-call]
    return result


def _normal_kl(mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
    z = (mean_new - mean_old) * torch.exp(-log_std_new)
    return torch.addcmul(_phi(2 * (log_std_old - log_std_new)), z, z).mul_(0.5)


def normal_kl_gradient(
    mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``normal_kl``'s derivatives in mean_new (in mean_old it is minus that), log_std_new and log_std_old."""
    inverse_std = torch.exp(-log_std_new)
    z = (mean_new - mean_old) * inverse_std
    growth = torch.expm1(2 * (log_std_old - log_std_new))
    return z * inverse_std, -torch.addcmul(growth, z, z), growth


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
        ctx.save_for_backward(mean_old, log_std_old, mean_new, log_std_new)
        return _normal_kl(mean_old, log_std_old, mean_new, log_std_new)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_mean, to_log_std, to_log_std_old = normal_kl_gradient(*ctx.saved_tensors)
        gradients = (-to_mean, to_log_std_old, to_mean, to_log_std)
        needed = zip(gradients, ctx.needs_input_grad, strict=True)
        return tuple(grads[0] * gradient if wanted else None for gradient, wanted in needed)


def normal_kl_of_scale(mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
    """The same from standard deviations: with z = (mu_new - mu_old)/sigma_new and c = sigma_old/sigma_new - 1,

    z^2/2 + c^2/2 + (c - log(1 + c)), where no term is negative.
    """
    parameters = (mean_old, std_old, mean_new, std_new)
    if not torch.is_grad_enabled():
        return _normal_kl_of_scale(*parameters)[0]
    result: Tensor = _ScaleNormalKL.apply(*parameters)  # type: ignore[no-untyped-call]
    return result


def _normal_kl_of_scale(
    mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z = (mean_new - mean_old).div_(std_new)
    c = (std_old - std_new).div_(std_new)
    if state.may_look() and c.is_cpu and c.numel() and float(c.min()) > -0.9:
        ratio = c.to(torch.float64, copy=True).add_(1.0)
    else:  # too little of the ratio is left in c; dividing in float64 takes several times as long
        ratio = std_old.double() / std_new
    # ratio - 1 is exact near 1 and the logarithm precise relative to itself, so their difference does not see what the
    # ratio was rounded by.
    logarithm = ratio.log()
    excess = ratio.sub_(1.0).sub_(logarithm).to(z.dtype)  # what rounding takes off it is far below c^2 / 2
    return excess.addcmul_(z, z, value=0.5).addcmul_(c, c, value=0.5), z, c


class _ScaleNormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
        value, z, c = _normal_kl_of_scale(mean_old, std_old, mean_new, std_new)
        ctx.save_for_backward(mean_old, std_old, mean_new, std_new, z, c)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean_old, std_old, mean_new, std_new, z, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for: it needs the way from the parameters
            z, c = (mean_new - mean_old) / std_new, (std_old - std_new) / std_new
        grad = grads[0]
        gradients: list[Tensor | None] = [None] * 4
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            to_mean = grad * (z / std_new)
            gradients[0], gradients[2] = -to_mean, to_mean
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            growth = c * (2.0 + c)
            gradients[1] = grad * (growth / std_old)
            gradients[3] = -grad * ((z * z + growth) / std_new)
        return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def beta_kl(one_old: Tensor, zero_old: Tensor, one_new: Tensor, zero_new: Tensor) -> Tensor:
    """KL(old || new) of Betas by their concentrations at 1 and at 0, elementwise, in float64, >= 0.

    In an exponential family it is the Bregman divergence of the log-normaliser: log G(a) + log G(b) - log G(a + b).
    """
    (a, b, c, d) = (x.double() for x in (one_old, zero_old, one_new, zero_new))
    parts = [lgamma_excess(x, y) for x, y in ((a, c), (b, d), (a + b, c + d))]
    return (parts[0] + parts[1] - parts[2]).clamp_min(0.0)


def lgamma_excess(x: Tensor, y: Tensor) -> Tensor:
    """log G(y) - log G(x) - (y - x) digamma(x) for float64 x, y > 0: that of log-gamma over its tangent at x, >= 0."""
    d = y - x
    near = d.abs() < 0.1 * x
    # By Taylor's theorem it is d^2 times the integral of (1 - s) trigamma(x + s d) over s from 0 to 1, where the
    # difference would cancel: six nodes of Gauss and Legendre give it to 5e-10, as precisely as torch has trigamma.
    curvature = sum(w * (1 - s) * torch.polygamma(1, x + s * torch.where(near, d, 0.0)) for s, w in _GAUSS_LEGENDRE)
    return torch.where(near, d * d * curvature, torch.lgamma(y) - torch.lgamma(x) - d * torch.digamma(x))
