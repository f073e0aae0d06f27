"""A policy with a memory, on CartPole without velocities; ``predict`` carries its state, as SB3's does."""

from typing import Any

import gymnasium as gym

import klrl


class Hidden(gym.ObservationWrapper[Any, Any, Any]):
    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        space: Any = self.env.observation_space
        self.observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]])

    def observation(self, observation: Any) -> Any:
        return observation[[0, 2]]


run = klrl.train("ppo", Hidden, memory="lstm", total_timesteps=8_000, quiet=True)
env, state, total, done = Hidden(), None, 0.0, False
obs, _ = env.reset(seed=0)
while not done:
    action, state = run.agent.predict(obs, state, deterministic=True)
    obs, reward, terminated, truncated, _ = env.step(action)
    total, done = total + float(reward), terminated or truncated
print(f"return {total:.0f}")
