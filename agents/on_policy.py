"""What on-policy agents share: two networks, a batch from a rollout, and what an update changes and undoes.

Policy and critic are two networks, so the critic's gradient cannot move the policy; on request they share one, whose
hidden layers are the policy's.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from klrl.agents.actor import Actions
from klrl.agents.base import Agent, State, chunks
from klrl.agents.bottleneck import Bottleneck, BottleneckConfig
from klrl.agents.limits import KLTarget
from klrl.agents.memory import Memory
from klrl.agents.reference import Reference, ReferenceConfig
from klrl.buffers.returns import RewardScale, gae
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import Checked, Fraction, Needs, NonNegative, Range, Widths
from klrl.errors import UsageError
from klrl.kl import ALONE, Ranks, select
from klrl.policies.bayesian import BayesianCritic
from klrl.policies.bottleneck import BottleneckNetwork
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.heads import make_head
from klrl.policies.memory import SEQUENCE, environment_rows
from klrl.policies.networks import Activation, Critic, OwnNetwork
from klrl.policies.observations import Observation
from klrl.policies.own import HeadName
from klrl.policies.parameters import FlatParameters, adam_step, clip_, gradients
from klrl.policies.policy import Policy
from klrl.policies.shared import SharedCritic
from klrl.policies.spaces import mask_sizes


@dataclass(frozen=True)
class OnPolicyConfig(Checked):
    n_steps: Annotated[int, Range(2)] = 256
    """Steps of each environment between two updates; of two rows, at most one only resets."""
    gamma: Fraction = 0.99
    """Discount factor."""
    gae_lambda: Fraction = 0.95
    """Trade-off between bias (0) and variance (1) of the advantage estimates."""
    normalize_advantage: bool = True
    """Scale a rollout's advantages to mean 0 and standard deviation 1."""
    normalize_observation: bool = True
    """Scale Box observations (not images of 36 x 36 or more) by their running mean and standard deviation."""
    normalize_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden_sizes: Widths = (64, 64)
    """Widths of the hidden layers, of the policy and of the critic."""
    critic_hidden_sizes: Widths = ()
    """Widths of the critic's hidden layers; by default as hidden_sizes."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    layer_norm: bool = False
    """Normalise each hidden layer's numbers before their activation."""
    critic: Literal["point", "bayesian"] = "point"
    """Values by weights that are numbers, or by a last layer that is a distribution, which says how sure it is
    (experimental)."""
    critic_kl: Annotated[NonNegative, Needs("critic", "bayesian")] = 1e-3
    """Weight of a bayesian critic's KL to its prior beside the squared error."""
    log_std_init: Annotated[float, Range(-80, 80)] = 0.0
    """Logarithm of the initial standard deviation of continuous actions, where a bounded action spans -1 to 1."""
    memory: Literal["none", "gru", "lstm"] = "none"
    """Let policy and critic each remember an episode's observations, by a recurrent layer before the hidden ones. On a
    CPU an lstm is the faster one. A minibatch is then of whole environments, batch_size rows or more."""
    memory_size: Annotated[int, Range(1, 4096), Needs("memory")] = 64
    """Numbers of that layer's hidden state."""
    head: HeadName = "plain"
    """The policy's distribution: a normal or categoricals, as actions are (plain), a normal whose standard deviation
    depends on the state, a Beta over bounded actions, or by a head of one's own, made with the action space."""
    kl: KLTarget = field(default_factory=KLTarget)


