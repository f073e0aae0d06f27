"""A head of one's own: a normal whose action dimensions are correlated. klrl.kl has its KL and Fisher information."""

import numpy as np
import torch

import klrl


class CorrelatedNormalHead(torch.nn.Module):
    def __init__(self, space):
        super().__init__()
        self.space, self.d = space, space.shape[0]
        self.size = self.d + self.d**2  # how many outputs of the network it takes

    def forward(self, output):
        mean, factor = output[:, : self.d], output[:, self.d :].view(-1, self.d, self.d)
        cholesky = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=1, dim2=2).exp())
        return torch.distributions.MultivariateNormal(mean, scale_tril=cholesky, validate_args=False)

    def sample(self, output, rng):  # outputs [B, size] and actions [B, d] in NumPy; without rng, the mode
        policy = self(torch.from_numpy(output))
        noise = np.zeros((len(output), self.d, 1)) if rng is None else rng.standard_normal((len(output), self.d, 1))
        return policy.loc.numpy() + (policy.scale_tril.numpy() @ noise)[..., 0].astype("float32")

    def to_env(self, action):
        return np.clip(action, self.space.low, self.space.high)

    def metrics(self):
        return {}


if __name__ == "__main__":
    probe = {"env": {"kwargs": {"action": "box"}}, "final_episodes": 2, "quiet": True}
    run = klrl.train(
        "trpo", "klrl/RewardByBoth-v0", head=CorrelatedNormalHead, total_timesteps=4000, n_steps=64, **probe
    )
    print(run.agent.distribution([[1.0]]).covariance_matrix)
