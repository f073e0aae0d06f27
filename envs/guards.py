"""Guards around what environments do where it is no step: being made, with what they print, and being closed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from klrl.console import is_open, say

FAILURES = (Exception, SystemExit)
"""What an environment's fault is caught as: one that calls sys.exit would end a run without a word."""
CLOSE_SECONDS = 5.0
"""How long an environment may take to close."""
_said: set[str] = set()


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
    """Let what the block prints on stderr through, but for lines that such a block has printed before.

    A simulator's warning would come once for every copy of an environment. Libraries in C print past ``sys.stderr``,
    so the file descriptor itself is held. Worker processes print nothing: one copy was made before them.
    """
    if not is_open("stderr"):
        yield
        return
    speaks = multiprocessing.parent_process() is None
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:  # no stderr, or no room for what it holds
            yield
            return
        stack.callback(os.close, kept)
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        text = stack.enter_context(open(held.fileno(), "w", closefd=False))
        try:
            with contextlib.redirect_stderr(text):
                yield
        except BaseException:
            speaks = True  # it may say why
            raise
        finally:
            text.flush()
            os.dup2(kept, 2)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines() if speaks else []
            for line in lines:
                if line.strip() and line not in _said:
                    say(line, "stderr")
                    _said.add(line)
