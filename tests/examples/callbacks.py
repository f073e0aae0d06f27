"""Callbacks: numbers of one's own in a run's log, and a stop that saves and evaluates as the last step does."""

from typing import Any

import klrl


class Patience(klrl.Callback):
    """Ends a run whose mean return has not risen for some updates."""

    def __init__(self, updates: int) -> None:
        self.updates, self.best, self.since = updates, -float("inf"), 0

    def on_update(self, run: klrl.LiveRun, result: Any) -> bool:
        mean = run.figures.get("rollout/ep_rew_mean", self.best)
        self.since = 0 if mean > self.best else self.since + 1
        self.best = max(self.best, mean)
        run.log("own/updates_without_progress", self.since)
        return self.since >= self.updates


run = klrl.train("ppo", "CartPole-v1", total_timesteps=20_000, n_steps=64, callbacks=[Patience(3)], quiet=True)
print(f"{run.steps} steps, return {run.evaluate(episodes=5).mean:.0f}")
