"""A run's ranks as workers of Ray Train, on one machine or a cluster; one that is lost is replaced, and all go on.

Ray is imported here and in ``klrl.sweep.on_ray`` alone, and only where it is asked for.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klrl.config import to_dict
from klrl.console import LAUNCH
from klrl.errors import UsageError, needs, one_line
from klrl.training.options import RayConfig, RunConfig


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The cluster at ``address``, or one of this machine alone where that is empty."""
    with needs("ray", "ray"):
        import ray
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(address=address or None, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as problem:
            raise UsageError(f"--ray-address {address}: {one_line(problem)}") from None
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


def train_on_ray(agent: str, env: str, config: RunConfig, agent_config: Any, ray: RayConfig) -> None:
    """Train as ``run_training`` does, by ``config.processes`` workers that see the same ``config.run_dir``.

    Where a worker is lost all begin again from the last checkpoint, up to ``ray.max_failures`` times.
    """
    run = {**to_dict(config), "run_dir": str(Path(config.run_dir).absolute())}
    told = {"agent": agent, "env": env, "run": run, "own": to_dict(agent_config), "launch": uuid.uuid4().hex}
    with connected(ray.address):
        from ray import train
        from ray.train.torch import TorchTrainer

        with tempfile.TemporaryDirectory(prefix="klrl-ray-") as storage:
            trainer = TorchTrainer(
                _rank,
                train_loop_config=told,
                scaling_config=train.ScalingConfig(
                    num_workers=config.processes, use_gpu=ray.gpus > 0, resources_per_worker=ray.resources()
                ),
                run_config=train.RunConfig(
                    storage_path=storage,
                    name="klrl",
                    failure_config=train.FailureConfig(max_failures=ray.max_failures),
                ),
            )
            try:
                trainer.fit()
            except Exception as problem:  # Ray's own, with the workers' tracebacks in it
                words = [line.strip() for line in str(problem).splitlines() if line.strip()]
                raise ChildProcessError(
                    f"the run on Ray failed: {(words or [type(problem).__name__])[-1]}"
                ) from problem


def _rank(told: dict[str, Any]) -> None:
    """What a worker does: begin the run, or go on with it where an earlier attempt of this launch had begun."""
    from klrl.agents import registry
    from klrl.config import build
    from klrl.envs.make import import_packages
    from klrl.training.run import run_training

    os.environ[LAUNCH] = told["launch"]
    config = build(RunConfig, told["run"])
    import_packages(config.imports)
    agent_class = registry.find(told["agent"], told["env"])
    run_training(agent_class, told["env"], config, build(agent_class.Config, told["own"]))
