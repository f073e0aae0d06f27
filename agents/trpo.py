"""TRPO (Schulman et al. 2015): the natural gradient step within an exact limit on KL, checked on the whole batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from klrl.agents.base import CHUNK, UpdateResult
from klrl.agents.fused import FusedCritic, FusedPolicy, Rows, applies, suits
from klrl.agents.limits import KLTarget
from klrl.agents.on_policy import Batch, OnPolicyAgent, OnPolicyConfig, value_loss
from klrl.agents.reference import Reference, ReferenceConfig
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import NonNegative, Positive, PositiveInt, Range
from klrl.errors import SkippedUpdateError, UsageError
from klrl.kl import Move, fisher_vector_product
from klrl.kl.hold import as_leaves
from klrl.kl.parameters import parameters_of
from klrl.kl.trust_region import LineSearch, NaturalStep, line_search, natural_step
from klrl.policies.jacobian import Pull, Push, jacobian
from klrl.policies.memory import SEQUENCE
from klrl.policies.networks import OwnNetwork
from klrl.policies.parameters import adam_step, gradients
from klrl.policies.threads import on_torchs_threads


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    batch_size: PositiveInt = 128
    """Rows of a minibatch of the critic's; the last of a rollout has what is left."""
    learning_rate: Positive = 1e-3
    """Adam's step size for the critic."""
    n_critic_updates: PositiveInt = 10
    """Passes of the critic over a rollout in each update."""
    cg_max_steps: PositiveInt = 10
    """Products with the Fisher matrix in each update's conjugate gradient, at most."""
    cg_damping: NonNegative = 0.1
    """Added to the Fisher matrix's diagonal at first; raised where the curvature is not positive."""
    line_search_max_iter: PositiveInt = 10
    """Trials along the step before an update is given up."""
    fisher_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Fraction of the states that the Fisher matrix is averaged over; KL and improvement are measured on all."""
    kl: KLTarget = field(default_factory=lambda: KLTarget(target=0.01))
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


Piece = tuple[Batch, Any, Push, Pull]
"""Rows of a batch, the policy at them, and its parameters' Jacobian in the weights, as ``jacobian`` gives it."""


def improvement(new: Any, batch: Batch) -> Tensor:
    """E[(ratio - 1) A]: what the surrogate gains over the old policy, where it is 0.

    Source: Schulman et al. (2015), equation 14, less its value at the old policy.
    """
    return batch.weight @ (torch.expm1(new.log_prob(batch.action) - batch.log_prob) * batch.advantage)


def objective(new: Any, batch: Batch, reference: Reference) -> Tensor:
    """``improvement`` less b E[KL(new||reference)], where there is a reference."""
    distance = reference.term(batch.reference, new)
    return improvement(new, batch) - (batch.weight @ distance if isinstance(distance, Tensor) else 0.0)


