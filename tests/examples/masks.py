"""Action masks in a loop of one's own: what an environment forbids is never taken."""

import gymnasium as gym

from klrl import PPO, ActionMasks, PPOConfig, RolloutBuffer

envs = gym.make_vec("Taxi-v4", 4, wrappers=[ActionMasks])  # its infos have masks; env.action_masks() does as well
agent = PPO(envs.single_observation_space, envs.single_action_space, PPOConfig(n_steps=64))
buffer = RolloutBuffer(agent.observation_space, agent.action_space, 64, 4, autoreset=envs.metadata["autoreset_mode"])
obs, _ = envs.reset(seed=0)
for _ in range(256):
    action, last_obs = agent.act(obs), obs
    allowed = last_obs["action_mask"][range(4), action[:, 0]]
    obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
    buffer.add(last_obs, action, reward, terminated, truncated, obs)
    assert allowed.all()
    if buffer.full:
        result = agent.update(buffer)
print(f"KL {result.kl.mean:.4f}, forbidden actions taken: {(allowed == 0).sum()}")
