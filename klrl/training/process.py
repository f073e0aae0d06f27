"""What a run asks of its process: threads, precision, and the device that its networks live on."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.spaces import flatdim
from threadpoolctl import threadpool_limits

from klrl.config import cores
from klrl.errors import UsageError
from klrl.policies.spaces import check_observation_space, is_image, leaves
from klrl.training.options import RunConfig


@contextlib.contextmanager
def process_settings(config: RunConfig) -> Iterator[None]:
    """What training sets for the whole process, as it was afterwards."""
    threads, precision, frozen = torch.get_num_threads(), torch.get_float32_matmul_precision(), gc.get_freeze_count()
    torch.set_num_threads(min(config.threads, cores()))
    numpys = threadpool_limits(torch.get_num_threads(), user_api="blas")  # which does part of torch's work here
    torch.set_float32_matmul_precision(config.matmul_precision)
    # glibc gives freed memory back to the system beyond twice the largest array freed so far, and fetching it anew
    # costs as much as the arithmetic on it. After one array of 30 MB, never touched, it keeps what an update frees.
    torch.empty(30_000_000, dtype=torch.uint8)
    # Adam's first moments of a dead unit's weights fade through the denormal numbers, which take many times as long.
    flushed = bool(torch.tensor(1e-40) * 1 == 0)
    torch.set_flush_denormal(True)
    gc.freeze()  # what was imported until here lives as long as the process: the collector need not walk it
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        torch.set_flush_denormal(flushed)
        numpys.restore_original_limits()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


_WORK = 2**25


def gpu_pays(space: spaces.Space[Any], config: Any, n_envs: int) -> bool:
    """Whether a GPU is taken by itself: for images, and for big networks or many rows at a time.

    space: of an observation. ``config``: the agent's; of a network of one's own nothing is known, and its
    ``hidden_sizes`` count. The threshold is arithmetic, and not measured: 2^25 products of a weight and a row, there
    and back, are 2e8 operations, 4 ms of a core that does 5e10 a second. A GPU is taken to need 0.3 ms for a recorded
    step and the copies of its rows; the rest pays for acting, as each step of the environments waits for its actions.
    SAC's defaults, two layers of 256 and as many rows, are just there.
    """
    check_observation_space(space)
    parts = [part for _, part in leaves(space)]
    if any(is_image(part) for part in parts):
        return True
    widths = getattr(config, "hidden_sizes", ())
    sizes = [sum(flatdim(part) for part in parts), *(widths if isinstance(widths, tuple | list) else ())]
    weights = 2 * sum(a * b for a, b in pairwise(sizes))  # of policy and critic
    batch, rollout = getattr(config, "batch_size", 0), n_envs * getattr(config, "n_steps", 0)
    rows = min((count for count in (batch, rollout) if count), default=0)
    return weights * max(rows, n_envs) >= _WORK


def pick_device(wanted: str, pays: Callable[[], bool]) -> str:
    """The device to use: where it is "auto", CUDA if it ``pays`` and each process here has one of its own.

    Raises UsageError for CUDA where there is none.
    """
    if wanted.startswith("cuda"):
        count, index = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(wanted[5:] or 0)
        if not count:
            raise UsageError(f"--device {wanted}: no CUDA device is available to this torch; use --device cpu")
        if index >= count:
            raise UsageError(f"--device {wanted}: the last CUDA device here is cuda:{count - 1}")
    if wanted == "auto":
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return "cuda" if enough and pays() else "cpu"
    return wanted


def own_device() -> str:
    """A rank's CUDA device. Raises UsageError where this machine has fewer of them than ranks."""
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= count:
        raise UsageError(f"each process takes a CUDA device of its own, and this machine has {count}: --device cpu")
    return f"cuda:{place}"
