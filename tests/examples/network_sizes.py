"""Networks by options: a wide critic with a rate of its own beside a small policy, layer norm, another activation."""

import klrl

if __name__ == "__main__":
    small = {"total_timesteps": 2000, "n_steps": 64, "n_epochs": 2, "quiet": True}
    form = {"hidden_sizes": (32, 32), "critic_hidden_sizes": (256, 256), "activation": "elu", "layer_norm": True}
    run = klrl.train("ppo", "CartPole-v1", learning_rate=3e-4, critic_learning_rate=1e-3, **form, **small)
    print(sum(w.numel() for w in run.agent.policy.parameters()), sum(w.numel() for w in run.agent.critic.parameters()))
