"""PPO with an exact KL penalty (Schulman et al. 2017, section 4), optionally clipped as well or instead."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Tensor

from klrl.agents.base import Report, State
from klrl.agents.on_policy import Batch, OnPolicyAgent, OnPolicyConfig, value_gradient
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import NonNegative, Positive, PositiveInt
from klrl.errors import NonFiniteError, SkippedUpdateError, UsageError
from klrl.kl import Banded, KLReport, Penalty
from klrl.kl.trust_region import project
from klrl.policies.distributions import PolicyDistribution


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    n_epochs: PositiveInt = 10
    """Passes over a rollout in each update."""
    learning_rate: Positive = 3e-4
    """Adam's step size at the start."""
    lr_schedule: Literal["constant", "linear", "kl"] = "constant"
    """Keep it, lower it linearly to 0 over the run, or move it by 1.5 when KL leaves target/2 to 2 * target."""
    clip_range: NonNegative = 0.0
    """Clip the probability ratio to 1 +- this; 0 leaves it to the KL penalty."""
    clip_range_vf: NonNegative = 0.0
    """Clip a value's change within an update to +- this; 0 does not clip. Depends on the rewards' scale."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the value loss beside the policy's."""
    max_grad_norm: Positive = 0.5
    """Longest gradient, of policy and critic together; a longer one is scaled down."""


_TRACED = ("train/policy_gradient_loss", "train/value_loss", "health/grad_norm")


