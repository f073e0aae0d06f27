"""PPO with an exact KL penalty (Schulman et al. 2017, section 4), optionally clipped as well or instead."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.buffers import RolloutBuffer
from klrl.config import NonNegative, Positive, PositiveInt, Range, Real, Share
from klrl.distributions import PolicyDistribution
from klrl.errors import NonFiniteError, UsageError
from klrl.kl import Banded, KLReport, Penalty, at_most, kl, measure, reverse_kl, select
from klrl.networks import Activation, Actor, Critic
from klrl.observations import Inputs
from klrl.parameters import FlatParameters, Snapshot
from klrl.protocol import Agent, KLConfig, Report, State, chunks
from klrl.returns import RewardScale, gae
from klrl.trust_region import project


@dataclass(frozen=True)
class PPOConfig:
    n_steps: Annotated[int, Range(2)] = 256
    """Steps of each environment between two updates; of two rows, at most one only resets."""
    batch_size: PositiveInt = 256
    """Rows of a minibatch; must divide n_envs * n_steps."""
    n_epochs: PositiveInt = 10
    """Passes over a rollout in each update."""
    learning_rate: Positive = 3e-4
    """Adam's step size at the start."""
    lr_schedule: Literal["constant", "linear", "kl"] = "constant"
    """Keep it, lower it linearly to 0 over the run, or move it by 1.5 when KL leaves target/2 to 2 * target."""
    gamma: Share = 0.99
    """Discount factor."""
    gae_lambda: Share = 0.95
    """Trade-off between bias (0) and variance (1) of the advantage estimates."""
    clip_range: NonNegative = 0.0
    """Clip the probability ratio to 1 +- this; 0 leaves it to the KL penalty."""
    clip_range_vf: NonNegative = 0.0
    """Clip a value's change within an update to +- this; 0 does not clip. Depends on the rewards' scale."""
    normalize_advantage: bool = True
    """Scale a rollout's advantages to mean 0 and standard deviation 1."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the value loss beside the policy's."""
    max_grad_norm: Positive = 0.5
    """Longest gradient, of policy and critic together; a longer one is scaled down."""
    normalize_observation: bool = True
    """Scale Box observations (not images) by their running mean and standard deviation."""
    normalize_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)
    """Widths of the hidden layers, of the policy and of the critic."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    log_std_init: Real = 0.0
    """Logarithm of the initial standard deviation of continuous actions, where a bounded action spans -1 to 1."""
    kl: KLConfig = field(default_factory=KLConfig)

    def check_rollout(self, n_envs: int) -> None:
        """Raise UsageError where batch_size does not fit ``n_envs`` environments."""
        rows = n_envs * self.n_steps
        if rows % self.batch_size:
            fits = max(size for size in range(1, min(self.batch_size, rows) + 1) if rows % size == 0)
            raise UsageError(
                f"--batch-size {self.batch_size} does not divide the rollout of {rows} rows "
                f"({n_envs} envs x {self.n_steps} steps); {fits} would do"
            )


_TRACED = ("train/policy_gradient_loss", "train/value_loss", "health/grad_norm")


@dataclass(frozen=True)
class Batch:
    """A rollout's facts and the agent's beliefs about them, flattened to B = T * N rows."""

    inputs: Inputs
    old: PolicyDistribution
    """The policy that acted."""
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor
    weight: Tensor
    """[B]: 0 for rows that only reset an environment, equal for the others; sums to the number of minibatches, so that
    ``weight @ x`` over one is x's mean, exactly so where no row is masked."""

    def take(self, index: Tensor | slice) -> "Batch":
        """The rows ``index``, as a batch of its own."""
        parts = (self.action, self.log_prob, self.value, self.advantage, self.returns, self.weight)
        inputs = {key: rows[index] for key, rows in self.inputs.items()}
        return Batch(inputs, select(self.old, index), *(part[index] for part in parts))


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


def value_gradient(value: Tensor, batch: Batch, clip_range_vf: float) -> tuple[Tensor, Tensor]:
    """The loss E[(V - return)^2] and its gradient in V, [B]; clipped as in OpenAI Baselines' PPO where asked.

    Clipped, a state's loss is the larger of that and (V_clipped - return)^2 with V_clipped within the range of V_old.
    """
    error = value - batch.returns
    squared = error * error
    if clip_range_vf > 0:
        clipped = batch.value + (value - batch.value).clamp(-clip_range_vf, clip_range_vf) - batch.returns
        error = error * (squared >= clipped * clipped)
        squared = torch.maximum(squared, clipped * clipped)
    return batch.weight @ squared, 2.0 * batch.weight * error


