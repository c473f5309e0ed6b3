"""What a signal does to a command: end it at once with one line, unwind it, or be noted for the next safe moment.

A thread of its own waits for signals, so they are answered while the main thread sits in a collective, a download or a
long call into C, where Python runs no handlers. They are blocked in all threads, hence :func:`take_over` comes first in
a process, before the imports that start threads (and take seconds). This module imports nothing that is slow.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from types import FrameType
from typing import NoReturn

# Ctrl-C; what schedulers, torchrun and `kill` send; a closed terminal; what Slurm's --signal is often told to send.
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Has the main thread run the handler that unwinds it, out of a waiting system call too. Ignored by default.
_WAKE = signal.SIGURG
_ONE_REQUEST_S = 0.2  # timeout(1) sends each signal twice in a row, to the process and to its group
_LOOK_S = 2.0  # between two looks whether other ranks have left
_STUCK_S = 20.0  # torchrun kills 30 s after its signal, and then nobody is left to say why


class _Answer(Enum):
    END = auto()
    UNWIND = auto()
    NOTE = auto()


_FAILED = "failed:"


def failed(status: int) -> str:
    """How a rank has left with an exit status, where it was no signal."""
    return f"{_FAILED}{status}"


def failure_status(how: str) -> int | None:
    """The exit status of a rank that failed; None for one that a signal ended, or that has said nothing."""
    return int(how.removeprefix(_FAILED)) if how.startswith(_FAILED) else None


class _Listener:
    """The signals of this process. ``prog`` and ``meanwhile`` are for the line that it ends with at once."""

    def __init__(self) -> None:
        self.prog, self.meanwhile = "qsharded", ""
        self.answer = _Answer.END
        self.noted: signal.Signals | None = None
        self.is_heard = False  # whether the main thread knows of it
        self.look: Callable[[], str] = lambda: ""
        self.tell: Callable[[str], object] = lambda _: None
        self.launcher: int | None = None
        self._asked_at: dict[bool, float] = {}

    def listen(self) -> NoReturn:
        waited_for = [number for number in _ASKING if number is not signal.SIGHUP or _ends_with_the_terminal()]
        while True:
            received = signal.sigtimedwait(waited_for, _LOOK_S)
            if self.launcher is not None and os.getppid() != self.launcher:
                say(self.prog, f"torchrun, process {self.launcher}, which started this rank, is gone: leaving at once")
                os._exit(1)
            if received is not None:
                self._receive(signal.Signals(received.si_signo), from_launcher=_launcher() == received.si_pid)
            elif how := self.look():
                time.sleep(_LOOK_S)  # torchrun names the first to leave as the cause: that is not this rank
                follow(how)
            elif self.noted is not None and self._is_stuck():
                self.leave(
                    self.noted,
                    f"stopped by {self.noted.name}: the micro-batch under way did not end within {_STUCK_S:g} s, as "
                    "when another rank has died; leaving without saving",
                )

    def _receive(self, number: signal.Signals, *, from_launcher: bool) -> None:
        if how := self.look():  # hence the signal: torchrun ends the ranks that are left
            follow(how)
        if self.noted is not None and self._is_another(from_launcher):
            self.leave(number, f"a second signal, {number.name}: leaving at once, what was being saved is lost")
        self._asked_at.setdefault(from_launcher, time.monotonic())
        if self.answer is _Answer.END:
            self.leave(number, f"stopped by {number.name}{self.meanwhile}")
        first, self.noted = self.noted is None, self.noted or number
        if first and self.answer is _Answer.UNWIND:
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _is_stuck(self) -> bool:
        """Whether the main thread, in a collective that another rank never joins, say, has not asked for long."""
        asked_at = min(self._asked_at.values())
        return self.answer is _Answer.NOTE and not self.is_heard and time.monotonic() - asked_at > _STUCK_S

    def _is_another(self, from_launcher: bool) -> bool:
        """Whether it asks once more. Slurm and systemd signal torchrun and its ranks, and torchrun passes its own on:
        one request that comes twice, from two senders."""
        asked_at = self._asked_at.get(from_launcher)
        return asked_at is not None and time.monotonic() - asked_at > _ONE_REQUEST_S

    def leave(self, number: signal.Signals, why: str) -> NoReturn:
        self.tell(str(int(number)))
        say(self.prog, why)
        os._exit(128 + number)

    def unwind(self, _number: int, _frame: FrameType | None) -> None:
        """Runs in the main thread."""
        assert self.noted is not None
        say(self.prog, f"stopped by {self.noted.name}{self.meanwhile}")
        raise SystemExit(128 + self.noted)


_listener = _Listener()


def take_over(prog: str, meanwhile: str = "") -> None:
    """Answer signals from now on, at first by ending at once with a line and exit status 128 + the signal's number.

    To be called in the main thread, before any other is started.

    Args:
        prog: the command, and how the line begins.
        meanwhile: how it ends: what a signal that ends the command interrupts, or leaves behind.
    """
    if not hasattr(signal, "sigtimedwait"):
        return  # macOS: signals do what Python has them do
    _listener.prog, _listener.meanwhile, _listener.launcher = prog, meanwhile, _launcher()
    signal.signal(_WAKE, _listener.unwind)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    threading.Thread(target=_listener.listen, name="signals", daemon=True).start()


def note_from_now() -> None:
    """From now on a signal is only noted, for :func:`noted`; a second one ends the process at once."""
    _listener.answer = _Answer.NOTE


def noted() -> signal.Signals | None:
    """The signal that has asked this process to stop, if one has."""
    _listener.is_heard = _listener.noted is not None
    return _listener.noted


@contextmanager
def unwinding() -> Iterator[None]:
    """Meanwhile a signal raises SystemExit in the main thread, so that what is half done is cleaned up."""
    before, _listener.answer = _listener.answer, _Answer.UNWIND
    try:
        yield
    finally:
        _listener.answer = before


@contextmanager
def ending(meanwhile: str) -> Iterator[None]:
    """Meanwhile a signal ends the process at once, with a line that ends so: nothing that is half done is lost."""
    before = _listener.answer, _listener.meanwhile
    _listener.answer, _listener.meanwhile = _Answer.END, meanwhile
    try:
        yield
    finally:
        _listener.answer, _listener.meanwhile = before


def watch_ranks(look: Callable[[], str], tell: Callable[[str], object]) -> None:
    """Have the thread ``look`` how another rank has left, if one has, and ``tell`` the others of a signal that ends
    this one: its number, as :func:`follow` takes it."""
    _listener.look, _listener.tell = look, tell


def tell_ranks(how: str) -> None:
    """Say how this rank leaves, where others watch."""
    _listener.tell(how)


def another_left() -> str:
    """How another rank has left, if one has and this one watches."""
    return _listener.look()


def follow(how: str) -> NoReturn:
    """End the process because another rank left with that signal, or failed and has said why: with its exit status."""
    if (status := failure_status(how)) is not None:
        os._exit(status)
    number = signal.Signals(int(how))
    say(_listener.prog, f"stopped by {number.name}{_listener.meanwhile}")
    os._exit(128 + number)


def say(prog: str, text: str) -> None:
    """Print a line on standard error, once for all ranks. It takes no lock, which the main thread could hold."""
    if os.environ.get("RANK", "0") == "0":
        behind_a_bar = "\n" if sys.stderr.isatty() else ""
        with suppress(OSError):  # nobody may read it any more
            os.write(2, f"{behind_a_bar}{prog}: {text}\n".encode())


def _launcher() -> int | None:
    """The process that passes its signals on to this one: torchrun's agent."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def _ends_with_the_terminal() -> bool:
    """False under nohup."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
