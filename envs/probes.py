"""Probe environments: each has a known optimal policy and value, and fails for one kind of mistake.

All take ``action`` ("discrete", "box", "multidiscrete", "multibinary") and ``observation`` ("box", "discrete", "dict",
"image"). The hidden state is one bit, which the observation shows; ``value(bit, gamma)`` is the optimal value.
"""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ActionKind = Literal["discrete", "box", "multidiscrete", "multibinary"]
ObservationKind = Literal["box", "discrete", "dict", "image"]

_ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3, start=-1),
    "box": spaces.Box(-1.0, 3.0, (2,)),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(3),
}
# The right action for each bit.
_TARGETS: dict[str, tuple[Any, Any]] = {
    "discrete": (-1, 1),
    "box": (np.array([0.0, 2.0]), np.array([2.0, 0.0])),
    "multidiscrete": (np.array([2, 0]), np.array([0, 1])),
    "multibinary": (np.array([1, 0, 1]), np.array([0, 1, 1])),
}
_OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1.0, 1.0, (1,)),
    "discrete": spaces.Discrete(2),
    "dict": spaces.Dict({"number": spaces.Box(-1.0, 1.0, (1,)), "which": spaces.Discrete(2)}),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
}


class Probe(gym.Env[Any, Any]):
    """One bit, one step, reward 1 for anything; the probes below change one thing each."""

    bits = 1
    """How many values the first bit may have: 2 where it is drawn."""

    def __init__(self, action: ActionKind = "discrete", observation: ObservationKind = "box") -> None:
        self.kind, self.shown = action, observation
        self.action_space = _ACTION_SPACES[action]
        self.observation_space = _OBSERVATION_SPACES[observation]
        self.bit = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.bit = int(self.np_random.integers(self.bits))
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observe(), self.reward(action), True, False, {}

    def reward(self, action: Any) -> float:
        return 1.0

    @staticmethod
    def value(bit: int, gamma: float) -> float:
        return 1.0

    def observe(self) -> Any:
        number = np.array([2 * self.bit - 1], np.float32)
        return {
            "box": number,
            "discrete": self.bit,
            "dict": {"number": number, "which": self.bit},
            "image": np.full((36, 36, 1), 255 * self.bit, np.uint8),
        }[self.shown]

    def match(self, action: Any, bit: int) -> float:
        """1 for the right action, less for others: the fraction of right parts, or 1 - mean squared error for a Box."""
        target = _TARGETS[self.kind][bit]
        if self.kind == "box":
            return 1.0 - float(np.mean((action - target) ** 2))
        return float(np.mean(action == target))


class OneStep(Probe):
    """Reward 1 for anything. Fails where the critic does not learn at all."""


class RewardByObservation(Probe):
    """Reward +1 or -1 as the observation says. Fails where the critic does not see its input."""

    bits = 2

    def reward(self, action: Any) -> float:
        return 2.0 * self.bit - 1.0

    @staticmethod
    def value(bit: int, gamma: float) -> float:
        return 2.0 * bit - 1.0


class RewardByAction(Probe):
    """Reward 1 for one action. Fails where advantages or log-probabilities are wrong."""

    def reward(self, action: Any) -> float:
        return self.match(action, 1)


class RewardByBoth(RewardByAction):
    """Reward 1 for the action that the observation calls for. Fails where rows of a batch are mixed up."""

    bits = 2

    def reward(self, action: Any) -> float:
        return self.match(action, self.bit)


class Discounting(Probe):
    """Reward 1 on the second of two steps. Fails where rewards are not discounted or not carried back."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        last = self.bit == 1
        self.bit = 1
        return self.observe(), float(last), last, False, {}

    @staticmethod
    def value(bit: int, gamma: float) -> float:
        return 1.0 if bit else gamma


class Truncation(Probe):
    """Reward 1 on every step, truncated after five, never terminated: the value is that of going on for ever.

    Fails where a truncation is taken for an end, or bootstraps from the observation after the reset.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.bit = 1
        return self.observe(), 1.0, False, self.steps == 5, {}

    @staticmethod
    def value(bit: int, gamma: float) -> float:
        return 1.0 / (1.0 - gamma)


class Recall(RewardByBoth):
    """The bit is shown once, then three zeros; reward 1 for the action that it called for, at the last step.

    Fails where a policy does not remember, or remembers across episodes. Of ``observation`` "box" alone.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return super().reset(seed=seed)

    def observe(self) -> Any:
        return super().observe() * np.float32(self.steps == 0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        last = self.steps == 4
        return self.observe(), self.reward(action) if last else 0.0, last, False, {}

    @staticmethod
    def value(bit: int, gamma: float) -> float:
        return gamma**3


class Catch(gym.Env[Any, Any]):
    """A ball falls down an image, and a paddle at the bottom catches it (1) or not (-1). Fails where images are not
    seen. Source: Osband et al. (2020), "Behaviour suite for reinforcement learning"."""

    action_space = spaces.Discrete(3)  # left, stay, right

    def __init__(self, cells: int = 10, scale: int = 1) -> None:
        """``cells``: of a side, one for the ball and one for the paddle. ``scale``: pixels of a cell's side."""
        self.cells, self.scale = cells, scale
        self.observation_space = spaces.Box(0, 255, (cells * scale, cells * scale, 1), np.uint8)
        self.row = self.ball = self.paddle = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(self.cells)), self.cells // 2
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.cells - 1)
        self.row += 1
        landed = self.row == self.cells - 1
        reward = (1.0 if self.ball == self.paddle else -1.0) if landed else 0.0
        return self.observe(), reward, landed, False, {}

    def observe(self) -> Any:
        image = np.zeros((self.cells, self.cells), np.uint8)
        image[self.row, self.ball] = image[-1, self.paddle] = 255
        return image.repeat(self.scale, 0).repeat(self.scale, 1)[..., None]
