"""The KL formulas themselves, on parameter tensors, with their gradients in closed form.

Each is one autograd function: the value is computed in float64 without a graph, and the backward pass is the
derivative written out, which is both exact and several times cheaper than differentiating the forward pass.
"""

from typing import Any

import torch
from torch import Tensor

_FAR = 20.0  # beyond this log-ratio, probabilities that float32 has lost could matter
_NO_MASS = 1e-300  # a probability below this is 0: its products with e^x could overflow before they cancel


def phi(x: Tensor) -> Tensor:
    """e^x - 1 - x for float64 ``x``, elementwise, >= 0: the excess of e^x over its tangent at 0."""
    return torch.expm1(x).sub_(x).clamp_min_(0.0)


def categorical_kl(logits_old: Tensor, logits_new: Tensor) -> Tensor:
    """KL(old || new) of categoricals given by unnormalised logits of shape [..., n]; the result has shape [...].

    -inf marks a forbidden action. Gradients: d/d logits_new = softmax(new) - softmax(old), finite wherever the logits
    are; d/d logits_old = p * (log p - log q - KL).
    """
    result: Tensor = _CategoricalKL.apply(logits_old, logits_new)  # type: ignore[no-untyped-call]
    return result


def categorical_kl_of(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The same without gradients, from each side's ``exact_probs``, which a loop of measurements computes once."""
    (log_p, p), (log_q, q) = old, new
    x = log_q - log_p
    # Where old forbids an action (p = 0, x = inf or nan) the term's limit is q; where only new does, it is inf.
    return torch.where(p < _NO_MASS, q, phi(x).mul_(p)).sum(dim=-1)


def exact_probs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-probabilities and probabilities in float64, [..., n]."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return log_probs, log_probs.exp()


def normal_kl(mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
    """KL(old || new) per dimension of normals, elementwise: ((mu_new - mu_old)/sigma_new)^2/2 + phi(2 log ratio)/2.

    The four tensors have one shape, and so has the result, in ``mean_new``'s dtype.
    Source: the standard form log(s_new/s_old) + (s_old^2 + d^2)/(2 s_new^2) - 1/2, regrouped so that it cannot cancel.
    """
    result: Tensor = _NormalKL.apply(mean_old, log_std_old, mean_new, log_std_new)  # type: ignore[no-untyped-call]
    return result


def normal_kl_of_scale(mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
    """The same from standard deviations instead of their logarithms."""
    result: Tensor = _ScaleNormalKL.apply(mean_old, std_old, mean_new, std_new)  # type: ignore[no-untyped-call]
    return result


class _CategoricalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_old: Tensor, logits_new: Tensor) -> Tensor:
        # With any reference r and x = logits_new - logits_old - r, KL = log1p(sum p expm1 x) - sum p x, which
        # needs one exponential per logit. In float64 the difference of float32 logits is exact, and r = sum p d makes
        # both sums second order in x, as KL is; p itself may then have float32's accuracy.
        p = torch.softmax(logits_old, dim=-1)
        d = logits_new.double() - logits_old
        x = d - (p * d).sum(dim=-1, keepdim=True)
        least, most = torch.aminmax(x) if x.numel() else (x.sum(), x.sum())
        if bool((least > -_FAR) & (most < _FAR)):
            growth = torch.expm1(x)
            weight = p.double()
            weight /= weight.sum(dim=-1, keepdim=True)
            s = (weight * growth).sum(dim=-1)
            value = torch.log1p(s).sub_((weight * x).sum(dim=-1)).clamp_min_(0.0)
            q = weight * (1.0 + growth) / (1.0 + s).unsqueeze(-1) if ctx.needs_input_grad[1] else weight
            ctx.save_for_backward(weight, q, x)
        else:  # forbidden actions, overflow, or nan
            old, new = exact_probs(logits_old), exact_probs(logits_new)
            value = categorical_kl_of(old, new)
            ctx.save_for_backward(old[1], new[1], new[0] - old[0])
        return value.to(logits_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q, x = ctx.saved_tensors
        grad = grads[0].double().unsqueeze(-1)
        to_old = to_new = None
        if ctx.needs_input_grad[0]:  # p * (log p - log q - KL), where sum p * (log p - log q) = KL
            ratio = torch.where(p < _NO_MASS, 0.0, -x)
            to_old = grad * p * (ratio - (p * ratio).sum(dim=-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            to_new = grad * (q - p)
        return to_old, to_new


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
        log_std = log_std_new.double()
        u = 2.0 * (log_std_old.double() - log_std)
        inverse_std = torch.exp(-log_std)
        z = (mean_new.double() - mean_old.double()) * inverse_std
        ctx.save_for_backward(z, u, inverse_std)
        ctx.dtypes = (mean_old.dtype, log_std_old.dtype, mean_new.dtype, log_std_new.dtype)
        return (0.5 * (z * z + phi(u))).to(mean_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, u, inverse_std = ctx.saved_tensors
        grad = grads[0].double()
        to_mean = grad * z * inverse_std
        growth = torch.expm1(u)
        to_log_std_new = -grad * (z * z + growth)
        gradients = (-to_mean, grad * growth, to_mean, to_log_std_new)
        return tuple(
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=True)
        )


class _ScaleNormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
        z = (mean_new - mean_old) / std_new
        ratio = std_old.double() / std_new
        # r^2 - 1 - 2 log r; the float64 of float32 inputs leaves it an error of 1e-16, whatever r is.
        spread = torch.log(ratio).mul_(-2.0).add_(ratio * ratio).sub_(1.0).clamp_min_(0.0)
        ctx.save_for_backward(z, ratio, std_new)
        return (z * z).add_(spread).mul_(0.5).to(mean_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, ratio, std_new = ctx.saved_tensors
        grad = grads[0]
        gradients: list[Tensor | None] = [None] * 4
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            to_mean = grad * z / std_new
            gradients[0], gradients[2] = -to_mean, to_mean
        if ctx.needs_input_grad[1]:
            gradients[1] = (grad * (ratio - 1 / ratio) / std_new).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            gradients[3] = (grad * (1 - z * z - ratio * ratio) / std_new).to(grad.dtype)
        return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))
