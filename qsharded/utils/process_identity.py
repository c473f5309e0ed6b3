"""Which process it is, told so that another can find out whether it still runs."""

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_ENDED = ("Z", "X")  # the states of a process that has ended and waits for its parent to look


@dataclass(frozen=True)
class ProcessIdentity:
    """A process among all that machines run.

    Attributes:
        host: the machine's name, for people.
        kernel: boot and PID namespace, within which a number is one process at a time; "" where the system hides it.
        pid: its number there.
        started: ticks of the clock between boot and its start: numbers are used again, but not at the same tick.
    """

    host: str
    kernel: str
    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Of a process on this machine; one that has ended has 0 for its start."""
        return cls(socket.gethostname(), _kernel(), pid, _start_of(pid) or 0)

    @classmethod
    def from_json(cls, read: Any) -> "ProcessIdentity | None":
        """What :meth:`to_json` gave; None where ``read`` is something else."""
        try:
            found = cls(**read)
        except TypeError:
            return None
        kinds = (type(found.host), type(found.kernel), type(found.pid), type(found.started))
        return found if kinds == (str, str, int, int) else None

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    def runs(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here, as on another machine."""
        if not self.kernel or self.kernel != _kernel():
            return None
        return _start_of(self.pid) == self.started


def _kernel() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """The tick at which a process started; None where there is none, or it has ended."""
    try:
        # the name, in parentheses, may hold spaces and parentheses of its own
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in _ENDED else int(fields[18])
