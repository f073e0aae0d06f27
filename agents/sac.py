"""SAC: maximum-entropy reinforcement learning (Haarnoja et al. 2018b), its policy's KL tracked, and held on request.

Continuous actions by a tanh-squashed normal; discrete ones by the exact expectation over actions (Christodoulou 2019),
with losses summed over actions and averaged over states.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.agents.base import Actions, Agent, KLConfig, Report, State, bounded_kl
from klrl.agents.kl_window import Block
from klrl.buffers.replay import ReplayBuffer, Transitions
from klrl.config import Fraction, Positive, PositiveInt, Range
from klrl.errors import SkippedUpdateError, UsageError
from klrl.kl import Dual, KLReport, Penalty, at_least
from klrl.kl.trust_region import project
from klrl.policies.distributions import DiagonalNormal, squash, squash_gradient
from klrl.policies.encoder import Inputs
from klrl.policies.networks import Activation, Actor, choices
from klrl.policies.parameters import FlatParameters
from klrl.policies.spaces import check_bounded, check_joint
from klrl.policies.squashed import CorrelatedNoise, SquashedActor, TwinCritic

_STATES = 1024  # of the replay buffer, on which a block's KL is measured


@dataclass(frozen=True)
class SACConfig:
    buffer_size: PositiveInt = 1_000_000
    """Transitions kept for replay."""
    buffer_folder: str = ""
    """A folder for a replay buffer that is larger than memory: mapped from a file there."""
    learning_starts: PositiveInt = 1000
    """Steps with random actions before the first update."""
    train_freq: PositiveInt = 1
    """Steps of each environment between two updates."""
    gradient_steps: Annotated[int, Range(-1)] = 1
    """Gradient steps of an update, at most kl.every; -1 takes as many as environment steps were made."""
    batch_size: PositiveInt = 256
    """Transitions of a gradient step."""
    n_step: PositiveInt = 1
    """Rewards summed before a value is bootstrapped."""
    learning_rate: Positive = 3e-4
    """Adam's step size, for the policy and the critics."""
    gamma: Fraction = 0.99
    """Discount factor."""
    tau: Fraction = 0.005
    """How far the target critics follow the critics at each gradient step."""
    ent_coef: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """The temperature alpha at the start; it then holds the entropy at its target."""
    ent_rate: Positive = 3e-3
    """Step of log alpha per gradient step, for each nat that the entropy is off its target, per action dimension."""
    target_entropy: Annotated[float, Range(high=0.69)] = -1.0
    """Continuous actions: the least entropy for each dimension, in nats; uniform on -1 to 1 has 0.69."""
    target_entropy_share: Annotated[float, Range(0, 0.99)] = 0.3
    """Discrete actions: the least entropy as a share of the largest, log n."""
    noise_correlation: Annotated[float, Range(0, 0.999)] = 0.0
    """Continuous actions: correlation of an environment's noise from step to step, where white noise averages out."""
    hidden_sizes: tuple[PositiveInt, ...] = (256, 256)
    """Widths of the hidden layers, of the policy and of the critics."""
    activation: Activation = "relu"
    """Activation of the policy's hidden layers; the critics' are relu."""
    kl: KLConfig = field(default_factory=lambda: KLConfig(target=0.0))


_TRACED = ("train/critic_loss", "train/q_mean", "train/actor_loss", "entropy/sampled")
_COUNTS = ("n_updates", "steps_seen", "rows_seen")


