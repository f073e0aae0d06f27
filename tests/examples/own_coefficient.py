"""A coefficient of one's own for the KL penalty: --kl.penalty module:Class names it, too. It resumes with the run."""

import klrl


class ProportionalCoefficient:
    """In proportion to how far the last update's KL was beyond half of its limit, smoothed."""

    def __init__(self, start):  # a klrl.kl.Start: its value is --kl.coef, its bound the limit that is answered
        self.value = start.value

    def adapt(self, measured, bound):  # once after each update
        wanted = min(max(2 * measured / bound.limit, 0.1), 100.0)
        self.value = 0.8 * self.value + 0.2 * wanted

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = float(state["value"])


if __name__ == "__main__":
    small = {"n_steps": 64, "n_epochs": 2, "final_episodes": 1, "quiet": True}
    kl = {"penalty": ProportionalCoefficient, "target": 0.01}
    run = klrl.train("ppo", "CartPole-v1", kl=kl, total_timesteps=1024, **small)
    run = klrl.resume(run.folder, total_timesteps=2048)
    print(run.agent.limit.penalty.coefficient.value)
