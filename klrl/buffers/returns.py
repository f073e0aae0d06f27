"""Advantages and returns from a rollout's facts and a critic's values."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from klrl.kl import ALONE

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def gae(
    reward: Floats, value: Floats, next_value: Floats, terminated: Bools, ended: Bools, gamma: float, gae_lambda: float
) -> tuple[Floats, Floats]:
    """Generalised advantage estimates and the returns (advantage + value) that a critic regresses on, each [T, N].

    All arguments are [T, N]. value: of the observation before each step; next_value: of the one that the step led to,
    which is the last of its episode where that ended, so a truncated episode bootstraps from its final value and a
    terminated one does not. ended: terminated or truncated.
    Rows that only reset an environment get a number too; the caller masks them out.

        delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
        A_t = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}

    Source: Schulman et al. (2016), equation 16.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = (gamma * gae_lambda) * ~ended
    advantage = np.zeros_like(delta)
    following = np.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        following = delta[t] + decay[t] * following
        advantage[t] = following
    return advantage.astype(np.float32), (advantage + value).astype(np.float32)


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, as SB3's VecNormalize does.

    A policy does not depend on it, so unlike the observations' statistics it takes a rollout in before it scales it:
    the critic never sees raw rewards. The deviation is that of all ``ranks``.
    """

    def __init__(self, gamma: float, enabled: bool = True) -> None:
        self.gamma, self.enabled, self.ranks = gamma, enabled, ALONE
        self.count, self.mean, self.var = 0.0, 0.0, 1.0
        self.running: npt.NDArray[np.float64] = np.zeros(0)

    def __call__(self, reward: Floats, ended: Bools, valid: Bools) -> Floats:
        """Take the rewards [T, N] of a rollout in and return them scaled. ``ended``: terminated or truncated."""
        if not self.enabled:
            return reward
        running = self.running if len(self.running) == reward.shape[1] else np.zeros(reward.shape[1])
        discounted = np.empty(reward.shape)
        for t in range(len(reward)):
            running = running * self.gamma + reward[t]
            discounted[t] = running
            running = running * ~ended[t]
        self.running = running
        sample = discounted[valid]
        mine = [[len(sample), sample.mean(), sample.var()]] if len(sample) else np.zeros((0, 3))
        return (reward / self.take_in(mine)).astype(np.float32)

    def take_in(self, mine: Any) -> Any:
        """Take in this rank's moments of returns, [[count, mean, variance]] or none; what rewards are divided by."""
        for count, mean, var in self.ranks.rows(torch.tensor(mine, dtype=torch.float64))[0].tolist():
            total, delta = self.count + count, mean - self.mean  # Chan et al. (1983)
            spread = self.var * self.count + var * count
            self.var = (spread + delta**2 * self.count * count / total) / total
            self.mean, self.count = self.mean + delta * count / total, total
        deviation = np.sqrt(self.var)  # returns that do not vary have no scale to be divided by
        return np.float64(1) if deviation <= 1e-4 * abs(self.mean) else deviation

    def state_dict(self) -> dict[str, float | list[float]]:
        return {"count": self.count, "mean": self.mean, "var": self.var, "running": self.running.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.var = state["count"], state["mean"], state["var"]
        self.running = np.array(state["running"], np.float64)