@dataclass(frozen=True)
class Batch:
    """A rollout flattened to B = T * N rows, with what the agent thinks of each."""

    inputs: Inputs
    old: Any
    """The policy that acted, a distribution."""
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor
    weight: Tensor
    """[B]: 0 for rows that only reset an environment, equal for the others; sums to 1 over the batches of all ranks, so
    that ``weight @ x``, summed over them, is x's mean over states. A minibatch's is scaled to estimate that mean."""
    reference: Any = None
    """A second policy that the new one is held to, where there is one."""

    @property
    def mask(self) -> Tensor:
        """Bool [B]: the rows that count."""
        return self.weight > 0

    def take(self, index: Tensor | npt.NDArray[Any] | slice, scale: float = 1.0) -> "Batch":
        """The rows ``index``, or with a memory whole environments', as a batch, their weights times ``scale``."""
        index = index if isinstance(index, slice) else torch.as_tensor(index, device=self.weight.device)
        parts = (self.action, self.log_prob, self.value, self.advantage, self.returns)
        inputs = {key: rows[index] for key, rows in self.inputs.items()}
        old, reference = (dist if dist is None else select(dist, index) for dist in (self.old, self.reference))
        return Batch(inputs, old, *(part[index] for part in parts), self.weight[index] * scale, reference)  # type: ignore[call-arg]

    def minibatches(self, size: int, rng: np.random.Generator) -> list["Batch"]:
        """All rows in random order, ``size`` at a time; the last minibatch has what is left."""
        rows = len(self.weight)
        if SEQUENCE in self.inputs:  # whole sequences: those of some environments at a time
            return [self.take(i, rows / len(i)) for i in environment_rows(self.inputs, math.ceil(rows / size), rng)]
        shuffled = self.take(rng.permutation(rows), rows / size)
        starts = range(0, rows, size)
        return [shuffled.take(slice(i, i + size), 1.0 if i + size <= rows else size / (rows - i)) for i in starts]


def value_loss(value: Tensor, batch: Batch, clip_range_vf: float = 0.0) -> Tensor:
    """E[(V - return)^2]; clipped, of each state the larger of that and (V_clipped - return)^2.

    V_clipped stays within ``clip_range_vf`` of what the value was before the update. Source: OpenAI Baselines' PPO.
    """
    squared = (value - batch.returns).square()
    if clip_range_vf > 0:
        clipped = value.clamp(batch.value - clip_range_vf, batch.value + clip_range_vf)
        squared = torch.maximum(squared, (clipped - batch.returns).square())
    return batch.weight @ squared


def make_critic(make: Callable[..., nn.Module], config: Any, policy: Policy, init: torch.Generator) -> Critic:
    """The critic that ``config`` asks for, on a network of ``make``'s, from widths, outputs and their gain."""
    if getattr(config, "share_network", False):
        if config.critic != "point" or config.critic_hidden_sizes or isinstance(policy.network, BottleneckNetwork):
            others = "--critic bayesian, --critic-hidden-sizes and a bottleneck"
            raise UsageError(f"--share-network goes without {others}: --no-share-network")
        return SharedCritic(policy, init)
    widths = config.critic_hidden_sizes or config.hidden_sizes
    make = partial(make, widths)
    if config.critic == "point":
        return Critic(make(1, 1.0))
    width = widths[-1]
    return BayesianCritic(make(width, 2**0.5), width, config.critic_kl, init)


