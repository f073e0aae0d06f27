"""Guards around what environments do where it is no step: being made, with what they print, and being closed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

FAILURES = (Exception, SystemExit)
"""What an environment's fault is caught as: one that calls sys.exit would end a run without a word."""
CLOSE_SECONDS = 5.0
"""How long an environment may take to close."""
_said: set[bytes] = set()
_lock = threading.Lock()  # stderr is one for all threads


def _unlock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it took that long, where a signal can: on POSIX, in the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer for {seconds:g} s")

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if delay:  # another's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - start), 1e-3), interval)


@contextlib.contextmanager
def each_line_once() -> Iterator[None]:
    """Let what the block prints on stderr through, but for lines that such a block has printed before; all of it where
    the block fails, as it may say why.

    A simulator's warning would come once for every copy of an environment. Worker processes print nothing: one copy was
    made before them. Libraries in C print past ``sys.stderr``, so the file descriptor itself becomes a pipe; processes
    that the block starts may keep that, and a thread goes on with what they print. While one thread is in such a block,
    those of others, and one within it, let everything through.
    """
    if not (lock := _lock).acquire(blocking=False):
        yield
        return
    try:
        with _each_line_once():
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _each_line_once() -> Iterator[None]:
    speaks = multiprocessing.parent_process() is None
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is no stderr
        yield
        return
    reading, writing = os.pipe()
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        # Room for what a library prints while it holds the interpreter, and the reader with it, still: more would hang.
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.dup2(writing, 2)
    os.close(writing)
    held: list[bytes] = []
    reader = threading.Thread(target=_pass_on, args=(reading, os.dup(kept), held, speaks), daemon=True)
    reader.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        reader.join(0.2)
        if failed:
            with contextlib.suppress(OSError):
                os.write(2, b"".join(held))


def _pass_on(reading: int, out: int, held: list[bytes], speaks: bool) -> None:
    with open(reading, "rb") as lines, open(out, "wb", buffering=0) as shown, contextlib.suppress(OSError):
        for line in lines:
            if not speaks or line in _said or not line.strip():
                held.append(line)
            else:
                _said.add(line)
                shown.write(line)