def policy_gradient(
    new: PolicyDistribution, batch: Batch, config: PPOConfig, penalty: Penalty | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss -E[ratio * A] and the gradient of -E[ratio * A] + beta * E[KL] - c * E[H] in the policy's parameters.

    The ratio is 1 before an update's first step. d ratio = ratio * d log pi, so the surrogate's slope in log pi is the
    surrogate itself, and 0 where clipping (``config.clip_range`` above 0) holds it fast.
    Source: Schulman et al. (2017), equation 7 for the clipped surrogate, equation 8 for the penalty.
    """
    ratio = torch.exp(new.log_prob(batch.action) - batch.log_prob)
    surrogate = slope = ratio * batch.advantage
    if config.clip_range > 0:
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range) * batch.advantage
        slope = surrogate * (surrogate <= clipped)
        surrogate = torch.minimum(surrogate, clipped)
    gradient = new.gradient(
        batch.action,
        to_log_prob=-batch.weight * slope,
        old=batch.old,  # type: ignore[arg-type]  # the same family as new, as it came from the same network
        to_kl=None if penalty is None else penalty.term(batch.weight),
        to_entropy=batch.weight * -config.ent_coef if config.ent_coef > 0 else None,
        direction=config.kl.direction,
    )
    return -(batch.weight @ surrogate), gradient


class PPO(OnPolicyAgent):
    """Proximal policy optimisation for Box, Discrete, MultiDiscrete and MultiBinary actions.

    Policy and critic take their steps together, with one optimizer. An update that is rolled back for its KL still
    keeps what the critic learned.
    """

    config: PPOConfig

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: PPOConfig | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space, config or PPOConfig(), device, seed)
        if self.config.lr_schedule == "kl" and self.config.kl.target == 0:
            raise UsageError("--lr-schedule kl needs a --kl.target above 0")
        self.penalty = self.config.kl.make_penalty()
        rate = self.config.learning_rate
        least, most = min(rate, 1e-5), max(rate, 1e-2)
        self.learning_rate = Banded(rate, factor=1 / 1.5, low=0.5, high=2.0, least=least, most=most)

    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> Report:
        """Improve policy and critic on a full rollout, and report how far the policy moved.

        Raises NonFiniteError naming the field where the rollout is not finite, and SkippedUpdateError where a loss, a
        gradient or a weight is not; policy, critic, optimizer and reward scale are then what they were before.
        """
        config = self.config
        parameters, before = self.parameters, self.snapshot()
        batch, valid = self.beliefs(rollout)
        learning_rate = self.learning_rate.value * (1 - progress if config.lr_schedule == "linear" else 1)
        trace: list[Tensor] = []
        stop_epoch = 0

        for epoch in range(1, config.n_epochs + 1):
            order = torch.from_numpy(self.rng.permutation(len(batch.weight)))
            shuffled = batch.take(order.to(self.device))
            for start in range(0, len(batch.weight), config.batch_size):
                minibatch = shuffled.take(slice(start, start + config.batch_size))
                policy, _, pull_policy = self.actor.linearize(minibatch.inputs)
                value, pull_critic = self.critic.linearize(minibatch.inputs)
                loss_pi, to_policy = policy_gradient(policy, minibatch, config, self.penalty)
                loss_v, to_value = value_gradient(value, minibatch, config.clip_range_vf)
                parameters.zero_grad()
                pull_policy(*to_policy)
                pull_critic(config.vf_coef * to_value)
                norm = parameters.clip_grad(config.max_grad_norm)
                parameters.adam_step(learning_rate)
                trace += (loss_pi, loss_v, norm)  # read once, after the update
                last = epoch == config.n_epochs and start + config.batch_size == len(batch.weight)
                if config.kl.check == "minibatch" and not last and self._should_stop(batch, valid):
                    stop_epoch = epoch
                    break
            if config.kl.check == "epoch" and epoch < config.n_epochs and self._should_stop(batch, valid):
                stop_epoch = epoch
            if stop_epoch:
                break

        means = torch.stack(trace).view(-1, len(_TRACED)).double().mean(0).tolist()
        metrics = dict(zip(_TRACED, means, strict=True))
        try:
            for tag, figure in [*metrics.items(), ("/largest weight", float(parameters.vector.abs().max()))]:
                if not math.isfinite(figure):
                    raise NonFiniteError(f"{tag.split('/')[1]} is {figure} in update {self.n_updates + 1}")
            report, log_ratio = self._settle(batch, valid, before["parameters"], stop_epoch)
        except (NonFiniteError, ValueError) as problem:  # ValueError: the new policy has no KL, as its outputs overflow
            self.undo(before)
            raise SkippedUpdateError(str(problem)) from None

        if self.penalty is not None:
            self.penalty.adapt(report.attempted)
        if config.lr_schedule == "kl":
            self.learning_rate.adapt(report.attempted, self.bound)
        self.finish(rollout, valid)
        outside = (torch.exp(log_ratio[valid]) - 1).abs() > config.clip_range
        metrics["train/clip_fraction"] = float(outside.float().mean()) if config.clip_range > 0 else 0.0
        metrics |= {"train/learning_rate": learning_rate, "train/ent_coef": config.ent_coef}
        return Report(report, metrics | self.diagnostics(batch, valid))

    def _should_stop(self, batch: Batch, valid: Tensor) -> bool:
        factor = self.config.kl.stop
        return factor > 0 and not self.bound.scaled(factor).holds(self.mean_kl(batch, valid))

    def _settle(self, batch: Batch, valid: Tensor, before: State, stop_epoch: int) -> tuple[KLReport, Tensor]:
        """Measure the finished update, and take it back as far as ``kl.on_overshoot`` says where it overshot."""
        rule, policy = self.config.kl.on_overshoot, self.parameters.parts[0]
        report, log_ratio = self.measure_move(batch, valid)
        reached, kept = report.bounded, 1.0
        if rule != "keep" and not self.bound.holds(reached):
            if rule == "project":
                weights, old = self.parameters.vector[policy], before["vector"][policy]
                kept = project(weights, old, lambda: self.mean_kl(batch, valid), self.bound.limit, reached)
            else:
                self.parameters.restore(before, only=0)
                kept = 0.0
            report, log_ratio = self.measure_move(batch, valid)
        beta = 0.0 if self.penalty is None else self.penalty.coefficient.value
        settled = {"attempted": reached, "rolled_back": 1 - kept, "coefficient": beta}
        return replace(report, stop_epoch=stop_epoch, **settled), log_ratio  # type: ignore[arg-type]

    def state_dict(self) -> State:
        coefficient = {} if self.penalty is None else self.penalty.coefficient.state_dict()
        return {**super().state_dict(), "penalty": coefficient, "learning_rate": self.learning_rate.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.penalty is not None:
            self.penalty.coefficient.load_state_dict(state["penalty"])
        self.learning_rate.load_state_dict(state["learning_rate"])