class SAC(Agent):
    """Soft actor-critic for Box actions with finite bounds, and for Discrete, MultiDiscrete and MultiBinary ones.

    Every ``kl.every`` gradient steps make a block. How far it moved the policy is measured on replay states, and held
    with ``kl.target`` above 0 as in the other agents: by a penalty, an early stop of the policy's steps, and a rule.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: SACConfig | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.config = config = config or SACConfig()
        super().__init__(observation_space, action_space, device, seed, normalize_observation=False)
        self.continuous = isinstance(action_space, spaces.Box)
        if isinstance(action_space, spaces.Box):
            check_bounded(action_space)
            self.outputs = int(np.prod(action_space.shape))
            self.noise = CorrelatedNoise(self.rng, config.noise_correlation)
        else:
            self.sizes = choices(action_space)
            self.outputs = math.prod(self.sizes)
            check_joint(action_space, self.outputs)
        with torch.random.fork_rng(devices=[]):
            init = torch.Generator().manual_seed(seed)
            actors = [self._make_actor(init) for _ in range(2)]
            width, heads = (self.outputs, 1) if self.continuous else (0, self.outputs)
            critics = [TwinCritic(self.encoder, width, config.hidden_sizes, heads, init) for _ in range(2)]
        self.actor: Any
        self.actor, self.old_actor = (actor.to(self.device) for actor in actors)
        self.critic, self.target_critic = (critic.to(self.device) for critic in critics)
        networks = (self.actor, self.old_actor, self.critic, self.target_critic)
        self.policy, self.old_policy, self.values, self.target = (FlatParameters(m, eps=1e-8) for m in networks)
        self.target.vector.copy_(self.values.vector)
        dims, share = (self.outputs, config.target_entropy) if self.continuous else (1, config.target_entropy_share)
        target = at_least(share * (dims if self.continuous else math.log(self.outputs)))
        self.entropy = Penalty(target, Dual(config.ent_coef, rate=config.ent_rate / dims, least=1e-6, most=1e6))
        self.bound = config.kl.bound()
        self.penalty = config.kl.make_penalty()
        self.n_updates, self.steps_seen, self.rows_seen = 0, 0, 0
        self._block: Block | None = None

    def _make_actor(self, init: torch.Generator) -> Any:
        sizes, activation = self.config.hidden_sizes, self.config.activation
        if self.continuous:
            return SquashedActor(self.encoder, self.outputs, sizes, activation, init)
        return Actor(self.encoder, spaces.Discrete(self.outputs), sizes, activation, 0.0, init)

    def act(self, obs: Any, deterministic: bool = False) -> Actions:
        """Actions [N, d] in [-1, 1], or joint actions [N, 1]; at random until the first update."""
        if self.n_updates > 0 or deterministic:
            return super().act(obs, deterministic)
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        if self.continuous:
            return self.noise.uniform((rows, self.outputs))
        return self.rng.integers(self.outputs, size=(rows, 1))

    def env_action(self, action: Actions) -> Actions:
        """``act``'s actions as the environment takes them."""
        space = self.action_space
        if isinstance(space, spaces.Box):
            share = (action.reshape(len(action), *space.shape) + 1) / 2
            scaled = space.low + share * (space.high - space.low)
            return scaled.clip(space.low, space.high).astype(space.dtype)
        return super().env_action(np.stack(np.unravel_index(action[:, 0], self.sizes), axis=-1))

    def new_buffer(self, n_envs: int) -> ReplayBuffer:
        """A replay buffer for ``n_envs`` environments. Raises UsageError where an update would outlast a block."""
        config, width = self.config, self.outputs if self.continuous else 1
        steps = config.gradient_steps if config.gradient_steps >= 0 else config.train_freq * n_envs
        if not 1 <= steps <= config.kl.every:
            raise UsageError(
                f"--gradient-steps {config.gradient_steps}: an update takes 1 to --kl.every steps, not {steps}"
            )
        self.steps_seen, self.rows_seen, self._block = 0, 0, None
        return ReplayBuffer(
            self.observation_space, width, config.buffer_size, n_envs, config.gamma, config.n_step, config.buffer_folder
        )

    def due(self, buffer: ReplayBuffer) -> bool:
        warm = buffer.steps >= self.config.learning_starts and buffer.size > 0
        return warm and buffer.rows_added - self.rows_seen >= self.config.train_freq

    @torch.no_grad()
    def update(self, buffer: ReplayBuffer, progress: float = 0.0) -> Report | None:
        """Gradient steps on replayed transitions; a report at the end of a block of ``kl.every`` of them, else None.

        Raises SkippedUpdateError where a loss or weight is not finite; all is then as it was when the block began.
        """
        steps, made = self.config.gradient_steps, buffer.steps - self.steps_seen
        if steps < 0:  # the random steps of the beginning do not count
            steps = min(made, self.config.train_freq * buffer.n_envs)
        self.steps_seen, self.rows_seen = buffer.steps, buffer.rows_added
        report = None
        for _ in range(steps):
            block = self._block or self._begin_block(buffer)
            self._gradient_step(block, buffer.sample(self.config.batch_size, self.rng, self.device))
            if block.steps == self.config.kl.every:
                report = self._end_block(block)
        return report

    @torch.no_grad()
    def flush(self, buffer: ReplayBuffer) -> Report | None:
        if buffer.size == 0:
            return None
        before = self.state_dict()
        report = self._end_block(self._block or self._begin_block(buffer))
        if report.kl.rolled_back == 0:  # a run that goes on later then does so as if it had not stopped
            self.load_state_dict(before)
        return report

    def _gradient_step(self, block: Block, batch: Transitions) -> None:
        """The critics' step, the policy's, the temperature's, and the targets'."""
        config, alpha = self.config, self.entropy.coefficient.value
        critic_loss, value = self._critic_step(batch, alpha)
        policy_loss, entropy = self._policy_step(batch, alpha, move=block.stopped == 0)
        block.trace.append(torch.stack([critic_loss, value, policy_loss, entropy]))
        if not bool((block.trace[-1].sum() + self.policy.vector.sum()).isfinite()):
            self._learn(block.before)
            self._block = None
            figures = dict(zip(_TRACED, block.trace[-1].tolist(), strict=True))
            raise SkippedUpdateError(f"a loss or weight is not finite after {self.n_updates} gradient steps: {figures}")
        self.entropy.adapt(float(entropy))
        self.target.vector.lerp_(self.values.vector, config.tau)
        self.n_updates += 1
        block.steps += 1
        interval = {"update": 0, "epoch": max(1, config.kl.every // 10), "minibatch": 1}[config.kl.check]
        bounded = config.kl.target > 0 and config.kl.stop > 0 and block.stopped == 0 and block.steps < config.kl.every
        if bounded and interval > 0 and block.steps % interval == 0:
            excess = not self.bound.scaled(config.kl.stop).holds(self._mean_kl(block))
            block.stopped = block.steps if excess else 0

    def _critic_step(self, batch: Transitions, alpha: float) -> tuple[Tensor, Tensor]:
        """Adam on E[(Q(s, a) - y)^2] of both critics, y = r + discount * (min Q'(s', a') - alpha log pi(a'|s'))."""
        target = batch.reward + batch.discount * self._soft_value(batch.next_inputs, alpha)
        rows = len(target)
        if self.continuous:
            value, pull, _ = self.critic.linearize(batch.inputs, batch.action)
            error = value.squeeze(-1) - target
            gradient = (error / rows).unsqueeze(-1)
        else:
            value, pull, _ = self.critic.linearize(batch.inputs)
            index = batch.action.long().expand(2, rows, 1)
            error = value.gather(-1, index).squeeze(-1) - target
            gradient = torch.zeros_like(value).scatter_(-1, index, (error / rows).unsqueeze(-1))
        self.values.zero_grad()
        pull(gradient)
        self.values.adam_step(self.config.learning_rate)
        return error.square().mean(), target.mean()

    def _soft_value(self, inputs: Inputs, alpha: float) -> Tensor:
        """V(s) = E[min Q'(s, a) - alpha log pi(a|s)], [B]: one sample of a continuous action, all discrete ones."""
        policy = self.actor(inputs)
        if self.continuous:
            action, log_prob = squash(policy, self._noise(policy))
            return self.target_critic(inputs, action).amin(0).squeeze(-1) - alpha * log_prob
        log_prob = policy.log_probs.squeeze(1).clamp_min(torch.finfo(torch.float32).min)
        return (log_prob.exp() * (self.target_critic(inputs).amin(0) - alpha * log_prob)).sum(-1)

    def _policy_step(self, batch: Transitions, alpha: float, move: bool) -> tuple[Tensor, Tensor]:
        """Adam on E[alpha log pi(a|s) - min Q(s, a)] plus the KL penalty, if any; the loss and the policy's entropy."""
        policy, _, pull = self.actor.linearize(batch.inputs)
        weight = torch.full_like(batch.reward, 1 / len(batch.reward))
        gradient: tuple[Tensor, ...]
        if self.continuous:
            noise = self._noise(policy)
            action, log_prob = squash(policy, noise)
            value, _, to_action = self.critic.linearize(batch.inputs, action)
            least = value.squeeze(-1).amin(0)
            # Of the two critics only the lower one counts, and its gradient alone goes back to the action.
            chosen = (value[0] <= value[1]).float()
            through = torch.stack([chosen, 1 - chosen]) * -weight[:, None]
            gradient = squash_gradient(policy, noise, action, to_action(through), alpha * weight)
            loss, entropy = (alpha * log_prob - least).mean(), -log_prob.mean()
        else:
            least = self.critic(batch.inputs).amin(0)
            log_prob = policy.log_probs.squeeze(1).clamp_min(torch.finfo(torch.float32).min)
            p, cost = log_prob.exp(), alpha * log_prob - least
            mean_cost = (p * cost).sum(-1, keepdim=True)
            gradient = ((p * (cost - mean_cost) * weight[:, None]).unsqueeze(1),)
            loss, entropy = mean_cost.mean(), policy.entropy().mean()
        if move:
            if self.penalty is not None:  # beta * E[KL(old || policy)], old as it was when the block began
                old, to_kl = self.old_actor(batch.inputs), self.penalty.term(weight)
                nothing = torch.zeros_like(weight)
                held = policy.gradient(policy.mode, nothing, old, to_kl, direction=self.config.kl.direction)
                gradient = tuple(g + k for g, k in zip(gradient, held, strict=True))
            self.policy.zero_grad()
            pull(*gradient)
            self.policy.adam_step(self.config.learning_rate)
        return loss, entropy

    def _noise(self, policy: DiagonalNormal) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(policy.loc.shape, dtype=np.float32)).to(self.device)

    def _begin_block(self, buffer: ReplayBuffer) -> Block:
        inputs = buffer.sample(_STATES, self.rng, self.device).inputs
        self.old_policy.vector.copy_(self.policy.vector)
        self._block = Block(inputs, self.distribution(inputs), self._learned())
        return self._block

    def _end_block(self, block: Block) -> Report:
        """Measure the block, take back what overshot as ``kl.on_overshoot`` says, and report."""
        config, report, kept = self.config, self._measure(block), 1.0
        reached, rule = report.bounded, config.kl.on_overshoot
        if rule != "keep" and not self.bound.holds(reached):
            if rule == "project":
                old = self.old_policy.vector
                kept = project(self.policy.vector, old, lambda: self._mean_kl(block), self.bound.limit, reached)
            else:
                self.policy.restore(block.before["policy"])
                kept = 0.0
            report = self._measure(block)
        beta = 0.0 if self.penalty is None else self.penalty.coefficient.value
        if self.penalty is not None:
            self.penalty.adapt(reached)
        self._block = None
        means = torch.stack(block.trace).double().mean(0).tolist() if block.trace else []
        metrics = dict(zip(_TRACED, means, strict=False))
        metrics |= {"train/ent_coef": self.entropy.coefficient.value, "entropy/target": self.entropy.bound.limit}
        settled = {"attempted": reached, "rolled_back": 1 - kept, "coefficient": beta, "stop_epoch": block.stopped}
        return Report(replace(report, **settled), metrics)  # type: ignore[arg-type]

    def _measure(self, block: Block) -> KLReport:
        return block.measure(self.distribution(block.inputs), self.bound, self.config.kl.direction)

    def _mean_kl(self, block: Block) -> float:
        return bounded_kl(block.old, self.distribution(block.inputs), self.config.kl.direction)

    def _learned(self) -> State:
        return {
            "policy": self.policy.state_dict(),
            "values": self.values.state_dict(),
            "target": self.target.vector.clone(),
            "alpha": self.entropy.coefficient.state_dict(),
        }

    def _learn(self, state: State) -> None:
        self.policy.load_state_dict(state["policy"])
        self.values.load_state_dict(state["values"])  # raises where the number of weights differs
        self.target.vector.copy_(state["target"])
        self.entropy.coefficient.load_state_dict(state["alpha"])

    def state_dict(self) -> State:
        return {
            **self._learned(),
            "penalty": {} if self.penalty is None else self.penalty.coefficient.state_dict(),
            "rng": self.rng.bit_generator.state,
            "noise": self.noise.state_dict() if self.continuous else {},
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "block": {} if self._block is None else self._block.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self._block = None
        if state["block"]:  # the policy of its beginning is that of the weights it had
            self._learn(state["block"]["before"])
            self.old_policy.vector.copy_(self.policy.vector)
            self._block = Block.from_state(state["block"], self.distribution, self.device)
        self._learn(state)
        if self.penalty is not None:
            self.penalty.coefficient.load_state_dict(state["penalty"])
        self.rng.bit_generator.state = state["rng"]
        if self.continuous:
            self.noise.load_state_dict(state["noise"])
        for name in _COUNTS:
            setattr(self, name, int(state["counts"][name]))
