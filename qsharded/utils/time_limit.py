"""CPU time that somebody else's program or pattern may take: a timer whose signal interrupts Python and its regular
expressions, but no single call of C besides."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TookTooLong(Exception):
    """Raised within :func:`time_limited`, where the time is used up."""


@contextmanager
def time_limited(seconds: float) -> Iterator[None]:
    """Meanwhile this process has ``seconds`` of CPU time, then TookTooLong is raised. Only the main thread can be
    interrupted: in any other there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise TookTooLong
