"""What on-policy agents share: a rollout's facts become beliefs, two networks, and the exact measure of a move.

Policy and critic are two networks, so the critic's gradient cannot move the policy; their weights lie in one vector.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.agents.base import CHUNK, Agent, KLConfig, State, bounded_kl, chunks
from klrl.buffers.returns import RewardScale, gae
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import Fraction, PositiveInt, Range, Real
from klrl.errors import UsageError
from klrl.kl import KLReport, measure, select
from klrl.policies.distributions import PolicyDistribution
from klrl.policies.encoder import Inputs
from klrl.policies.networks import Activation, Actor, Critic
from klrl.policies.parameters import FlatParameters


@dataclass(frozen=True)
class OnPolicyConfig:
    n_steps: Annotated[int, Range(2)] = 256
    """Steps of each environment between two updates; of two rows, at most one only resets."""
    batch_size: PositiveInt = 256
    """Rows of a minibatch; must divide n_envs * n_steps."""
    gamma: Fraction = 0.99
    """Discount factor."""
    gae_lambda: Fraction = 0.95
    """Trade-off between bias (0) and variance (1) of the advantage estimates."""
    normalize_advantage: bool = True
    """Scale a rollout's advantages to mean 0 and standard deviation 1."""
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

    def chunks(self) -> list["Batch"]:
        """The batch in consecutive pieces whose activations stay in cache."""
        return [self.take(slice(i, i + CHUNK)) for i in range(0, len(self.weight), CHUNK)]


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


class OnPolicyAgent(Agent):
    """Learns from whole rollouts of its policy; Box, Discrete, MultiDiscrete and MultiBinary actions."""

    config: OnPolicyConfig

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: OnPolicyConfig,
        device: str | torch.device,
        seed: int,
    ) -> None:
        super().__init__(observation_space, action_space, device, seed, config.normalize_observation)
        self.config = config
        if config.kl.every != KLConfig.every:
            raise UsageError("--kl.every is for off-policy agents: an on-policy one measures each of its updates")
        with torch.random.fork_rng(devices=[]):
            init = torch.Generator().manual_seed(seed)
            sizes, activation = config.hidden_sizes, config.activation
            actor = Actor(self.encoder, action_space, sizes, activation, config.log_std_init, init)
            critic = Critic(self.encoder, sizes, activation, init)
        self.actor, self.critic = actor.to(self.device), critic.to(self.device)
        self.parameters = FlatParameters(self.actor, self.critic)
        self.reward_scale = RewardScale(config.gamma) if config.normalize_reward else None
        self.bound = config.kl.bound()
        self.n_updates = 0

    def new_buffer(self, n_envs: int) -> RolloutBuffer:
        """A buffer for one rollout. Raises UsageError where batch_size does not divide it."""
        self.config.check_rollout(n_envs)
        return RolloutBuffer(self.observation_space, self.action_space, self.config.n_steps, n_envs)

    def beliefs(self, rollout: RolloutBuffer) -> tuple[Batch, Tensor]:
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

    def measure_move(self, batch: Batch, valid: Tensor) -> tuple[KLReport, Tensor]:
        """The move so far, exactly, on the whole batch, and log new(a) - log old(a) of the actions taken."""
        new = self.distribution(batch.inputs)
        log_ratio = new.log_prob(batch.action) - batch.log_prob
        direction = self.config.kl.direction
        return measure(batch.old, new, self.bound, log_ratio=log_ratio, valid=valid, direction=direction), log_ratio

    def mean_kl(self, batch: Batch, valid: Tensor) -> float:
        """The bounded KL alone: what stopping and projecting need. Infinite where the policy is not finite."""
        return bounded_kl(batch.old, self.distribution(batch.inputs), self.config.kl.direction, valid)

    def diagnostics(self, batch: Batch, valid: Tensor) -> dict[str, float]:
        """SB3's figures over the whole batch; the values are those from before the update, as SB3 logs them."""
        returns, value = batch.returns[valid].double(), batch.value[valid].double()
        spread = float(returns.var(correction=0))
        unexplained = float((returns - value).var(correction=0))
        figures = {
            "train/explained_variance": 1 - unexplained / spread if spread > 0 else 0.0,
            "health/value_mean": float(value.mean()),
        }
        if self.actor.continuous:
            figures["train/std"] = float((self.actor.log_std.detach().exp() / self.actor.scale).mean())
        return figures

    def finish(self, rollout: RolloutBuffer, valid: Tensor) -> None:
        """What moves only after the KL was measured: the observations' statistics, and the count of updates."""
        obs = rollout.obs
        before_step = {key: part[:-1] for key, part in obs.items()} if isinstance(obs, dict) else obs[:-1]
        self.encoder.update(before_step, valid)
        self.n_updates += 1

    def snapshot(self) -> State:
        """What an update changes before it is known to be whole, for ``undo``."""
        scale = {} if self.reward_scale is None else self.reward_scale.state_dict()
        return {"parameters": self.parameters.state_dict(), "reward_scale": scale}

    def undo(self, before: State) -> None:
        """Be, bit for bit, what ``snapshot`` saw."""
        self.parameters.restore(before["parameters"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(before["reward_scale"])

    def state_dict(self) -> State:
        return {
            **self.snapshot(),
            "encoder": self.encoder.state_dict(),
            "rng": self.rng.bit_generator.state,
            "n_updates": self.n_updates,
        }

    def load_state_dict(self, state: State) -> None:
        self.parameters.load_state_dict(state["parameters"])
        self.encoder.load_state_dict(state["encoder"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        self.rng.bit_generator.state = state["rng"]
        self.n_updates = int(state["n_updates"])
