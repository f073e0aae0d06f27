"""How many threads NumPy takes for products of matrices, of which it does part of torch's work here."""

from contextlib import ContextDecorator
from functools import cache
from threading import Lock
from typing import Any

import torch
from threadpoolctl import ThreadpoolController


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


class _AsTorch(ContextDecorator):
    """Counts who is inside, as the number of threads is the process's: who comes first sets it, who goes last puts it
    back."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.limiter: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                now = [library.num_threads for library in _blas().lib_controllers]
                self.limiter = _blas().limit(limits=min([*now, torch.get_num_threads()]))
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.limiter.restore_original_limits()


on_torchs_threads = _AsTorch()
"""Let a block, or as a decorator a function, have no more of NumPy's threads than torch may take: NumPy's own default
is one for each core, whatever torch was told, and where a machine is busy they wait for each other, which takes ten
times as long."""
