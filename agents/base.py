"""What an agent is: spaces and a config in, actions out, one report per update. No environment, logger or trainer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.config import NonNegative, PositiveInt
from klrl.kl import (
    Banded,
    Bound,
    Coefficient,
    Direction,
    Fixed,
    KLReport,
    Penalty,
    at_most,
    concatenate,
    freeze,
    kl,
    reverse_kl,
)
from klrl.policies.distributions import PolicyDistribution
from klrl.policies.encoder import Inputs, Observation, ObservationEncoder
from klrl.policies.networks import Actor
from klrl.policies.spaces import check_action_space

Actions = npt.NDArray[Any]
State = dict[str, Any]
CHUNK = 2048  # rows of a batched pass: their activations stay in cache


@dataclass(frozen=True)
class KLConfig:
    """How far an update may move the policy, and what answers an excess. The same group for every agent."""

    target: NonNegative = 0.02
    """Limit on the mean KL(old||new) of an update, in nats, action dimensions summed; 0 sets none."""
    penalty: Literal["adaptive", "fixed", "none"] = "adaptive"
    """KL penalty in the loss: its coefficient doubles or halves outside a band around the target, stays, or is 0."""
    coef: NonNegative = 1.0
    """The penalty's coefficient at the start; an adaptive one stays within 1e-4 to 1e4."""
    stop: NonNegative = 1.5
    """Stop an update once its KL, measured as kl.check says, exceeds this many times the target; 0 never stops."""
    check: Literal["update", "epoch", "minibatch"] = "epoch"
    """When the whole batch's exact KL is measured: after each epoch, each minibatch, or only after the update, which
    then cannot be stopped."""
    on_overshoot: Literal["keep", "rollback", "project"] = "keep"
    """What happens to an update whose KL ends above the target: kept, undone, or moved back to the boundary."""
    direction: Direction = "forward"
    """Which KL is bounded: forward KL(old||new) or reverse KL(new||old). Both are always logged."""
    every: PositiveInt = 1000
    """Off-policy agents: how many gradient steps make the update whose KL is measured and bounded."""

    def bound(self) -> Bound:
        """The bound on KL that these settings ask for."""
        return at_most(self.target or math.inf)

    def make_penalty(self) -> Penalty | None:
        """The penalty that these settings ask for. Where an overshoot is undone, the limit is the band's upper edge."""
        if self.penalty == "none" or self.target == 0:
            return None
        high = 1.5 if self.on_overshoot == "keep" else 1.0
        coefficient: Coefficient = (
            Fixed(self.coef)
            if self.penalty == "fixed"
            else Banded(max(self.coef, 1e-4), high=high, least=1e-4, most=max(self.coef, 1e4))
        )
        return Penalty(self.bound(), coefficient)


@dataclass(frozen=True)
class Report:
    """What one update did."""

    kl: KLReport
    metrics: dict[str, float] = field(default_factory=dict)

    def write(self, record: Callable[[str, float], object]) -> None:
        """Call ``record(tag, value)`` for every figure."""
        for tag, value in self.metrics.items():
            record(tag, value)
        self.kl.write(record)


class Agent(ABC):
    """A policy for one pair of spaces, with what it needs to act, to be saved and to learn."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: str | torch.device,
        seed: int,
        normalize_observation: bool,
    ) -> None:
        check_action_space(action_space)
        self.observation_space, self.action_space = observation_space, action_space
        self.device = torch.device(device)
        self.encoder = ObservationEncoder(observation_space, self.device, normalize_observation)
        self.rng = np.random.default_rng(seed)
        self.noise: Any = self.rng  # what actions are sampled with
        self.actor: Actor

    def act(self, obs: Observation, deterministic: bool = False) -> Actions:
        """Actions [N, d] for a batch of observations [N, *shape], in the form that buffers hold.

        Give ``env_action(action)`` to the environment: a sample may lie outside a Box's bounds, and its density is
        that of the sample, not of the clipped action.
        """
        if self.encoder.plain and self.device.type == "cpu":
            output = self.actor.network.mlp.on_host(self.encoder.on_host(obs))  # type: ignore[arg-type]
        else:
            with torch.inference_mode():
                output = self.actor.network(self.encoder(obs)).cpu().numpy()
        return self.actor.act(output, None if deterministic else self.noise)

    def env_action(self, action: Actions) -> Actions:
        """``act``'s actions [N, d] as the environment takes them: clipped to the bounds, shaped [N, *space.shape]."""
        space = self.action_space
        shaped = action.reshape(len(action), *(space.shape or ()))
        if isinstance(space, spaces.Box):
            return np.clip(shaped, space.low, space.high).astype(space.dtype, copy=False)
        if isinstance(space, spaces.MultiBinary):
            return shaped.astype(space.dtype)
        return shaped + space.start  # type: ignore[attr-defined]

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Actions, Any]:
        """SB3's signature: actions ready for the environment, for one observation or a batch; ``state`` as given."""
        if isinstance(observation, dict):
            key = next(iter(observation))
            single = np.ndim(observation[key]) == len(self.observation_space[key].shape)  # type: ignore[index]
            batch: Observation = {k: np.asarray(v)[None] if single else v for k, v in observation.items()}
        else:
            single = np.ndim(observation) == len(self.observation_space.shape or ())
            batch = np.asarray(observation)[None] if single else observation
        action = self.env_action(self.act(batch, deterministic))
        return (action[0] if single else action), state

    def distribution(self, inputs: Inputs) -> PolicyDistribution:
        """The policy at encoded observations [B] as data: in chunks, without gradients, no view of the weights."""
        with torch.no_grad():
            result: PolicyDistribution = concatenate([self.actor(chunk) for chunk in chunks(inputs)])
        return freeze(result)

    @abstractmethod
    def new_buffer(self, n_envs: int) -> Any:
        """An empty buffer of the kind that ``update`` takes."""

    def due(self, buffer: Any) -> bool:
        """Whether it is time for ``update``: by default, once the buffer is full."""
        return bool(buffer.full)

    @abstractmethod
    def update(self, buffer: Any, progress: float = 0.0) -> Report | None:
        """Learn from a buffer that is due. ``progress``: the share of training that is done, for schedules.

        None where there is nothing to report yet: an off-policy agent reports once for many small updates.
        """

    def flush(self, buffer: Any) -> Report | None:
        """The report of an update that the end of training cuts short; None where updates are never cut short."""
        return None

    @abstractmethod
    def state_dict(self) -> State:
        """Everything that decides what happens next, as nested dicts of tensors and JSON values."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Continue from ``state_dict``'s result. Raises ValueError where it does not fit this agent."""


def chunks(inputs: Inputs) -> list[Inputs]:
    """Encoded observations in pieces of at most 2048 rows."""
    rows = len(next(iter(inputs.values())))
    return [{k: v[i : i + CHUNK] for k, v in inputs.items()} for i in range(0, rows, CHUNK)]


def bounded_kl(
    old: PolicyDistribution, new: PolicyDistribution, direction: Direction, valid: Tensor | None = None
) -> float:
    """The KL that a limit is about, its mean over the ``valid`` states; infinite where ``new`` is not finite."""
    try:
        values = (kl if direction == "forward" else reverse_kl)(old, new)
    except ValueError:
        return math.inf
    return float((values if valid is None or bool(valid.all()) else values[valid]).double().mean())
