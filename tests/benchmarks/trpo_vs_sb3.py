"""klrl's TRPO against sb3-contrib's: the part of run_all.py that is about TRPO.

    python tests/benchmarks/trpo_vs_sb3.py [--rounds 5] [--work cartpole hopper]

Both: 64x64, at most 10 steps of conjugate gradient, 10 passes of the critic in minibatches of 128. klrl also measures
and logs the exact KL and evaluates its curvature once more.
"""

from versus import main

if __name__ == "__main__":
    main(__doc__, "trpo-", ["sb3-contrib"])
