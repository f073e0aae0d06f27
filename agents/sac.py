"""SAC: maximum-entropy reinforcement learning (Haarnoja et al. 2018b), its policy's KL tracked, and held on request.

Continuous and discrete actions differ in ``sac_continuous`` and ``sac_discrete`` alone.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from klrl.agents.actor import Actions
from klrl.agents.base import Agent, State, UpdateResult
from klrl.agents.reference import Reference
from klrl.agents.sac_continuous import SampledActions
from klrl.agents.sac_discrete import EnumeratedActions
from klrl.agents.sac_options import SACConfig
from klrl.buffers.replay import ReplayBuffer, Transitions
from klrl.errors import SkippedUpdateError, UsageError
from klrl.kl import Dual, Move, Penalty, at_least, hold_states
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.networks import Array, OwnNetwork, TwinCritic, make_network
from klrl.policies.observations import Observation
from klrl.policies.parameters import FlatParameters, adam_step, gradients
from klrl.policies.policy import Policy
from klrl.policies.spaces import mask_sizes
from klrl.policies.squashed import CorrelatedNoise
from klrl.policies.threads import on_torchs_threads

_STATES = 1024  # of the replay buffer, on which a window's KL is measured
_TRACED = ("train/critic_loss", "train/q_mean", "train/actor_loss", "entropy/sampled")


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Sum over both critics of E[(Q(s, a) - y)^2] / 2. Source: Haarnoja et al. (2018b), equation 5."""
    return 0.5 * (q - target).square().mean(-1).sum()


@dataclass
class Window:
    """The policy's gradient steps between two measurements of its KL."""

    inputs: Inputs
    """The replay states that it is measured on."""
    before: State
    """What was learned when it began."""
    move: Move
    steps: int = 0
    trace: list[Tensor] = field(default_factory=list)
    """Metrics of each step, to be averaged."""


