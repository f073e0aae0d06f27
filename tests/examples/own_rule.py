"""A rule of one's own for single states: --kl.per-state module:Class names it, too. This gate closes gradually."""

import klrl
from klrl.kl import StateRule


class Fade(StateRule):
    """Weighs a state's gradient by limit / KL where it is beyond its limit and would go further."""

    def __init__(self, limit, turn):  # --kl.state-limit and --kl.turn
        self.limit = limit

    def factor(self, kl, further):  # each [B]: the states' KLs, and where a step would raise them
        return 1.0 - further * (1.0 - (self.limit / kl.clamp_min(1e-12)).clamp_max(1.0))


if __name__ == "__main__":
    small = {"total_timesteps": 2000, "n_steps": 64, "n_epochs": 4, "final_episodes": 1, "quiet": True}
    run = klrl.train("ppo", "CartPole-v1", kl={"per_state": Fade, "state_limit": 0.02}, clip_range=0, **small)
    print(run.agent.limit.rules)
