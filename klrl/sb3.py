"""Exact KL for Stable-Baselines3: a callback that logs ``kl/*`` for its on-policy algorithms. Needs stable-baselines3.

model.learn(100_000, callback=KLCallback(at_most(0.02)))
"""

from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import distributions as td
from torch.utils._pytree import tree_map

from klrl.kl import Bound, KLReport, freeze, joint, measure


class KLCallback(BaseCallback):
    """Measures each update of SB3's PPO or A2C, or of sb3-contrib's TRPO, on its whole rollout, after its last step.

    The joint KL over action dimensions, both directions, goes to the model's logger under ``kl/*`` and ``entropy/*``
    when the next rollout begins, and so appears with SB3's own ``train/*``. ``reports`` keeps every update's KLReport.
    An update costs one more forward pass of the policy before it and one after.
    """

    def __init__(self, bound: Bound | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.reports: list[KLReport] = []
        self._obs: Any = None
        self._old: td.Distribution | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, OnPolicyAlgorithm), "KLCallback is for on-policy algorithms"
        stored = self.model.rollout_buffer.observations
        flat = tree_map(lambda part: part.reshape(-1, *part.shape[2:]), stored)
        self._obs = self.model.policy.obs_to_tensor(flat)[0]
        with torch.no_grad():
            self._old = freeze(self._policy())

    def _on_rollout_start(self) -> None:
        if self._old is None:
            return
        with torch.no_grad():
            report = measure(self._old, self._policy(), self.bound)
        self._old = None
        self.reports.append(report)
        report.write(self.logger.record)

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _policy(self) -> td.Distribution:
        assert isinstance(self.model, OnPolicyAlgorithm)
        # A MultiDiscrete policy is a list of categoricals; a Box's normal keeps its dimensions.
        return joint(self.model.policy.get_distribution(self._obs).distribution)