class SAC(Agent):
    """Soft actor-critic for Box actions with finite bounds, and for Discrete, MultiDiscrete and MultiBinary ones.

    Every ``kl.every`` gradient steps make a window. How far it moved the policy is measured on replay states, and held
    with ``kl.target`` above 0 as in the other agents: by a penalty, an early stop of the policy's steps, and a rule.
    """

    Config = SACConfig
    compiles = ("_critic_gradient", "_policy_gradient")
    captures = ("_step",)

    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        """``network`` is the policy's; the critics keep theirs, on encoded observations and actions."""
        config, space = self.config, self.action_space
        if mask_sizes(self.observation_space, space):
            leave = "--env.action-masks off, or gymnasium.wrappers.FilterObservation, leaves them out"
            raise UsageError(f"SAC takes no action masks: {leave}")
        self.encoder = ObservationEncoder(self.observation_space, self.device, normalize=False)
        self.actions: Any = (
            SampledActions(space, config.target_entropy)
            if isinstance(space, spaces.Box)
            else EnumeratedActions(space, config.target_entropy_fraction)
        )
        head, sizes, norm = self.actions.head, config.hidden_sizes, config.layer_norm
        layers = make_network(network, self.encoder, config.activation, norm, init, sizes, head.size, 1.0)
        self.policy = Policy(self.encoder, layers, head).to(self.device)
        form: Any = (config.critic_hidden_sizes or sizes, init, config.critic_activation, norm)
        self.critic = TwinCritic(self.encoder, *self.actions.critic_shape, *form).to(self.device)
        self.old_policy, self.target_critic = copy.deepcopy(self.policy), copy.deepcopy(self.critic)
        self.policy_params, self.old_params = (
            FlatParameters(module, "policy", eps=1e-8) for module in (self.policy, self.old_policy)
        )
        self.critic_params, self.target_params = (
            FlatParameters(module, "critic", eps=1e-8) for module in (self.critic, self.target_critic)
        )
        rate = config.ent_coef_lr / self.actions.dimensions
        self.alpha = Dual(config.ent_coef, rate=rate, minimum=1e-6, maximum=1e6)
        self.temperature = Penalty(at_least(self.actions.target_entropy), self.alpha)
        rates = config.learning_rate, config.critic_learning_rate or config.learning_rate
        self.learning_rate, self.critic_rate = (torch.tensor(rate, device=self.device) for rate in rates)
        self.noise = CorrelatedNoise(self.rng, config.noise_correlation)
        self.limit = config.kl.make_limit(self.device)
        self.reference = Reference(config.reference, self)
        self.informed = False  # by another agent's policy, which is then no worse than random actions
        self._window: Window | None = None

    def prepare(self) -> None:
        self.reference.read()

    def load_policy(self, other: Agent) -> list[str]:
        taken = super().load_policy(other)
        self.informed = True
        return taken

    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """Actions [N, d] in [-1, 1], or joint actions [N, 1]; at random until the first update of a new policy."""
        if self.n_updates > 0 or self.informed or deterministic or rng is not None:
            return super().act(obs, deterministic, self.noise if rng is None else rng)
        batch = self.encoder.layout.batch(obs)
        rows = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        return self.actions.random(self.noise, rows)

    @torch.no_grad()
    def value(self, obs: Observation) -> Tensor:
        """What the lower critic expects, [B]: of the mode of continuous actions, over all of discrete ones."""
        inputs, alpha = self.encoder(obs), torch.tensor(self.alpha.value)
        return self.actions.value(self.policy(inputs), self.critic, inputs, alpha)

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critic": self.critic, "target critic": self.target_critic}

    def critic_reward(self, reward: Any, obs: Observation) -> Any:
        """r + alpha * H, as the value is soft; that of continuous actions, a Q, leaves out the first state's H."""
        return reward + self.alpha.value * self.distribution(obs).entropy().double().cpu().numpy()

    def new_buffer(self, n_envs: int, autoreset: AutoresetMode | str = AutoresetMode.NEXT_STEP) -> ReplayBuffer:
        """A replay buffer for ``n_envs`` environments. Raises UsageError where an update would outlast a window."""
        config = self.config
        steps = config.gradient_steps if config.gradient_steps >= 0 else config.train_freq * n_envs
        if not 1 <= steps <= config.kl.every:
            raise UsageError(
                f"--gradient-steps {config.gradient_steps} of {n_envs} environments: an update takes 1 to --kl.every "
                f"({config.kl.every}) steps, not {steps}"
            )
        self._window = None
        sizes = (self.actions.stored_width, config.buffer_size, n_envs)
        more: Any = (config.gamma, config.n_step, config.buffer_folder, autoreset)
        return ReplayBuffer(self.observation_space, *sizes, *more)

    def ready(self, buffer: ReplayBuffer) -> bool:
        steps, new_steps, empty = self.ranks.sum(buffer.steps, buffer.new_steps, float(buffer.size == 0))
        due = self.config.train_freq * buffer.n_envs * self.ranks.size
        return steps >= self.config.learning_starts and not empty and new_steps >= due

    @on_torchs_threads
    @torch.no_grad()
    def update(self, buffer: ReplayBuffer, progress: float = 0.0) -> UpdateResult | None:
        """Gradient steps on replayed transitions; a report at the end of a window of ``kl.every`` of them, else None.

        Raises SkippedUpdateError where a loss or weight is not finite; all is then as it was when the window began.
        """
        self.policy_params.sync()
        self.critic_params.sync()
        due = self.config.train_freq * buffer.n_envs
        steps = due if self.config.gradient_steps < 0 else self.config.gradient_steps
        # What is over, on any rank, counts for the next update; the random steps of the beginning do not.
        over = int(self.ranks.sum(buffer.new_steps)[0]) % (due * self.ranks.size)
        buffer.new_steps = over if self.ranks.rank == 0 else 0
        result = None
        for _ in range(steps):
            window = self._window or self._begin_window(buffer)
            self._gradient_step(window, buffer.sample(self.config.batch_size, self.rng, self.device))
            if window.steps == self.config.kl.every:
                result = self._end_window(window)
        return result

    @torch.no_grad()
    def finish_window(self, buffer: ReplayBuffer) -> UpdateResult | None:
        if self.ranks.any(buffer.size == 0):
            return None
        before = self.state_dict()
        result = self._end_window(self._window or self._begin_window(buffer))
        if result.kl.rolled_back == 0:  # a run that goes on later then does so as if it had not stopped
            self.load_state_dict(before)
        return result

    def _gradient_step(self, window: Window, batch: Transitions) -> None:
        """Take one step of critics, policy, targets and temperature, and see whether the policy is to stop."""
        noise = self.actions.draw_noise(self.rng, len(batch.reward)).to(self.device)
        alpha = torch.tensor(self.alpha.value, device=self.device)
        try:
            window.trace.append(self._step(batch, noise, alpha, moves=window.move.stopped_at == 0))
        except ValueError as problem:  # the policy has no KL, as its outputs overflow
            raise self._given_up(window, str(problem)) from None
        *metrics, entropy, room, weights = window.trace[-1].tolist()
        if not math.isfinite(sum(metrics) + entropy + weights):
            found = dict(zip(_TRACED, [*metrics, entropy], strict=True))
            why = f"a loss or weight is not finite after {self.n_updates} gradient steps: {found}"
            raise self._given_up(window, why)
        self._adapt_temperature(entropy, window.move, room)
        self.n_updates += 1
        window.steps += 1
        if window.move.stopped_at == 0 and window.steps < self.config.kl.every:
            tenth = max(1, self.config.kl.every // 10)
            if not window.move.exceeded("minibatch", at=window.steps) and window.steps % tenth == 0:
                window.move.exceeded("epoch", at=window.steps)

    def _adapt_temperature(self, entropy: float, move: Move, room: float = 1.0) -> None:
        """Let alpha answer the entropy in so far as the policy can answer alpha, so that it does not wind up.

        A stopped policy answers nothing. Under a penalty beta * KL(old || policy) the best policy answers a change of
        log alpha by alpha / (alpha + beta) of what it does without: the curvatures of both terms in a normal's log
        scale, or in logits. Half of beta counts, as the penalty begins to pull only once the policy has moved. States
        with a limit of their own answer only within the ``room`` that they have left.
        """
        alpha, limits = self.alpha.value, [self.limit, *([self.reference.held] if self.reference.held else [])]
        beta = sum(limit.penalty.coefficient.value for limit in limits)
        share = 0.0 if move.stopped_at else room * alpha / (alpha + 0.5 * beta)
        target = self.temperature.bound.limit
        self.temperature.adapt(target + share * (entropy - target))

    def _step(self, batch: Transitions, noise: Tensor, alpha: Tensor, moves: bool) -> Tensor:
        """Take Adam's steps and the targets': critic loss, mean target, policy loss, entropy, room, sum of weights.

        ``moves``: whether the policy is to move; the critics learn in any case.
        """
        loss_q, target, of_critic = self.ranks.average(*self._critic_gradient(batch, noise[0], alpha))
        adam_step(of_critic, self.critic_rate, self.critic_params)
        learn = partial(self._policy_gradient, batch, noise[1], alpha, moves)
        found = self.total(learn, 3, *([self.policy_params] if moves else []))
        loss_pi, entropy, room, *of_policy = (part / self.ranks.size for part in found)
        for gradient in of_policy:
            adam_step(gradient, self.learning_rate, self.policy_params)
        self.target_params.flat.lerp_(self.critic_params.flat, self.config.tau)
        return torch.stack([loss_q, target, loss_pi, entropy, room, self.policy_params.flat.sum()])

    def _critic_gradient(self, batch: Transitions, noise: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The critics' loss, the mean of what they are drawn to, and the loss's gradient in their weights."""
        following, _ = self.actions.soft_value(
            self.policy(batch.next_inputs), self.target_critic, batch.next_inputs, alpha, noise
        )
        target = batch.reward + batch.discount * following
        with torch.enable_grad():
            loss = critic_loss(self.actions.q(self.critic, batch.inputs, batch.action), target)
            gradient = gradients(loss, self.critic_params)
        return loss.detach(), target.mean(), gradient

    def _policy_gradient(self, batch: Transitions, noise: Tensor, alpha: Tensor, moves: bool) -> tuple[Tensor, ...]:
        """The policy's loss, its entropy, the room that states have to move, and, where it moves, the loss's gradient.

        The room is the mean of 1 - KL / kl.state_limit, at least 0; 1 where nothing limits a single state.
        """
        room = torch.ones((), device=self.device)
        held = moves and (self.limit.penalises or len(self.limit.rules) > 0)
        with torch.enable_grad():
            policy = within = self.policy(batch.inputs)
            if held:
                with torch.no_grad():  # the policy as it was when the window began
                    old = self.old_policy(batch.inputs)
                    if self.limit.rules:
                        room = (1 - self.limit.kl(old, policy) / self.config.kl.state_limit).clamp_min(0).mean()
                within = self.limit.within(old, hold_states(old, policy, self.limit.rules, self.limit.direction))
            value, entropy = self.actions.soft_value(within, self.critic, batch.inputs, alpha, noise)
            loss = loss_pi = -value.mean()
            if held:  # beta * E[KL(old || policy)], and what draws the policy to a projected one
                loss = loss + torch.as_tensor(self.limit.term(old, policy, within)).mean()
            if self.reference.held and moves:
                loss = (
                    loss + torch.as_tensor(self.reference.term(self.reference.at(batch.inputs, policy), policy)).mean()
                )
            gradient = [gradients(loss, self.policy_params)] if moves else []
        return loss_pi.detach(), entropy.mean().detach(), room, *gradient

    def _begin_window(self, buffer: ReplayBuffer) -> Window:
        return self._open(buffer.sample(_STATES, self.rng, self.device).inputs)

    def _open(self, inputs: Inputs) -> Window:
        params = self.policy_params
        self.old_params.load_state_dict(params.state_dict())
        move = self.limit.begin(partial(self.policy_at, inputs), params.flat, optimizer=params.optimizer)
        self._window = Window(inputs, self._weights(), move)
        return self._window

    def _given_up(self, window: Window, why: str) -> SkippedUpdateError:
        """Put back what was learned when the window began, and make the error that says why."""
        self._load_weights(window.before)
        self._window = None
        return SkippedUpdateError(why)

    def _end_window(self, window: Window) -> UpdateResult:
        try:
            report = window.move.end()
        except ValueError as problem:
            raise self._given_up(window, str(problem)) from None
        at = self.reference.at(window.inputs, window.move.new)
        distance = self.reference.end(window.move.new, at)
        if report.rolled_back:  # alpha goes back with the policy that it answered
            self.alpha.retrace(window.before["alpha"], 1 - report.rolled_back)
        self._window = None
        means = torch.stack(window.trace).double().mean(0).tolist() if window.trace else []
        metrics = dict(zip(_TRACED, means, strict=False))
        alpha, target = self.alpha.value, self.temperature.bound.limit
        return UpdateResult(report, metrics | distance | {"train/ent_coef": alpha, "entropy/target": target})

    def _weights(self) -> State:
        return {
            "policy": self.policy_params.state_dict(),
            "critic": self.critic_params.state_dict(),
            "target": self.target_params.flat.clone(),
            "alpha": self.alpha.state_dict(),
        }

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        self.policy_params.load_state_dict(state["policy"])
        self.critic_params.load_state_dict(state["critic"])
        self.target_params.flat.copy_(state["target"])
        self.alpha.load_state_dict(state["alpha"])

    def state_dict(self) -> State:
        window: State = {}
        if self._window is not None:
            trace = torch.stack(self._window.trace) if self._window.trace else None
            window = {"inputs": self._window.inputs, "before": self._window.before, "trace": trace}
            window |= {"steps": self._window.steps, "stopped_at": self._window.move.stopped_at}
        return {
            **self._weights(),
            "limit": self.limit.state_dict(),
            "reference": self.reference.state_dict(),
            "informed": self.informed,
            "rng": self.rng.bit_generator.state,
            "noise": self.noise.state_dict(),
            "n_updates": self.n_updates,
            "window": window,
        }

    def load_state_dict(self, state: State) -> None:
        self._window = None
        if saved := state["window"]:  # the policy of its beginning is that of the weights it had
            self._load_weights(saved["before"])
            window = self._open({key: part.to(self.device) for key, part in saved["inputs"].items()})
            window.steps, window.move.stopped_at = saved["steps"], saved["stopped_at"]
            window.trace = [] if saved["trace"] is None else list(saved["trace"].to(self.device))
        self._load_weights(state)
        self.limit.load_state_dict(state["limit"])
        self.reference.load_state_dict(state.get("reference", {}))
        self.informed = state.get("informed", False)
        self.rng.bit_generator.state = state["rng"]
        self.noise.load_state_dict(state["noise"])
        self.n_updates = int(state["n_updates"])
