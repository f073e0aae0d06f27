"""What acts: from observations to actions, by a policy or by something made of one."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from klrl.errors import UsageError
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.networks import Array
from klrl.policies.observations import Observation
from klrl.policies.policy import Policy

Actions = npt.NDArray[Any]


class Actor(ABC):
    """What acts on observations of one space, by a policy or something made of one."""

    policy: Policy
    encoder: ObservationEncoder

    @abstractmethod
    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """Actions [N, d] for a batch of observations [N, *shape], in the form that buffers hold."""

    def initial_state(self, n_envs: int) -> Array:
        """What a recurrent policy remembers when as many episodes begin, [N, S]; of any other, nothing, [N, 0]."""
        return np.zeros((n_envs, self.policy.state_size), np.float32)

    def env_action(self, action: Actions) -> Actions:
        """``act``'s actions [N, d] as the environment takes them: within the bounds, shaped [N, *space.shape]."""
        taken: Actions = self.policy.head.to_env(action)
        return taken

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[Actions, Any]:
        """SB3's signature: actions ready for the environment, for one observation or a batch, and the state after them.

        ``state``: of a recurrent policy, what the last call returned, [N, S] or [S]; None, or ``episode_start`` [N],
        where episodes begin. Any other policy's is returned as given.
        ``action_masks``: [n] or [N, n], for observations that come without theirs, as sb3-contrib has it.
        Raises UsageError, as ``act``, for what is no observation of the space.
        """
        layout = self.encoder.layout
        batch = layout.arrays(self.encoder.masked(observation, action_masks))
        single = layout.is_single(batch)
        if single:
            batch = {key: part[None] for key, part in batch.items()} if isinstance(batch, dict) else batch[None]
        if self.policy.state_size == 0:
            action = self.env_action(self.act(batch, deterministic))
            return (action[0] if single else action), state
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch
        remembered = self.initial_state(len(first))
        if state is not None:
            given = np.asarray(state)[None] if single else np.asarray(state)
            if given.shape != remembered.shape:
                raise UsageError(
                    f"state has shape {given.shape}, expected {remembered.shape}: give what predict returned"
                )
            begins = np.zeros(len(first)) if episode_start is None else episode_start
            remembered = np.where(np.reshape(begins, (-1, 1)), remembered, given).astype(np.float32)
        action = self.env_action(self.act(batch, deterministic, state=remembered))
        return (action[0], remembered[0]) if single else (action, remembered)


def refuse_recurrent(actor: Actor, what: str) -> None:
    """Raise UsageError where the policy of ``what`` is a recurrent one, which single observations do not determine."""
    if actor.policy.state_size:
        raise UsageError(f"{what} has a policy with a memory (--memory), whose actions take more than an observation")
