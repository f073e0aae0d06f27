"""Run folders: a new one for each run, a lock that keeps it to one process, and files that are written whole."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from klrl.errors import UsageError, refusals

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


def make_folder(parent: str, name: str, here: Path = Path()) -> Path:
    """A new folder ``parent/name-time`` seen from ``here``, numbered where that is taken.

    Raises UsageError where it cannot be made.
    """
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "_").replace(":", "_")
    with refusals(f"--run-dir {parent}", "; choose a folder you can write to"):
        os.makedirs(here / parent, exist_ok=True)
        for number in range(1, 10_000):
            folder = here / parent / (stem if number == 1 else f"{stem}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise UsageError(f"--run-dir {parent}: 10,000 runs of this second lie there already")


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all. A link there is replaced, and none is followed."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(temporary, flags, 0o644), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock.

    Raises UsageError where another process holds it, or where the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with refusals(str(folder), "; the run's folder must be writable"):
            # Ten times: ``in_use`` in another process holds it for an instant.
            handle = stack.enter_context(try_lock(folder / "lock", 10))
        if handle is None:
            owner = (folder / "lock").read_bytes()[:32].decode(errors="replace").strip()
            raise UsageError(f"{folder} is still running, in process {owner or 'unknown'}")
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield


@contextlib.contextmanager
def try_lock(path: Path, attempts: int = 1) -> Iterator[int | None]:
    """Lock the file: the handle, which a child process can inherit, or None where another process has the lock.

    The system frees it when the last process that has the handle ends, however it ends.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        yield handle if _acquire(handle, attempts) else None
    finally:
        os.close(handle)


def _acquire(handle: int, attempts: int = 1, shared: bool = False) -> bool:
    """Try to lock the open file, and return whether that succeeded."""
    for attempt in range(attempts):
        time.sleep(0.02 if attempt else 0.0)
        with contextlib.suppress(BlockingIOError):
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
            return True
    return False


def in_use(folder: Path) -> bool:
    """Whether a process holds the run's lock at this moment."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        return not _acquire(handle, shared=True)
    finally:
        os.close(handle)
