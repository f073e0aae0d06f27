"""klrl's SAC against Stable-Baselines3's: the part of run_all.py that is about SAC.

    python tests/benchmarks/sac_vs_sb3.py [--rounds 5] [--work halfcheetah pendulum]

Both: 256x256, minibatches of 256, one gradient step for each environment step. klrl also measures and logs the policy's
KL every 1000 gradient steps.
"""

from versus import main

if __name__ == "__main__":
    main(__doc__, "sac-", ["stable-baselines3"])