class OnPolicyAgent(Agent):
    """Learns from whole rollouts of its policy; Box, Discrete, MultiDiscrete and MultiBinary actions."""

    Config: ClassVar[type[Any]] = OnPolicyConfig
    takes_masks = True
    network_options = ("hidden_sizes", "critic_hidden_sizes", "activation", "layer_norm")

    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        config = self.config
        self.encoder, head = self.make_encoder(), self.make_head()
        self.memory = Memory(self)
        parts = (network, self.encoder, config.activation, config.layer_norm, init)
        make, make_value = (partial(self.memory.make(of_critic), *parts) for of_critic in (False, True))
        self.bottleneck = Bottleneck(getattr(config, "bottleneck", BottleneckConfig()), self)
        layers = self.bottleneck.network(partial(make, config.hidden_sizes), head.size, init)
        self.policy = Policy(self.encoder, layers, head).to(self.device)
        self.critic = make_critic(make_value, config, self.policy, init).to(self.device)
        self.policy_params = FlatParameters(self.policy, "policy")
        self.critic_params = FlatParameters(self.critic, "critic")
        self.reward_scale = RewardScale(config.gamma, config.normalize_reward)
        self.limit = config.kl.make_limit(self.device)
        self.reference = Reference(getattr(config, "reference", ReferenceConfig()), self)

    def make_encoder(self) -> ObservationEncoder:
        """What networks are shown of observations."""
        sizes = mask_sizes(self.observation_space, self.action_space)
        return ObservationEncoder(self.observation_space, self.device, self.config.normalize_observation, (), sizes)

    def make_head(self) -> Any:
        """The policy's head, a ``Head``."""
        return make_head(self.action_space, self.config.log_std_init, self.config.head)

    def prepare(self) -> None:
        self.reference.read()

    def join(self, ranks: Ranks) -> None:
        super().join(ranks)
        self.reward_scale.ranks = ranks

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critic": self.critic}

    def load_policy(self, other: Agent) -> list[str]:
        taken = super().load_policy(other)
        theirs = other.reward_scale if isinstance(other, OnPolicyAgent) else None
        if "critic" in taken and theirs is not None and theirs.enabled and self.reward_scale.enabled:
            # The critic's values are of rewards as its agent scales them.
            self.reward_scale.load_state_dict({**theirs.state_dict(), "running": []})
            taken.append("scale of rewards")
        return taken

    def collect(self, obs: Observation, buffer: RolloutBuffer) -> Actions:
        state = self.memory.carry(buffer)
        return self.act(obs) if state is None else self.act(obs, state=state)

    @property
    def stored_space(self) -> spaces.Space[Any]:
        """The space of actions as buffers hold them."""
        return self.action_space

    def new_buffer(self, n_envs: int, autoreset: AutoresetMode | str = AutoresetMode.NEXT_STEP) -> RolloutBuffer:
        """An empty buffer for one rollout. Raises UsageError where it does not fit into memory."""
        steps = self.config.n_steps
        try:
            return RolloutBuffer(self.observation_space, self.stored_space, steps, n_envs, autoreset)
        except UsageError:
            raise
        except (MemoryError, ValueError):  # ValueError: more than an array can have
            raise UsageError(f"--n-steps {steps:,} of {n_envs:,} environments do not fit into memory") from None

    @torch.no_grad()
    def value(self, obs: Observation) -> Tensor:
        """V(s), [B]: the discounted return that the critic expects, of rewards as they are scaled for it; with a
        memory, where each observation is an episode's first."""
        return torch.cat([self.critic(chunk) for chunk in chunks(self.encoder(obs))])

    def critic_reward(self, reward: npt.NDArray[np.float64], obs: Observation) -> npt.NDArray[np.float64]:
        """The rewards [B] as they are scaled for the critic; the scale stays as it is."""
        scale, nothing = copy.copy(self.reward_scale), np.zeros((1, len(reward)), np.bool_)
        scale.ranks = ALONE
        return scale(reward[None].astype(np.float32), nothing, nothing)[0].astype(np.float64)

    @torch.no_grad()
    def make_batch(self, rollout: RolloutBuffer) -> Batch:
        """Evaluate a full rollout in one batched pass: the policy that acted, log-probs, values, advantages.

        Raises ValueError where it is not full, and NonFiniteError naming the field where it is not finite.
        """
        rows = rollout.n_steps * rollout.n_envs
        self.policy_params.sync()
        self.critic_params.sync()
        rollout.check_full()
        rollout.check_finite()
        inputs = self.memory.sequences(rollout, self.encoder(rollout.obs))
        seen = self.critic.seen(inputs)
        value = torch.cat([self.critic(chunk) for chunk in chunks(seen)])
        inputs, seen = ({key: part[:rows] for key, part in each.items()} for each in (inputs, seen))
        old = self.policy_at(seen)
        parts = (rollout.action, *self.estimates(rollout, value.view(rollout.n_steps + 1, rollout.n_envs)))
        action, advantages, targets, weights = (torch.as_tensor(x, device=self.device).flatten(0, 1) for x in parts)
        reference = self.reference.seen(rollout.obs_before_steps(), old, weights > 0)
        return Batch(inputs, old, action, old.log_prob(action), value[:rows], advantages, targets, weights, reference)

    def estimates(self, rollout: RolloutBuffer, value: Tensor) -> tuple[Any, Any, Any]:
        """Advantages, returns and weights, each [T, N], from the values [T + 1, N] of all observations."""
        config, table = self.config, value.cpu().numpy()
        following = rollout.values_of_next(table, lambda obs: self.value(obs).cpu().numpy())
        terminated, ended = rollout.terminated, rollout.terminated | rollout.truncated
        reward = self.reward_scale(rollout.reward, ended, rollout.valid)
        advantage, returns = gae(reward, table[:-1], following, terminated, ended, config.gamma, config.gae_lambda)
        if config.normalize_advantage:
            mean, deviation = self.ranks.moments(advantage[rollout.valid].astype(np.float64))
            advantage = ((advantage - np.float64(mean)) / (deviation + 1e-8)).astype(np.float32)
        weight = rollout.valid / max(self.ranks.sum(float(rollout.valid.sum()))[0], 1)
        return advantage, returns, weight.astype(np.float32)

    def hold(self, batch: Batch) -> Any:
        """A context in which the policy is updated under ``self.limit``, measured on the batch."""
        policy, params = partial(self.policy_at, batch.inputs), self.policy_params
        more = {"optimizer": params.optimizer, "actions": batch.action, "old": batch.old}
        return self.limit.update(policy, params.flat, batch.mask, **more)

    def gradient_of(self, loss: Tensor) -> Tensor:
        """d loss / d weights of policy and critic, as one vector."""
        return gradients(loss, self.policy_params, self.critic_params)

    def take_step(self, gradient: Tensor, learning_rate: Tensor, max_grad_norm: float, apart: bool = False) -> Tensor:
        """Take one step of Adam along ``gradient`` clipped to ``max_grad_norm``, ``apart``: policy and critic each.

        Returns the norm before, a scalar tensor. learning_rate: a scalar tensor on the agent's device, or [2], of each.
        """
        parts = gradient.tensor_split([self.policy_params.flat.numel()]) if apart else (gradient,)
        norms = [clip_(part, max_grad_norm) for part in parts]
        adam_step(gradient, learning_rate, self.policy_params, self.critic_params)
        return torch.hypot(*norms) if apart else norms[0]

    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """SB3's metrics over the whole batch; the values are those from before the update, as SB3 logs them."""
        returns, value = self.ranks.rows(*(x[batch.mask].double() for x in (batch.returns, batch.value)))
        spread, unexplained = (float(x.var(correction=0)) for x in (returns, returns - value))
        explained = 1 - unexplained / spread if spread > 0 else 0.0
        mean = {"train/explained_variance": explained, "health/value_mean": float(value.mean())}
        return mean | self.policy.head.metrics() | self.critic.metrics(batch, self.ranks)

    def end_update(self, rollout: RolloutBuffer) -> None:
        """Move what stands still until the KL was measured: the observations' statistics, and the count of updates."""
        self.encoder.update(rollout.obs_before_steps(), torch.as_tensor(rollout.valid.flatten(), device=self.device))
        self.n_updates += 1

    def _learned(self) -> dict[str, Any]:
        """What an update changes before it is known to be whole."""
        return {"policy": self.policy_params, "critic": self.critic_params, "reward_scale": self.reward_scale}

    def snapshot(self) -> State:
        """Copies of what an update changes, for ``undo``."""
        return {name: part.state_dict() for name, part in self._learned().items()}

    def undo(self, before: State) -> None:
        """Put back, bit for bit, what ``snapshot`` saw."""
        for name, part in self._learned().items():
            part.load_state_dict(before[name])

    def state_dict(self) -> State:
        state = {**self.snapshot(), "limit": self.limit.state_dict(), "encoder": self.encoder.state_dict()}
        state |= {"reference": self.reference.state_dict(), "bottleneck": self.bottleneck.state_dict()}
        state |= {"memory": self.memory.state_dict()}
        return {**state, "rng": self.rng.bit_generator.state, "n_updates": self.n_updates}

    def load_state_dict(self, state: State) -> None:
        self.undo(state)
        self.limit.load_state_dict(state["limit"])
        self.encoder.load_state_dict(state["encoder"])
        self.reference.load_state_dict(state.get("reference", {}))
        self.bottleneck.load_state_dict(state.get("bottleneck", {}))
        self.memory.load_state_dict(state.get("memory", {}))
        self.rng.bit_generator.state = state["rng"]
        self.n_updates = int(state["n_updates"])
