"""The global random generators, which environments and networks of one's own may draw from; an agent has its own."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from klrl.agents.base import State


def derived_seed(seed: int, number: int) -> int:
    """A seed below 2^31 of its own for each number: hashed, so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1


def random_state() -> State:
    """The state of torch's, NumPy's and Python's generators on the CPU, as a checkpoint can hold it."""
    kind, keys, *rest = np.random.get_state()  # a tuple, as set_state takes it back
    numpy = [kind, np.asarray(keys).tolist(), *rest]
    return {"torch": torch.get_rng_state(), "numpy": numpy, "python": random.getstate()}


def scatter_random_state(seed: int, rank: int) -> None:
    """Let a rank's generators draw what no other's do."""
    _seed(derived_seed(seed, rank))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def restore_random_state(state: State) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextlib.contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Leave the generators as they were before the block, in which they start from ``seed`` where one is given."""
    before = random_state()
    # Only where CUDA is in use: to ask it for a state would start it, on every GPU.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            _seed(seed)
        try:
            yield
        finally:
            restore_random_state(before)
