"""A critic that shares its hidden layers with the policy."""

import torch
from torch import Tensor

from klrl.policies.encoder import Inputs
from klrl.policies.networks import Critic, FeatureNetwork, Network
from klrl.policies.torso import linear


class SharedCritic(Critic):
    """The state value by a linear layer on the last hidden layer of a policy's network.

    The hidden layers are the policy's: a loss of the values moves them where the policy's weights are among those that
    are moved, and the critic's own parameters are those of its layer.
    """

    def __init__(self, policy_network: Network | FeatureNetwork, rng: torch.Generator) -> None:
        last = policy_network.mlp.layers[-1] if isinstance(policy_network, Network) else policy_network.output
        super().__init__(linear(last.in_features, 1, 1.0, rng))  # type: ignore[arg-type]
        self.shared = (policy_network,)  # in a tuple, as it is no part of this module

    def forward(self, inputs: Inputs) -> Tensor:
        value: Tensor = self.network(self.shared[0].hidden(inputs))
        return value.squeeze(-1)