class TRPO(OnPolicyAgent):
    """Trust region policy optimisation for Box, Discrete, MultiDiscrete and MultiBinary actions.

    KL of old and new policy, summed over action dimensions and averaged over states, is at most ``kl.target`` after
    every update: an update that cannot improve within that leaves the policy as it was, bit for bit, and says why. The
    KL to a reference is a second limit; above it, no update may increase it.
    """

    Config: ClassVar[type[OnPolicyConfig]] = TRPOConfig
    captures: tuple[str, ...] = ("_step",)
    fused: FusedCritic | None = None

    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        if self.config.kl.target == 0:
            raise UsageError("--kl.target 0: TRPO's step has the length that its KL limit allows, so it needs one")
        super().setup(init, network)
        if self.config.memory != "none":
            self.captures = ()  # sequences have a form of their own each time
        if ":" in self.config.head:
            probe = self.policy_at(self.encoder.probe())
            try:
                fisher_vector_product(probe, *map(torch.zeros_like, parameters_of(probe)))
            except ValueError as problem:
                raise UsageError(f"head {self.config.head} does not suit TRPO: {problem}") from None

    @on_torchs_threads
    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> UpdateResult:
        """Take one natural step within the KL limit, fit the critic, and report how far the policy moved.

        Raises NonFiniteError naming the field where the rollout is not finite, and SkippedUpdateError where the
        gradient or the critic's fit is not; policy, critic, optimizer and reward scale are then as before it.
        """
        before = self.snapshot()
        batch = self.make_batch(rollout)
        with self.hold(batch) as move:
            pieces = self._linearize(batch)
            gradient = self._gradient(pieces)
            if not bool(gradient.isfinite().all()):
                self.undo(before)
                raise SkippedUpdateError(f"the policy's gradient is not finite in update {self.n_updates + 1}")
            step, searched = None, LineSearch(0.0, 0.0, 0.0, 0.0, "no_improvement")
            attempted: tuple[float, float | None] = 0.0, None
            if bool(gradient.any()):
                step = self._natural_step(batch, pieces, gradient)
                searched = searched._replace(rejected="curvature")
                if step is not None:
                    searched, attempted = self._search(batch, step, move)
        loss = self._fit_critic(batch)
        if not (math.isfinite(loss) and bool(self.critic_params.flat.isfinite().all())):
            self.undo(before)
            raise SkippedUpdateError(f"value_loss is {loss} in update {self.n_updates + 1}")
        distance = self.reference.end(move.new, batch.reference, batch.mask, attempted[1])
        self.end_update(rollout)
        report = replace(move.report, attempted=attempted[0], rolled_back=float(searched.rejected != ""))
        metrics = self._metrics(step, searched) | {"train/value_loss": loss}
        return UpdateResult(report, metrics | distance | self.diagnostics(batch))

    def _linearize(self, batch: Batch) -> list[Piece]:
        """The policy at the batch's states, with its Jacobian in the weights, chunk by chunk."""
        params, pieces = self.policy_params, []
        whole = SEQUENCE in batch.inputs
        for part in [batch] if whole else (batch.take(slice(i, i + CHUNK)) for i in range(0, len(batch.weight), CHUNK)):
            if suits(self.policy, params):
                pieces.append((part, *FusedPolicy(self.policy).linearize(part.inputs, params)))
                continue
            with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # its RNNs have no second derivative
                policy = self.policy(part.inputs)
            pieces.append((part, policy, *jacobian(parameters_of(policy), params)))
        return pieces

    def _gradient(self, pieces: list[Piece]) -> Tensor:
        """The gradient of ``objective`` at the old policy, float64 [P]."""
        total = torch.zeros_like(self.policy_params.flat)
        for part, policy, _, pull in pieces:
            with torch.enable_grad():
                policy, leaves = as_leaves(policy)
                slopes = torch.autograd.grad(objective(policy, part, self.reference), leaves)
            total += pull(slopes)
        return self.ranks.total(total.double())[0]

    def _natural_step(self, batch: Batch, pieces: list[Piece], gradient: Tensor) -> NaturalStep | None:
        config, rows = self.config, len(batch.weight)
        count = max(1, round(config.fisher_fraction * rows))
        if count < rows:
            some = batch.take(torch.from_numpy(self.rng.permutation(rows)[:count]).to(self.device))
            (whole,) = self.ranks.total(some.weight.sum())
            pieces = self._linearize(replace(some, weight=some.weight / whole.clamp_min(1e-30)))
        return natural_step(self.fisher(pieces), gradient, config.kl.target, config.cg_damping, config.cg_max_steps)

    def fisher(self, pieces: list[Piece]) -> Callable[[Tensor], Tensor]:
        """v to F v in weight space, float64 [P]: F = E[J^T M J], J the Jacobian of the distribution's parameters in the
        weights and M their Fisher information.

        That is the Hessian of KL(old||new) at new = old, without second derivatives (Martens 2020, section 9).
        """

        def product(vector: Tensor) -> Tensor:
            direction, total = vector.to(self.policy_params.flat.dtype), torch.zeros_like(self.policy_params.flat)
            for part, policy, push, pull in pieces:
                moved = fisher_vector_product(policy, *push(direction))
                total += pull([x * part.weight.view(-1, *[1] * (x.dim() - 1)) for x in moved])
            return self.ranks.total(total.double())[0]

        return product

    def _search(self, batch: Batch, step: NaturalStep, move: Move) -> tuple[LineSearch, tuple[float, float]]:
        """Backtrack along the step, by the objective and by the KLs as fractions of their limits, of the whole batch.

        Returns the KLs of the whole step beside it, from the old policy and to the reference, in nats.
        """
        reached = []
        held = self.reference
        at_first = objective(batch.old, batch, held)
        first = held.distance(batch.reference, batch.old, batch.mask)

        def measure() -> tuple[float, float]:
            new = self.policy_at(batch.inputs)
            excess = move.excess(new)
            distance = held.distance(batch.reference, new, batch.mask) if math.isfinite(excess) else math.inf
            reached.append((move.reached, distance))
            if not math.isfinite(distance):
                return -math.inf, math.inf
            excess = max(excess, held.excess(first, distance))
            return self.ranks.sum(float(objective(new, batch, held) - at_first))[0], excess

        found = line_search(self.policy_params.flat, step.step, measure, 1.0, self.config.line_search_max_iter)
        return found, reached[0]

    def _fit_critic(self, batch: Batch) -> float:
        """Take passes of Adam on ``value_loss`` over minibatches; the mean of that loss."""
        config = self.config
        self.fused = FusedCritic(self.critic) if applies(self.critic, self.critic_params) else None
        learning_rate = torch.tensor(config.learning_rate, device=self.device)
        rows = batch if self.fused is None else Rows.of(batch)
        losses = [
            self._step(minibatch, learning_rate)
            for _ in range(config.n_critic_updates)
            for minibatch in rows.minibatches(config.batch_size, self.rng)
        ]
        return float(torch.stack(losses).mean())

    def _step(self, minibatch: Batch, learning_rate: Tensor) -> Tensor:
        """Take one step of the critic's Adam on a minibatch; the loss."""
        if self.fused is not None:
            loss, gradient = self.fused.gradient(minibatch, 0.0, 1.0)
        else:
            with torch.enable_grad():
                loss = value_loss(self.critic(minibatch.inputs), minibatch)
                gradient = gradients(loss + self.critic.cost(minibatch), self.critic_params)
        loss, gradient = self.ranks.total(loss.detach(), gradient)
        adam_step(gradient, learning_rate, self.critic_params)
        return loss

    def _metrics(self, step: NaturalStep | None, searched: LineSearch) -> dict[str, float]:
        """The step as predicted and as it was. One tag for each reason says what refused it."""
        metrics = {
            "train/step_fraction": searched.fraction,
            "train/accepted": float(searched.rejected == ""),
            "train/improvement": searched.improvement,
        }
        if step is not None:
            # The quadratic model says the limit for the whole step, and the fraction's square of it for a fraction.
            metrics |= {
                "kl/predicted": searched.fraction**2 * self.config.kl.target,
                "train/predicted_improvement": searched.fraction * step.improvement,
                "train/cg_residual": step.residual,
                "train/cg_iterations": step.iterations,
                "train/cg_damping": step.damping,
            }
        reasons = ("no_improvement", "kl", "curvature", "nonfinite")
        return metrics | {f"health/rejected_{reason}": float(searched.rejected == reason) for reason in reasons}
