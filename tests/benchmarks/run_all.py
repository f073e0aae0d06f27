"""Every comparison of klrl's speed with that of its peers, as one Markdown table.

    python tests/benchmarks/run_all.py [--rounds 5] [--output FILE] [--work ppo-cartpole ...] [--peers skrl ...]
        [--against FOLDER]

Against Stable-Baselines3 (PPO, SAC), sb3-contrib (TRPO) and, where they are installed, skrl and tianshou (PPO on
CartPole-v1, SAC on Pendulum-v1): steps per second of collecting and learning, the same environments, networks and
numbers of gradient steps, float32 and one thread. What each library is given is told in peers.py. With ``--against``,
this checkout and another one of klrl, in alternation: whether a change made it slower.
"""

from versus import main

if __name__ == "__main__":
    main(__doc__)
