"""Train on a cluster of two simulated nodes; with ``kill``, one of its two workers is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

run_dir, kill = sys.argv[1], sys.argv[2:3] == ["kill"]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
words = [*sys.argv[3:], "--run-dir", run_dir, "--on", "ray", "--ray.address", cluster.address]
process = subprocess.Popen([sys.executable, "-m", "klrl", "train", *words])
if kill:
    while not list(Path(run_dir).glob("*/checkpoints/step-*")):
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-f", "ray::.*RayTrainWorker"], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
code = process.wait()
cluster.shutdown()
sys.exit(code)
