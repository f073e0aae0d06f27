"""TRPO (Schulman et al. 2015): the natural gradient step within an exact limit on KL, checked on the whole batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from gymnasium import spaces
from torch import Tensor

from klrl.agents.base import KLConfig, Report, bounded_kl
from klrl.agents.on_policy import Batch, OnPolicyAgent, OnPolicyConfig, value_gradient
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import NonNegative, Positive, PositiveInt, Range
from klrl.errors import SkippedUpdateError, UsageError
from klrl.kl import fisher_vector_product
from klrl.kl.trust_region import NaturalStep, Searched, line_search, natural_step

Piece = tuple[Any, Batch]  # rows of a batch, and the policy at them with its Jacobian, as Actor.linearize gives them
# The line search leaves nothing to penalise, to stop or to take back: these settings of the group have one value.
_HELD = {"penalty": "none", "coef": 1.0, "stop": 0.0, "check": "update", "on_overshoot": "keep"}


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    batch_size: PositiveInt = 128
    """Rows of a minibatch of the critic's; must divide n_envs * n_steps."""
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
    fisher_share: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of the states that the Fisher matrix is averaged over; KL and improvement are measured on all."""
    kl: KLConfig = field(default_factory=lambda: KLConfig(target=0.01, **_HELD))  # type: ignore[arg-type]


class TRPO(OnPolicyAgent):
    """Trust region policy optimisation for Box, Discrete, MultiDiscrete and MultiBinary actions.

    KL of old and new policy, summed over action dimensions and averaged over states, is at most ``kl.target`` after
    every update: an update that cannot improve within that leaves the policy as it was, bit for bit, and says why.
    """

    config: TRPOConfig

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: TRPOConfig | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        config = config or TRPOConfig()
        for name, value in _HELD.items():
            if getattr(config.kl, name) != value:
                option = f"--kl.{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {getattr(config.kl, name)}: TRPO's line search holds the KL, leave it {value}"
                )
        if config.kl.target == 0:
            raise UsageError("--kl.target 0: TRPO's step has the length that its KL limit allows, so it needs one")
        super().__init__(observation_space, action_space, config, device, seed)

    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> Report:
        """Take one natural step within the KL limit, fit the critic, and report how far the policy moved.

        Raises NonFiniteError naming the field where the rollout is not finite, and SkippedUpdateError where the
        gradient or the critic's fit is not; policy, critic, optimizer and reward scale are then as before it.
        """
        config, before = self.config, self.snapshot()
        batch, valid = self.beliefs(rollout)
        batch = replace(batch, weight=batch.weight / batch.weight.sum())
        pieces = [(self.actor.linearize(part.inputs), part) for part in batch.chunks()]
        gradient = self._gradient(pieces)
        if not bool(gradient.isfinite().all()):
            self.undo(before)
            raise SkippedUpdateError(f"the policy's gradient is not finite in update {self.n_updates + 1}")
        step, searched = None, Searched(0.0, 0.0, 0.0, 0.0, "no_improvement")
        if bool(gradient.any()):
            fisher = self.fisher(pieces if config.fisher_share == 1 else self._some(batch))
            step = natural_step(fisher, gradient, config.kl.target, config.cg_damping, config.cg_max_steps)
            searched = searched._replace(rejected="curvature") if step is None else self._search(batch, valid, step)

        report, _ = self.measure_move(batch, valid)
        report = replace(report, attempted=searched.first_kl, rolled_back=float(searched.rejected != ""))
        value_loss = self._fit_critic(batch)
        if not (math.isfinite(value_loss) and bool(self.parameters.vector.isfinite().all())):
            self.undo(before)
            raise SkippedUpdateError(f"value_loss is {value_loss} in update {self.n_updates + 1}")
        metrics = self._figures(step, searched) | self.diagnostics(batch, valid) | {"train/value_loss": value_loss}
        self.finish(rollout, valid)
        return Report(report, metrics)

    def _gradient(self, pieces: list[Piece]) -> Tensor:
        """The gradient of E[ratio * A] at the old policy, where the ratio is 1: E[A * d log pi], float64 [P]."""
        self.parameters.zero_grad()
        for (policy, _, pullback), part in pieces:
            pullback(*policy.gradient(part.action, part.weight * part.advantage, part.old))
        return self.parameters.grad[self.parameters.parts[0]].to(torch.float64, copy=True)

    def _some(self, batch: Batch) -> list[Piece]:
        """A random share of the states, for the Fisher matrix."""
        count = max(1, round(self.config.fisher_share * len(batch.weight)))
        some = batch.take(torch.from_numpy(self.rng.permutation(len(batch.weight))[:count]).to(self.device))
        some = replace(some, weight=some.weight / some.weight.sum().clamp_min(1e-30))
        return [(self.actor.linearize(part.inputs), part) for part in some.chunks()]

    def fisher(self, pieces: list[Piece]) -> Callable[[Tensor], Tensor]:
        """v to F v in weight space, float64 [P]: F = E[J^T M J], J the Jacobian of the distribution's parameters in the
        weights and M their Fisher information.

        That is the Hessian of KL(old||new) at new = old, without second derivatives (Martens 2020, section 9).
        """
        parameters, policy_part = self.parameters, self.parameters.parts[0]

        def product(vector: Tensor) -> Tensor:
            tangent = parameters.like(vector.to(parameters.vector.dtype), 0)
            parameters.grad[policy_part].zero_()
            for (policy, pushforward, pullback), part in pieces:
                moved = fisher_vector_product(policy, *pushforward(tangent))
                pullback(*(x * part.weight.view(-1, *[1] * (x.dim() - 1)) for x in moved))
            return parameters.grad[policy_part].to(torch.float64, copy=True)

        return product

    def _search(self, batch: Batch, valid: Tensor, step: NaturalStep) -> Searched:
        """Backtrack along the step; improvement E[(ratio - 1) * A] and KL are those of the whole batch."""

        def measure() -> tuple[float, float]:
            new = self.distribution(batch.inputs)
            ratio_less_1 = torch.expm1(new.log_prob(batch.action) - batch.log_prob)
            improvement = float(batch.weight @ (ratio_less_1 * batch.advantage))
            return improvement, bounded_kl(batch.old, new, self.config.kl.direction, valid)

        weights = self.parameters.vector[self.parameters.parts[0]]
        return line_search(weights, step.step, measure, self.config.kl.target, self.config.line_search_max_iter)

    def _fit_critic(self, batch: Batch) -> float:
        """Adam on E[(V - return)^2] over minibatches; the mean of that loss."""
        config, parameters, part = self.config, self.parameters, self.parameters.parts[1]
        losses = []
        scale = len(batch.weight) / config.batch_size
        for _ in range(config.n_critic_updates):
            order = torch.from_numpy(self.rng.permutation(len(batch.weight))).to(self.device)
            shuffled = batch.take(order)
            for start in range(0, len(order), config.batch_size):
                minibatch = shuffled.take(slice(start, start + config.batch_size))
                value, pullback = self.critic.linearize(minibatch.inputs)
                loss, to_value = value_gradient(value, minibatch, 0.0)
                parameters.grad[part].zero_()
                pullback(scale * to_value)
                parameters.adam_step(config.learning_rate, only=1)
                losses.append(loss)
        return scale * float(torch.stack(losses).mean())

    def _figures(self, step: NaturalStep | None, searched: Searched) -> dict[str, float]:
        """The step as predicted and as it was. One tag for each reason says what refused it."""
        figures = {
            "train/step_fraction": searched.share,
            "train/accepted": float(searched.rejected == ""),
            "train/improvement": searched.improvement,
        }
        if step is not None:
            # The quadratic model says the limit for the whole step, and the share's square of it for a share.
            figures |= {
                "kl/predicted": searched.share**2 * self.config.kl.target,
                "train/predicted_improvement": searched.share * step.improvement,
                "train/cg_residual": step.residual,
                "train/cg_iterations": step.iterations,
                "train/cg_damping": step.damping,
            }
        reasons = ("no_improvement", "kl", "curvature", "nonfinite")
        return figures | {f"health/rejected_{reason}": float(searched.rejected == reason) for reason in reasons}
