"""The policies of klrl's heads on a minibatch, in NumPy, with the derivatives of what ``policy_loss`` is made of.

``move`` takes up the network's outputs and the batch's old policy; the others are about the policy that it moved to.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np

from klrl.policies.distributions import LOG_SQRT_TWO_PI
from klrl.policies.heads import CategoricalHead, NormalHead
from klrl.policies.networks import Array
from klrl.policies.spaces import MASK


def _largest(x: Array) -> Array:
    """The largest number of each row, [..., 1]. Along a short last axis NumPy's own takes several times as long."""
    columns = x.shape[-1]
    return reduce(np.maximum, (x[..., i, None] for i in range(columns))) if columns <= 8 else x.max(-1, keepdims=True)


class NormalSlopes:
    """``NormalHead``'s policy on a minibatch, with the derivatives of what a loss is made of."""

    def __init__(self, head: NormalHead, to_log_std: Array) -> None:
        """``to_log_std``: where the gradient in log_std is written, [d]."""
        self.log_std, self.to_log_std = head.log_std.detach().numpy(), to_log_std
        self.center, self.scale = head.center.numpy(), head.scale.numpy()

    def move(self, output: Array, batch: Any) -> Array:
        """Take up outputs [B, d] and the batch's old policy; log pi of its actions, [B]."""
        self.old_log_std, self.inverse_std = batch.old[1], np.exp(-self.log_std)
        mean = output * self.scale
        mean += self.center
        self.z = (batch.action - mean) * self.inverse_std
        self.z_squared = self.z * self.z
        mean -= batch.old[0]
        self.moved = mean
        constant = self.log_std.sum() + len(self.log_std) * LOG_SQRT_TWO_PI
        return self.z_squared.sum(-1) * -0.5 - constant

    def kl(self, direction: str) -> Array:
        """The KL of each state, [B], as ``klrl.kl.normal_kl`` has it."""
        forward = direction == "forward"
        x = 2 * (self.old_log_std - self.log_std) if forward else 2 * (self.log_std - self.old_log_std)
        z = self.moved * (self.inverse_std if forward else np.exp(-self.old_log_std))
        terms = np.expm1(x) - x
        terms += z * z
        return terms.sum(-1) * 0.5

    def gradient(self, to_log_prob: Array, to_kl: Array | None, to_entropy: Array | None, direction: str) -> Array:
        """d/d outputs [B, d] of sum_b to_log_prob * log pi(a) + to_kl * KL + to_entropy * H, each weight [B].

        With z = (a - mu)/sigma that of log pi is (z/sigma, z^2 - 1) in mean and log_std, and H's is (0, 1).
        """
        self.to_log_std[:] = to_log_prob @ self.z_squared - to_log_prob.sum()
        to_mean = self.z * to_log_prob[:, None]
        to_mean *= self.inverse_std
        if to_kl is not None:
            forward = direction == "forward"
            inverse_std = self.inverse_std if forward else np.exp(-self.old_log_std)
            z = self.moved * inverse_std
            if forward:
                growth = np.expm1(2 * (self.old_log_std - self.log_std))
                growth += z * z
                self.to_log_std -= to_kl @ growth
            else:
                self.to_log_std += to_kl @ np.expm1(2 * (self.log_std - self.old_log_std))
            z *= inverse_std
            z *= to_kl[:, None]
            to_mean += z
        if to_entropy is not None:
            self.to_log_std += to_entropy.sum()
        to_mean *= self.scale
        return to_mean

    def push(self, moved: Array, rest: Iterator[Array]) -> tuple[Array, ...]:
        """How mean and log_std [B, d] move, where outputs [B, d] and the head's own weights, ``rest``'s next, do."""
        return moved * self.scale, np.broadcast_to(next(rest), moved.shape).copy()

    def pull(self, to_mean: Array, to_log_std: Array) -> Array:
        """The gradient in the outputs, [B, d], and in log_std, of one in mean and log_std [B, d]."""
        np.add.reduce(to_log_std, 0, out=self.to_log_std)
        return to_mean * self.scale


class CategoricalSlopes:
    """``CategoricalHead``'s policy on a minibatch, as ``NormalSlopes``."""

    def __init__(self, head: CategoricalHead, _: Array) -> None:
        self.shape, self.part = head.shape, np.arange(head.shape[0])
        self.padding = head.padding.numpy()
        self.index = head.index.numpy() if head.padded else None

    def _spread(self, output: Array, padding: float) -> Array:
        """Numbers [B, sum of sizes] as [B, k, n], padded."""
        if self.index is None:
            return output.reshape(-1, *self.shape)
        spread = output[:, self.index].reshape(-1, *self.shape)
        spread[:, self.padding] = padding
        return spread

    def _gather(self, spread: Array) -> Array:
        flat = spread.reshape(len(spread), -1)
        return flat if self.index is None else np.ascontiguousarray(flat[:, ~self.padding.flatten()])

    def move(self, output: Array, batch: Any) -> Array:
        self.old_log_probs, self.old_probs = batch.old
        self.allowed = None if self.index is None else ~self.padding
        if MASK in batch.inputs:
            output = np.where(batch.inputs[MASK], output, np.float32(-np.inf))
            self.allowed = self.old_log_probs > -np.inf
        logits = self._spread(output, -np.inf)
        logits = logits - _largest(logits)
        probs = np.exp(logits)
        total = np.add.reduce(probs, -1, keepdims=True)
        probs /= total
        logits -= np.log(total, out=total)
        self.log_probs, self.probs = logits, probs
        self.taken = np.arange(len(output))[:, None], self.part, batch.action
        return logits[self.taken].sum(-1)

    def _log_ratio(self) -> Array:
        """log new - log old, [B, k, n]; 0 where a choice is padding or forbidden."""
        if self.allowed is None:
            return self.log_probs - self.old_log_probs
        return np.subtract(self.log_probs, self.old_log_probs, out=np.zeros_like(self.probs), where=self.allowed)

    def kl(self, direction: str) -> Array:
        x = self._log_ratio()
        if direction == "reverse":
            x *= -1
        terms = np.expm1(x)
        terms -= x
        terms *= self.old_probs if direction == "forward" else self.probs
        return terms.sum((-2, -1))

    def gradient(self, to_log_prob: Array, to_kl: Array | None, to_entropy: Array | None, direction: str) -> Array:
        """In the logits, per categorical, that of log pi is onehot(a) - p, and H's -p * (log p + H)."""
        a, p = to_log_prob[:, None, None], self.probs
        result = p * -a
        if to_kl is not None:
            if direction == "forward":
                to_new = p - self.old_probs
            else:
                x = self._log_ratio()
                to_new = p * (x - (p * x).sum(-1, keepdims=True))
            to_new *= to_kl[:, None, None]
            result += to_new
        if to_entropy is not None:
            finite = np.maximum(self.log_probs, np.finfo(p.dtype).min)
            finite -= (p * finite).sum(-1, keepdims=True)
            finite *= p
            finite *= to_entropy[:, None, None]
            result -= finite
        result[self.taken] += to_log_prob[:, None]
        return self._gather(result)

    def push(self, moved: Array, rest: Iterator[Array]) -> tuple[Array, ...]:
        return (self._spread(moved, 0.0),)

    def pull(self, to_logits: Array) -> Array:
        return self._gather(to_logits)
