"""The options of a run that are not its agent's."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from klrl.config import (
    MOST_ENVS,
    Checked,
    Count,
    EnvCount,
    Form,
    NonNegative,
    Positive,
    PositiveInt,
    Range,
    Reads,
    Seed,
)
from klrl.envs.make import EnvConfig, Imports

DeviceName = Annotated[str, Reads(str), tyro.conf.arg(metavar="{auto,cpu,cuda,cuda:N}")]  # or a torch.device
DEVICES = Form("auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class RunConfig(Checked):
    total_timesteps: PositiveInt = 1_000_000
    """Environment steps to train for; an on-policy run ends with the first whole rollout at or beyond this."""
    seed: Seed = 0
    """Seed of weights, environments and sampling."""
    n_envs: EnvCount = 8
    """Environments stepped side by side."""
    device: Annotated[DeviceName, DEVICES] = "auto"
    """Where the networks live; auto takes CUDA, where each process has a card, for images, and for big networks or many
    rows at a time, else the CPU. On CUDA gradient steps are CUDA graphs, unless they are compiled, and rollouts of
    klrl/CartPole-v1 and klrl/Pendulum-v1 stay there."""
    threads: Annotated[int, Range(1, 1024)] = 1
    """CPU threads of torch, at most this machine's cores; small networks are fastest with one."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 products; medium rounds to bfloat16, which is faster where the processor has units for it."""
    run_dir: str = "runs"
    """The folder in which the run's own folder is made."""
    eval_every: Count = 20
    """Updates (off-policy: windows of kl.every steps) between two evaluations on separate environments; 0 never."""
    eval_episodes: EnvCount = 5
    """Episodes of each of those evaluations."""
    final_episodes: Annotated[int, Range(0, MOST_ENVS)] = 20
    """Episodes of the final evaluation, once everything is saved and the training environments are closed; 0 none."""
    stop_at_return: float = math.inf
    """Stop once this mean return is reached, by the last 100 training episodes (rollout/ep_rew_mean, once there
    were 20) or by an evaluation. The run is then saved and evaluated as at its last step; inf trains to the end."""
    save_every: Count = 0
    """Steps between two checkpoints; 0 saves about once a minute. The last two and the best are kept."""
    log: tuple[Literal["wandb", "trackio", "mlflow"], ...] = ()
    """Log by these libraries, too (the extras of their names), beside TensorBoard's files: as each is set up, into the
    project klrl, or that which WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME names."""
    histogram_every: Count = 10
    """Updates (off-policy: windows) between two TensorBoard histograms of log10 KL over states; 0 none."""
    quiet: bool = False
    """Print only the final evaluation and where the run lies."""
    verbose: bool = False
    """Print a line for each update, not only for each tenth of the run."""
    processes: Annotated[int, Range(1, 256)] = 1
    """Processes that train the policy together, each with n_envs environments and minibatches of its own; several are
    started on this machine. Under torchrun there are as many as it started."""
    rank_timeout: Annotated[float, Range(0, 86_400, above=True)] = 25.0
    """Seconds that such a process waits for another before the run ends: longer than any one step of an environment."""
    profile: bool = False
    """Print at the end where the time went, part by part, and write a trace for Chrome or Perfetto, profile.json."""
    compile: bool = False
    """Learn by compiled gradients, of SAC and of PPO with a network of one's own: some seconds at first, then less time
    a step."""
    init_from: Annotated[str, tyro.conf.arg(name="from")] = ""
    """A run or checkpoint to start from: its weights, statistics of observations and hidden layers; the rest begins
    anew."""
    imports: Imports = ()
    network: str = ""
    """A network of one's own in place of hidden layers, module:Class: an nn.Module from inputs to features [B, F] that
    is made with the observation space."""
    env: EnvConfig = field(default_factory=EnvConfig)


@dataclass(frozen=True)
class ResumeConfig(Checked):
    total_timesteps: Count = 0
    """Steps to train for, those done included; 0 keeps the run's own."""
    device: Annotated[DeviceName, Form(f"({DEVICES.pattern})?", DEVICES.said)] = ""
    """Where the networks live; by default as before. Another device may round otherwise."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads of torch; 0 keeps the run's own. Another number may round otherwise."""
    processes: Annotated[int, Range(0, 256)] = 0
    """Processes that go on; 0 keeps the run's own number. With another number the episodes begin anew."""
    stop_at_return: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = math.nan
    """Another mean return to stop at, inf for none; nan keeps the run's own."""
    quiet: bool = False
    """Print only the final evaluation and where the run lies. Without this and --verbose, as the run was begun."""
    verbose: bool = False
    """Print a line for each update."""
    imports: Imports = ()


@dataclass(frozen=True)
class RayConfig(Checked):
    """Where Ray runs the processes, and what each of them takes."""

    group = "ray."

    address: str = ""
    """The cluster's address, auto for the one that this machine is part of; by default this machine alone."""
    cpus: Positive = 1.0
    """Processor cores of each process."""
    gpus: NonNegative = 0.0
    """GPUs of each process; fractions share one."""
    max_failures: Count = 3
    """How often the processes of a run are begun again, from its last checkpoint, where one was lost."""

    def resources(self) -> dict[str, float]:
        """What Ray sets aside for each process."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
