"""What a run asks of its process: threads, precision, and the device that its networks live on."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from klrl.config import cores
from klrl.errors import UsageError
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


def pick_device(wanted: str, has_images: Any) -> str:
    """The device to use. Raises UsageError for CUDA where there is none."""
    if wanted.startswith("cuda"):
        count, index = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(wanted[5:] or 0)
        if not count:
            raise UsageError(f"--device {wanted}: no CUDA device is available to this torch; use --device cpu")
        if index >= count:
            raise UsageError(f"--device {wanted}: the last CUDA device here is cuda:{count - 1}")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and has_images() else "cpu"
    return wanted


def own_device() -> str:
    """A rank's CUDA device. Raises UsageError where this machine has fewer of them than ranks."""
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= count:
        raise UsageError(f"each process takes a CUDA device of its own, and this machine has {count}: --device cpu")
    return f"cuda:{place}"
