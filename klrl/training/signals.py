"""SIGINT, SIGTERM and SIGHUP as something that a loop asks about when it suits it."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from klrl.errors import STOP_SIGNALS, Interrupted


class Signals:
    """While entered, the first signal waits for ``check``; a SIGINT after it is a KeyboardInterrupt at once.

    A SIGHUP that nohup has switched off stays so. Outside of the main thread Python allows no handlers, and signals do
    what they did before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signum:
            raise Interrupted(self.signum)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signum in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
