"""Shared by all tests: one thread of torch and of NumPy, as training has, and a folder for each test's files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

threadpool_limits(1, user_api="blas")  # several threads wait for each other where other programs run, ten times as long


@pytest.fixture(autouse=True)
def _one_thread_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
