"""A network of one's own: any module that is made with the observation space and returns features [B, F]."""

import torch

import klrl


class Residual(torch.nn.Module):
    def __init__(self, space):
        super().__init__()
        self.first = torch.nn.Linear(space.shape[0], 64)
        self.second = torch.nn.Linear(64, 64)

    def forward(self, obs):
        x = torch.relu(self.first(obs))
        return x + torch.relu(self.second(x))


if __name__ == "__main__":
    run = klrl.train("ppo", "CartPole-v1", network=Residual, total_timesteps=2000, n_steps=64, n_epochs=2, quiet=True)
    print(run.evaluate(episodes=2).mean)
