"""What the loop remembers of the training episodes: their returns, and how each environment came to where it stands."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch

from klrl.agents.base import State
from klrl.envs.wrappers import EpisodePosition
from klrl.kl import Ranks

_SPENT = 4096  # steps that no running episode needs any more, before they are forgotten together


class Episodes:
    """Counts steps, keeps the last 100 episodes' returns and lengths, and each episode's actions so far.

    Under NEXT_STEP autoreset: a row that only resets its environment is not a step, and its action not one either.
    """

    def __init__(self, n_envs: int) -> None:
        self.steps, self.restarted = 0, 0
        self.counted = 0
        """Episodes of all ranks that the last ``figures`` are of."""
        self.done: deque[tuple[float, int]] = deque(maxlen=100)
        self._returns, self._lengths = np.zeros(n_envs), np.zeros(n_envs, np.int64)
        self._resetting = np.zeros(0, np.int64)
        self._number, self._begin = np.zeros(n_envs, np.int64), np.zeros(n_envs, np.int64)
        self._actions: list[Any] = []

    def add(self, action: Any, reward: np.ndarray[Any, Any], ended: np.ndarray[Any, Any]) -> None:
        """One step of all environments. action: as they took it, [N, ...]."""
        self._actions.append(action)
        if len(self._resetting):
            self._number[self._resetting] += 1
            self._begin[self._resetting] = len(self._actions)
            spent = int(self._begin.min())
            if spent > _SPENT:
                del self._actions[:spent]
                self._begin -= spent
        self.steps += len(reward) - len(self._resetting)
        self._returns += reward
        self._lengths += 1
        (self._resetting,) = ended.nonzero()
        if len(self._resetting):
            rows = self._resetting
            self.done.extend(zip(self._returns[rows].tolist(), self._lengths[rows].tolist(), strict=True))
            self._returns[rows] = 0.0
            self._lengths[rows] = -1  # the row that resets brings it to 0

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Means over the last 100 episodes of each of the ranks; empty before the first has ended."""
        returns, lengths = zip(*self.done, strict=True) if self.done else ((), ())
        total, length, count = ranks.sum(math.fsum(returns), math.fsum(lengths), len(self.done))
        self.counted = int(count)
        return {"rollout/ep_rew_mean": total / count, "rollout/ep_len_mean": length / count} if count else {}

    def forget_unfinished(self) -> None:
        """Where the environments begin anew."""
        self._returns[:], self._lengths[:], self._begin[:] = 0.0, 0, 0
        self._resetting, self._actions = np.zeros(0, np.int64), []

    def count(self, state: State, steps: int) -> None:
        """Begin episodes anew, after so many ``steps`` and those that a state_dict's had done."""
        self.steps = steps
        self.done.extend((float(total), int(length)) for total, length in state["done"])

    def state_dict(self) -> State:
        first = int(self._begin.min())
        return {
            "steps": self.steps,
            "restarted": self.restarted,
            "done": list(self.done),
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "resetting": self._resetting.tolist(),
            "number": self._number.tolist(),
            "begin": (self._begin - first).tolist(),
            "actions": torch.from_numpy(np.stack(self._actions[first:])) if self._actions[first:] else None,
        }

    def load_state_dict(self, state: State, obs: Any) -> list[EpisodePosition]:
        """Continue from ``state_dict``'s result. Returns where each environment stood. obs: what they showed last."""
        self.steps, self.restarted = state["steps"], state["restarted"]
        self.done.extend((float(total), int(length)) for total, length in state["done"])
        self._returns[:], self._lengths[:] = state["returns"], state["lengths"]
        self._number[:], self._begin[:] = state["number"], state["begin"]
        self._resetting = np.array(state["resetting"], np.int64)
        self._actions = [] if state["actions"] is None else list(state["actions"].numpy())
        positions = []
        for i, (number, begin) in enumerate(zip(state["number"], state["begin"], strict=True)):
            shown = {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]
            positions.append(
                EpisodePosition(number, [row[i] for row in self._actions[begin:]], shown, i in state["resetting"])
            )
        return positions