class PPO(Agent):
    """Proximal policy optimisation for Box, Discrete, MultiDiscrete and MultiBinary actions.

    Policy and critic are two networks, so the critic's gradient cannot move the policy; their weights lie in one
    vector with one optimizer. An update that is rolled back for its KL still keeps what the critic learned.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: PPOConfig | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.config = config = config or PPOConfig()
        super().__init__(observation_space, action_space, device, seed, config.normalize_observation)
        with torch.random.fork_rng(devices=[]):
            init = torch.Generator().manual_seed(seed)
            sizes, activation = config.hidden_sizes, config.activation
            actor = Actor(self.encoder, action_space, sizes, activation, config.log_std_init, init)
            critic = Critic(self.encoder, sizes, activation, init)
        self.actor, self.critic = actor.to(self.device), critic.to(self.device)
        self.parameters = FlatParameters(self.actor, self.critic)
        self.reward_scale = RewardScale(config.gamma) if config.normalize_reward else None
        self.bound = at_most(config.kl.target)
        self.penalty = config.kl.make_penalty()
        rate = config.learning_rate
        least, most = min(rate, 1e-5), max(rate, 1e-2)
        self.learning_rate = Banded(rate, factor=1 / 1.5, low=0.5, high=2.0, least=least, most=most)
        self.n_updates = 0

    def new_buffer(self, n_envs: int) -> RolloutBuffer:
        """A buffer for one rollout. Raises UsageError where batch_size does not divide it."""
        self.config.check_rollout(n_envs)
        return RolloutBuffer(self.observation_space, self.action_space, self.config.n_steps, n_envs)

    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> Report:
        """Improve policy and critic on a full rollout, and report how far the policy moved.

        Raises NonFiniteError naming the field where the rollout, a loss, a gradient or a weight is not finite; policy,
        critic, optimizer and reward scale are then what they were before.
        """
        config = self.config
        scale_before = {} if self.reward_scale is None else self.reward_scale.state_dict()
        batch, valid = self._beliefs(rollout)
        learning_rate = self.learning_rate.value * (1 - progress if config.lr_schedule == "linear" else 1)
        parameters, before = self.parameters, self.parameters.snapshot()
        trace: list[Tensor] = []
        stop_epoch = 0

        for epoch in range(1, config.n_epochs + 1):
            order = torch.from_numpy(self.rng.permutation(len(batch.weight)))
            shuffled = batch.take(order.to(self.device))
            for start in range(0, len(batch.weight), config.batch_size):
                minibatch = shuffled.take(slice(start, start + config.batch_size))
                policy, pull_policy = self.actor.with_pullback(minibatch.inputs)
                value, pull_critic = self.critic.with_pullback(minibatch.inputs)
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
            report, log_ratio = self._settle(batch, valid, before, stop_epoch)
        except (NonFiniteError, ValueError) as problem:  # ValueError: the new policy has no KL, as its outputs overflow
            parameters.restore(before)
            if self.reward_scale is not None:
                self.reward_scale.load_state_dict(scale_before)
            raise NonFiniteError(str(problem)) from None

        if self.penalty is not None:
            self.penalty.adapt(report.attempted)
        if config.lr_schedule == "kl":
            self.learning_rate.adapt(report.attempted, self.bound)
        self.encoder.update(_before_step(rollout.obs), valid)
        self.n_updates += 1
        return Report(report, metrics | self._diagnostics(batch, valid, log_ratio, learning_rate))

    def _beliefs(self, rollout: RolloutBuffer) -> tuple[Batch, Tensor]:
        """What the agent thinks of a rollout, in one batched pass: pi_old, log-probs, values, advantages."""
        config = self.config
        if not rollout.full:
            raise ValueError(f"the rollout holds {rollout.filled} of {rollout.n_steps} steps: fill it before update")
        config.check_rollout(rollout.n_envs)
        rollout.check_finite()
        steps, envs = rollout.n_steps, rollout.n_envs
        rows = steps * envs
        inputs = self.encoder(rollout.obs)
        value = torch.cat([self.critic(chunk) for chunk in chunks(inputs)])
        inputs = {key: part[:rows] for key, part in inputs.items()}
        old = self.distribution(inputs)
        reward = rollout.reward
        if self.reward_scale is not None:
            reward = self.reward_scale(reward, rollout.terminated | rollout.truncated, rollout.valid)
        value_table = value.view(steps + 1, envs).cpu().numpy()
        advantage_table, returns = gae(
            reward, value_table, rollout.terminated, rollout.truncated, config.gamma, config.gae_lambda
        )
        if config.normalize_advantage:
            kept = advantage_table[rollout.valid].astype(np.float64)
            advantage_table = ((advantage_table - kept.mean()) / (kept.std() + 1e-8)).astype(np.float32)
        advantage, returns_flat, weight, action = (
            torch.as_tensor(x, device=self.device).flatten(0, 1)
            for x in (advantage_table, returns, rollout.valid, rollout.action)
        )
        valid = weight.clone()
        scaled = weight.float() * (rows / config.batch_size / float(weight.sum().clamp_min(1)))
        batch = Batch(inputs, old, action, old.log_prob(action), value[:rows], advantage, returns_flat, scaled)
        return batch, valid

    def _measure(self, batch: Batch, valid: Tensor) -> tuple[KLReport, Tensor]:
        """The move so far, exactly, on the whole batch, and log new(a) - log old(a) of the actions taken."""
        new = self.distribution(batch.inputs)
        log_ratio = new.log_prob(batch.action) - batch.log_prob
        direction = self.config.kl.direction
        return measure(batch.old, new, self.bound, log_ratio=log_ratio, valid=valid, direction=direction), log_ratio

    def _mean_kl(self, batch: Batch, valid: Tensor) -> float:
        """The bounded KL alone: what stopping and projecting need. Infinite where the policy is not finite."""
        divergence = kl if self.config.kl.direction == "forward" else reverse_kl
        try:
            values = divergence(batch.old, self.distribution(batch.inputs))
        except ValueError:
            return math.inf
        return float((values if bool(valid.all()) else values[valid]).double().mean())

    def _should_stop(self, batch: Batch, valid: Tensor) -> bool:
        factor = self.config.kl.stop
        return factor > 0 and not self.bound.scaled(factor).holds(self._mean_kl(batch, valid))

    def _settle(self, batch: Batch, valid: Tensor, before: Snapshot, stop_epoch: int) -> tuple[KLReport, Tensor]:
        """Measure the finished update, and take it back as far as ``kl.on_overshoot`` says where it overshot."""
        rule, policy = self.config.kl.on_overshoot, self.parameters.parts[0]
        report, log_ratio = self._measure(batch, valid)
        reached, kept = report.bounded, 1.0
        if rule != "keep" and not self.bound.holds(reached):
            if rule == "project":
                weights, old = self.parameters.vector[policy], before[0][policy]
                kept = project(weights, old, lambda: self._mean_kl(batch, valid), self.bound.limit, reached)
            else:
                self.parameters.restore(before, only=0)
                kept = 0.0
            report, log_ratio = self._measure(batch, valid)
        beta = 0.0 if self.penalty is None else self.penalty.coefficient.value
        settled = {"attempted": reached, "rolled_back": 1 - kept, "coefficient": beta}
        return replace(report, stop_epoch=stop_epoch, **settled), log_ratio  # type: ignore[arg-type]

    def _diagnostics(self, batch: Batch, valid: Tensor, log_ratio: Tensor, learning_rate: float) -> dict[str, float]:
        """SB3's figures, over the whole batch; the values are those from before the update, as SB3 logs them."""
        returns, value = batch.returns[valid].double(), batch.value[valid].double()
        spread = float(returns.var(correction=0))
        unexplained = float((returns - value).var(correction=0))
        outside = (torch.exp(log_ratio[valid]) - 1).abs() > self.config.clip_range
        figures = {
            "train/explained_variance": 1 - unexplained / spread if spread > 0 else 0.0,
            "train/clip_fraction": float(outside.float().mean()) if self.config.clip_range > 0 else 0.0,
            "train/learning_rate": learning_rate,
            "train/ent_coef": self.config.ent_coef,
            "health/value_mean": float(value.mean()),
        }
        if self.actor.continuous:
            figures["train/std"] = float((self.actor.log_std.detach().exp() / self.actor.scale).mean())
        return figures

    def state_dict(self) -> State:
        return {
            "parameters": self.parameters.state_dict(),
            "encoder": self.encoder.state_dict(),
            "reward_scale": {} if self.reward_scale is None else self.reward_scale.state_dict(),
            "penalty": {} if self.penalty is None else self.penalty.coefficient.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "rng": self.rng.bit_generator.state,
            "n_updates": self.n_updates,
        }

    def load_state_dict(self, state: State) -> None:
        self.parameters.load_state_dict(state["parameters"])
        self.encoder.load_state_dict(state["encoder"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        if self.penalty is not None:
            self.penalty.coefficient.load_state_dict(state["penalty"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.rng.bit_generator.state = state["rng"]
        self.n_updates = int(state["n_updates"])


def _before_step(obs: Any) -> Any:
    return {key: part[:-1] for key, part in obs.items()} if isinstance(obs, dict) else obs[:-1]
