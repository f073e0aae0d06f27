"""Heads by name: a normal (plain), one whose standard deviation depends on the state, and a Beta within the bounds."""

import klrl

if __name__ == "__main__":
    small = {"total_timesteps": 2000, "n_envs": 4, "n_steps": 64, "n_epochs": 2, "final_episodes": 1, "quiet": True}
    for head in ("plain", "state-dependent-std", "beta"):
        run = klrl.train("ppo", "Pendulum-v1", head=head, **small)
        print(head, run.agent.distribution([[1.0, 0.0, 0.0]]).entropy().item())
