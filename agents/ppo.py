"""PPO (Schulman et al. 2017), its policy's KL held on average, in every state, or by clipping the ratio."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from klrl.agents.base import State, UpdateResult
from klrl.agents.bottleneck import BottleneckConfig
from klrl.agents.fused import FusedCritic, FusedPolicy, Rows, applies, suits
from klrl.agents.limits import KLConfig
from klrl.agents.on_policy import Batch, OnPolicyAgent, OnPolicyConfig, value_loss
from klrl.agents.reference import ReferenceConfig
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import NonNegative, Positive, PositiveInt
from klrl.errors import NonFiniteError, SkippedUpdateError, UsageError
from klrl.kl import RATIO_RULES, Adaptive, KLLimit, Move, at_most, state_mean
from klrl.kl.rules import RatioRuleName
from klrl.policies.networks import OwnNetwork
from klrl.policies.parameters import adam_step, clip_, gradients
from klrl.policies.threads import on_torchs_threads


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    batch_size: PositiveInt = 256
    """Rows of a minibatch; the last of a rollout has what is left."""
    n_epochs: PositiveInt = 10
    """Passes over a rollout in each update."""
    learning_rate: Positive = 3e-4
    """Adam's step size at the start."""
    lr_schedule: Literal["constant", "linear", "kl"] = "kl"
    """Keep it, lower it linearly to 0 over the run, or let it follow the KL: a factor of 1.5 up after an update below a
    quarter of kl.target, down after one that had gone beyond it, within a thirtieth and three times learning_rate."""
    critic_learning_rate: NonNegative = 0.0
    """Adam's step size for the critic, which a linear schedule lowers and no KL moves; 0 takes the policy's."""
    clip_range: NonNegative = 0.2
    """How far the probability ratio may leave 1, by clip_rule; 0 leaves that to the KL's rules."""
    clip_rule: RatioRuleName = "clip"
    """No gradient further out beyond clip_range (clip), or a parabola in the ratio with its top there (spo)."""
    clip_range_vf: NonNegative = 0.0
    """Clip a value's change within an update to +- this; 0 does not clip. Depends on the rewards' scale."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the value loss beside the policy's."""
    max_grad_norm: Positive = 0.5
    """Longest gradient, of policy and critic together; a longer one is scaled down."""
    share_network: bool = False
    """Give the critic a linear layer on the policy's last hidden layer, and no network of its own. Joint steps learn
    both; the hidden layers count as the policy's, and steps of the critic alone leave them."""
    clip_grads_apart: bool = False
    """Scale the gradients of policy and critic down each by itself."""
    kl: KLConfig = field(default_factory=KLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


def policy_loss(
    new: Any, batch: Batch, limit: KLLimit, ent_coef: float = 0.0, reference: KLLimit | None = None
) -> tuple[Tensor, Tensor]:
    """-E[w ratio A] + E[beta KL(old||new)] - c E[H] + E[b KL(new||reference)], and -E[ratio A].

    w, constant in the gradient, is what the rules leave of each state's surrogate: 0 where clipping drops it, for one.
    Source: Schulman et al. (2017), equations 7 and 8.
    """
    within = limit.within(batch.old, new)
    ratio = torch.exp(within.log_prob(batch.action) - batch.log_prob)  # 1 before an update's first step
    surrogate = ratio * batch.advantage
    loss = limit.term(batch.old, new, within) - limit.weight(ratio, batch.advantage, batch.old, new) * surrogate
    if ent_coef > 0:
        loss = loss - ent_coef * new.entropy()
    if reference is not None:
        loss = loss + reference.term(batch.reference, new)
    return batch.weight @ loss, -(batch.weight @ surrogate)


def reach(batch: Batch, move: Move, clip_range: float = 0.0) -> dict[str, float]:
    """Measure how many states an ended update took to where its rules act: the share whose ratio left 1 +- clip_range,
    and, where a rule weighs surrogates, the share whose own it drops or turns round (by a weight of 0 or less)."""
    assert move.log_ratio is not None
    ranks = move.limit.ranks
    outside = (torch.exp(move.log_ratio) - 1).abs() > clip_range
    shares = {"train/clip_fraction": float(state_mean(outside, batch.mask, ranks)) if clip_range > 0 else 0.0}
    if any(rule.weighs for rule in move.limit.rules):
        within = move.limit.within(batch.old, move.new)  # as in policy_loss
        ratio = torch.exp(within.log_prob(batch.action) - batch.log_prob)
        weight = torch.as_tensor(move.limit.weight(ratio, batch.advantage, batch.old, move.new))
        shares["kl/held_states"] = float(state_mean(weight <= 0, batch.mask, ranks))
    return shares


_TRACED = ("train/policy_gradient_loss", "train/value_loss", "health/grad_norm")


class PPO(OnPolicyAgent):
    """Proximal policy optimisation for Box, Discrete, MultiDiscrete and MultiBinary actions.

    Policy and critic take their steps together, with one gradient norm. An update that is rolled back for its KL still
    keeps what the critic learned, and one whose policy stops early goes on with the critic.
    """

    Config: ClassVar[type[OnPolicyConfig]] = PPOConfig
    compiles: tuple[str, ...] = ("_gradient_by_autograd",)
    captures: tuple[str, ...] = ("_step", "_critic_step")
    fused: tuple[FusedPolicy, FusedCritic] | None = None

    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        super().setup(init, network)
        if self.config.clip_range == 0 and self.config.clip_rule != "clip":
            raise UsageError(f"--clip-rule {self.config.clip_rule} needs a --clip-range above 0, such as 0.2")
        if self.config.clip_range > 0:
            self.limit.rules.append(RATIO_RULES[self.config.clip_rule](self.config.clip_range))
        if self.config.bottleneck.size or self.config.memory != "none":
            # A compiled gradient would draw one noise for all steps, or be compiled anew for each length of sequences.
            self.compiles = self.captures = ()
        rate = self.config.learning_rate
        # What is moved back also lowers the rate: with a band reaching beyond the target, most updates are moved back.
        self.learning_rate = Adaptive(rate, factor=1 / 1.5, low=0.25, high=1.0, minimum=rate / 30, maximum=3 * rate)

    @on_torchs_threads
    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> UpdateResult:
        """Improve policy and critic on a full rollout, and report how far the policy moved.

        Raises NonFiniteError naming the field where the rollout is not finite, and SkippedUpdateError where a loss, a
        gradient or a weight is not; policy, critic, optimizer and reward scale are then what they were before.
        """
        config, before = self.config, self.snapshot()
        batch = self.make_batch(rollout)
        left = 1 - progress if config.lr_schedule == "linear" else 1
        rate, of_critic = self.learning_rate.value * left, config.critic_learning_rate * left
        rates = torch.tensor([rate, of_critic] if of_critic else rate, device=self.device)
        try:
            with self.hold(batch) as move:
                trace = self._learn(batch, rates, move)
                metrics = dict(zip(_TRACED, torch.stack(trace).double().mean(0).tolist(), strict=True))
                largest = max(float(part.flat.abs().max()) for part in (self.policy_params, self.critic_params))
                for tag, figure in [*metrics.items(), ("largest weight", largest)]:
                    if not math.isfinite(figure):
                        raise NonFiniteError(f"{tag.rpartition('/')[2]} is {figure} in update {self.n_updates + 1}")
                attempted = self.reference.move_back(batch, move, before["policy"]["flat"])
        except (NonFiniteError, ValueError) as problem:  # ValueError: the new policy has no KL, as its outputs overflow
            self.undo(before)
            raise SkippedUpdateError(str(problem)) from None
        if config.lr_schedule == "kl" and config.kl.target > 0:
            self.learning_rate.adapt(move.report.attempted, at_most(config.kl.target))
        metrics |= self.reference.end(move.new, batch.reference, batch.mask, attempted)
        metrics |= self.bottleneck.end(batch.inputs, move.new, batch.mask)
        self.end_update(rollout)
        metrics |= {"train/learning_rate": rate, "train/ent_coef": config.ent_coef}
        return UpdateResult(move.report, metrics | reach(batch, move, config.clip_range) | self.diagnostics(batch))

    def _learn(self, batch: Batch, learning_rate: Tensor, move: Move) -> list[Tensor]:
        """Take epochs of minibatch steps, the critic's alone once the policy moved too far; the joint ones' metrics."""
        config, trace, moves = self.config, [], True
        fused = suits(self.policy, self.policy_params) and applies(self.critic, self.critic_params)
        self.fused = (FusedPolicy(self.policy), FusedCritic(self.critic)) if fused and not self.limit.replaces else None
        rows = batch if self.fused is None else Rows.of(batch)
        for epoch in range(1, config.n_epochs + 1):
            minibatches = rows.minibatches(config.batch_size, self.rng)
            for minibatch in minibatches:
                if not moves:
                    self._critic_step(minibatch, learning_rate)
                    continue
                trace.append(self._step(minibatch, learning_rate))
                last = epoch == config.n_epochs and minibatch is minibatches[-1]
                moves = last or not move.exceeded("minibatch", at=epoch)
            moves = moves and (epoch == config.n_epochs or not move.exceeded("epoch", at=epoch))
        return trace

    def _critic_step(self, minibatch: Batch, learning_rate: Tensor) -> None:
        """Take one step of Adam with the critic alone, along its gradient clipped to ``max_grad_norm``."""
        config = self.config
        if self.fused is not None:
            gradient = self.fused[1].gradient(minibatch, config.clip_range_vf, config.vf_coef)[1]
        else:
            with torch.enable_grad():
                loss = value_loss(self.critic(minibatch.inputs), minibatch, config.clip_range_vf)
                gradient = gradients(config.vf_coef * (loss + self.critic.cost(minibatch)), self.critic_params)
        clip_(gradient := self.ranks.total(gradient)[0], config.max_grad_norm)
        adam_step(gradient, learning_rate.flatten()[-1], self.critic_params)

    def _step(self, minibatch: Batch, learning_rate: Tensor) -> Tensor:
        """Take one step of Adam on a minibatch: -E[ratio A], E[(V - return)^2] and the gradient's norm, [3]."""
        learn = partial(self._gradient, minibatch)
        loss_pi, loss_v, gradient = self.total(learn, 2, self.policy_params, self.critic_params)
        norm = self.take_step(gradient, learning_rate, self.config.max_grad_norm, self.config.clip_grads_apart)
        return torch.stack([loss_pi, loss_v, norm])

    def _gradient(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both losses on a minibatch, and the gradient of policy loss + vf_coef * value loss in all weights."""
        config = self.config
        if self.fused is not None:
            loss_pi, of_policy = self.fused[0].gradient(minibatch, self.limit, config.ent_coef, self.reference.held)
            loss_v, of_critic = self.fused[1].gradient(minibatch, config.clip_range_vf, config.vf_coef)
            return loss_pi, loss_v, torch.cat([of_policy, of_critic])
        return self._gradient_by_autograd(minibatch)

    def _gradient_by_autograd(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``_gradient`` of networks of any kind, and of rules of any kind."""
        config = self.config
        with torch.enable_grad():
            seen, held = self.critic.seen(minibatch.inputs), self.reference.held
            new = self.policy(seen)
            loss, surrogate = policy_loss(new, minibatch, self.limit, config.ent_coef, held)
            if self.config.bottleneck.size:
                noisy, rates = self.bottleneck.noisy(minibatch.inputs)
                also, _ = policy_loss(noisy, minibatch, self.limit, config.ent_coef, held)
                loss = (loss + also) / 2 + minibatch.weight @ rates
            loss_v = value_loss(self.critic(seen), minibatch, config.clip_range_vf)
            loss = loss + config.vf_coef * (loss_v + self.critic.cost(minibatch))
            gradient = gradients(loss, self.policy_params, self.critic_params)
        return surrogate.detach(), loss_v.detach(), gradient

    def state_dict(self) -> State:
        return {**super().state_dict(), "learning_rate": self.learning_rate.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.learning_rate.load_state_dict(state["learning_rate"])
