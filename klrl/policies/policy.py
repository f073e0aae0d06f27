"""``Policy``: from observations to a distribution over actions, and to actions."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.memory import RecurrentNetwork
from klrl.policies.networks import Array, Network
from klrl.policies.observations import Observation
from klrl.policies.spaces import MASK


class Head(Protocol):
    """From a network's outputs to a distribution, to actions, and to what the environment takes; an nn.Module."""

    size: int
    """How many outputs it takes."""

    def __call__(self, output: Tensor) -> Any:
        """The distribution that outputs [B, size] stand for; those of choices that a mask forbids are -inf."""

    def sample(self, output: Array, rng: Any) -> Array:
        """Actions [B, d] for outputs [B, size], sampled with ``rng``, or the mode where it is None; in NumPy, where a
        handful of numbers costs less than torch's calls. Where a head has ``numbers``, their ``draw``."""

    def to_env(self, action: Array) -> Array:
        """Actions [N, d] as the environment takes them, [N, *space.shape]. To be exported, a head has besides
        ``deployed(output, noise)``, which gives these in torch."""

    def metrics(self) -> dict[str, float]:
        """What is worth logging of the head's own weights."""


class Policy(nn.Module):
    """An encoder, a network from what it gives to outputs, and a head from those to a distribution.

    It knows its spaces: whoever has it asks for distributions and actions, and never for a space's kind.
    """

    head: Head

    def __init__(self, encoder: ObservationEncoder, network: nn.Module, head: Head) -> None:
        super().__init__()
        if encoder.sizes and head.size != sum(encoder.sizes):
            leave = "--env.action-masks off, or gymnasium.wrappers.FilterObservation, leaves them out"
            raise UsageError(f"{type(head).__name__} takes no action masks: {leave}")
        self.encoder, self.network, self.head = encoder, network, head

    def forward(self, inputs: Inputs) -> Any:
        """The distribution at encoded observations."""
        return self.head(masked(self.network(inputs), inputs))

    @property
    def state_size(self) -> int:
        """How many numbers a recurrent network remembers of an episode; 0 for any other."""
        network: Any = self._modules["network"]
        return network.state_size if type(network) is RecurrentNetwork else 0

    def act(self, obs: Observation, rng: Any, state: Array | None = None) -> Array:
        """Actions for observations [N, *shape], as buffers hold them; with the mode where ``rng`` is None.

        ``state``: what a recurrent network remembers, [N, S], moved on in place; None where episodes begin.
        """
        head: Any = self._modules["head"]  # looking a module's modules up costs a microsecond each
        return head.sample(self.outputs(obs, state), rng)

    def outputs(self, obs: Observation, state: Array | None = None) -> Array:
        """The network's outputs at observations [N, *shape], in NumPy; -inf where a mask forbids a choice."""
        encoder = self.encoder
        network: Any = self._modules["network"]
        output: Any = None
        recurrent = state is not None and type(network) is RecurrentNetwork
        hooked = network._forward_hooks or network._forward_pre_hooks
        if not hooked and encoder.plain and encoder.device.type == "cpu":
            if recurrent:
                output = network.step_numpy(encoder.to_numpy(obs), state)
            elif type(network) is Network:
                mlp: Any = network._modules["mlp"]
                output = mlp.forward_numpy(encoder.to_numpy(obs))
        if output is None:
            with torch.inference_mode():
                inputs = encoder(encoder.layout.batch(obs))
                if recurrent:
                    output, after = network.step(inputs, torch.from_numpy(state).to(encoder.device))
                    state[:] = after.cpu().numpy()  # type: ignore[index]
                else:
                    output = network(inputs)
                output = masked(output, inputs).cpu().numpy()
        elif encoder.sizes:
            output = np.where(encoder.allowed(encoder.layout.batch(obs)), output, np.float32(-np.inf))
        return output


def masked(output: Tensor, inputs: Inputs) -> Tensor:
    """A network's outputs [B, size], -inf where the inputs' mask forbids a choice."""
    return output.masked_fill(~inputs[MASK], -torch.inf) if MASK in inputs else output
