"""A critic that shares its hidden layers with the policy."""

from typing import Any

import torch
from torch import Tensor

from klrl.policies.encoder import Inputs
from klrl.policies.networks import Critic, Network
from klrl.policies.policy import Policy
from klrl.policies.spaces import MASK
from klrl.policies.torso import linear

_ROWS = 2048  # of a pass: their activations take memory


class SharedCritic(Critic):
    """The state value by a linear layer on the last hidden layer of ``policy``'s network.

    The hidden layers are the policy's: a loss of the values moves them where the policy's weights are among those that
    are moved, and the critic's own parameters are those of its layer.
    """

    def __init__(self, policy: Policy, rng: torch.Generator) -> None:
        network: Any = policy.network
        last: Any = network.mlp.layers[-1] if isinstance(network, Network) else network.output
        super().__init__(linear(last.in_features, 1, 1.0, rng))
        self.shared = (policy,)  # in a tuple, as it is no part of this module

    def seen(self, inputs: Inputs) -> Inputs:
        """The last hidden layer's numbers, as "hidden", in place of what they are made of: both begin there."""
        network: Any = self.shared[0].network
        pieces = zip(*(torch.split(part, _ROWS) for part in inputs.values()), strict=True)
        hidden = torch.cat([network.hidden(dict(zip(inputs, piece, strict=True))) for piece in pieces])
        return {"hidden": hidden, **({MASK: inputs[MASK]} if MASK in inputs else {})}

    def forward(self, inputs: Inputs) -> Tensor:
        network: Any = self.shared[0].network
        value: Tensor = self.network(network.hidden(inputs))
        return value.squeeze(-1)
