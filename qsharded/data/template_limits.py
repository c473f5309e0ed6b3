"""What a chat template may take: it is someone else's program, and nothing that it can write ends it but this.

Time is that of the CPU, by a timer of the process whose signal interrupts Python and its regular expressions; memory is
limited by the system, for single calls as ``"x" * 10**10`` too. Work that neither can interrupt, on integers of
millions of digits or sums of lists, is refused before it begins. Where a single call still does not come back, as the
comparison of lists that hold each other twice, 60 deep, the process ends, with the template's line on stderr.
"""

import faulthandler
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, pass_environment
from jinja2.filters import do_round, do_sum
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qsharded.utils.time_limit import TookTooLong, time_limited

SECONDS = 5.0
"""Of CPU time, for one rendering: the longest conversations take some 0.01."""
UNINTERRUPTED = 3
"""Times as much, after which a single call of C that no signal interrupts ends the process."""
BYTES = 512 << 20
"""Beyond what the process has: a rendering takes a few times its text."""
ALL_SECONDS, MEAN_SECONDS = 60.0, 0.1
"""Of a template's renderings together, and of each in the mean: one that is slow on purpose would take hours."""
_BITS = 1 << 14  # of an integer
_STDERR = 2
_OF_DICTS = frozenset(dir(dict))
_KEPT = 1000
_PAGE = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Meanwhile a template's program has so much time and memory, and such a depth.

    Raises:
        ValueError: it needed more; ``what`` begins the message.
    """
    try:
        with _ended(), time_limited(SECONDS), _memory_limited():
            yield
    except TookTooLong:
        raise ValueError(f"{what} takes more than {SECONDS:g} s of CPU time: it loops") from None
    except MemoryError:
        raise ValueError(f"{what} takes more than {BYTES >> 20} MiB of memory: it grows without end") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply, or calls itself without end") from None


class Patience:
    """How long a template has taken so far."""

    def __init__(self) -> None:
        self._seconds, self._renderings = 0.0, 0

    @contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """As :func:`limited`, for one rendering.

        Raises:
            ValueError: as there, and where all renderings so far took more than any template has use for.
        """
        if self._seconds > ALL_SECONDS and self._seconds > MEAN_SECONDS * self._renderings:
            each = self._seconds / self._renderings
            raise ValueError(f"{what} took {each:.1f} s of CPU time for each of {self._renderings:,} renderings")
        start = time.thread_time()
        try:
            with limited(what):
                yield
        finally:
            self._seconds += time.thread_time() - start
            self._renderings += 1


@contextmanager
def _ended() -> Iterator[None]:
    """Where a single call does not come back, the process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield  # as in time_limited; rows are rendered in the main thread
        return
    faulthandler.register(signal.SIGPROF, file=_STDERR, all_threads=False, chain=True)  # and then it kills
    signal.setitimer(signal.ITIMER_PROF, UNINTERRUPTED * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)


@contextmanager
def _memory_limited() -> Iterator[None]:
    """By the process's address space, which is what the system limits."""
    statm = _statm(os.getpid())
    if statm is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = int(os.pread(statm, 64, 0).split()[0]) * _PAGE + BYTES
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _statm(process: int) -> int | None:
    """The file that says what this process has, open: each row asks for it. None where the system has no such file."""
    path = Path(f"/proc/{process}/statm")
    return os.open(path, os.O_RDONLY) if path.exists() else None


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without integers that no timer can interrupt the arithmetic of."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {"round": _round, "sum": _sum}
        self._safe: dict[tuple[type, str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox has it, quicker for keys of JSON objects, which are no names of their methods."""
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As the sandbox has it, which looks at the object's type and the attribute's name alone: once for each."""
        known = self._safe.get((type(obj), attr))
        if known is None:
            if len(self._safe) > _KEPT:  # a program can make up names
                self._safe.clear()
            known = self._safe[type(obj), attr] = super().is_safe_attribute(obj, attr, value)
        return known

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operation, unless its result is an integer beyond all use."""
        if isinstance(left, int) and isinstance(right, int) and _bits(operator, left, right) > _BITS:
            raise ValueError(f"the template's {operator} makes an integer of more than {_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


def _bits(operator: str, left: int, right: int) -> int:
    if operator == "*":
        return left.bit_length() + right.bit_length()
    return left.bit_length() * max(right, 0)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    """Jinja's filter, which raises ten to the power of the precision."""
    if not -400 <= precision <= 400:
        raise ValueError(f"the template rounds to {precision} digits")
    return do_round(value, precision, method)


@pass_environment
def _sum(environment: Environment, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's filter, which copies lists for each one that it adds."""
    if not isinstance(start, int | float):
        raise ValueError(f"the template sums what are no numbers, but {type(start).__name__}")
    return do_sum(environment, iterable, attribute, start)
