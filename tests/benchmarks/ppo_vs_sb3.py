"""klrl's PPO against Stable-Baselines3's: the part of run_all.py that is about PPO.

    python tests/benchmarks/ppo_vs_sb3.py [--rounds 5] [--work cartpole halfcheetah]

Both run every epoch of every update (klrl's early stop is off, its penalty and its exact-KL report are on).
"""

from versus import main

if __name__ == "__main__":
    main(__doc__, "ppo-", ["stable-baselines3"])
