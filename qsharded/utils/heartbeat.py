"""What this process does and when it last went on, noted in passing: for the watchdog, and for what it tells.

A note is an assignment, so that rows and chunks can each have one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Heartbeat:
    """The process's own notes.

    Attributes:
        where: what it does.
        beats: how often it went on.
        meetings: how often it came to where all ranks meet: of two ranks, the one with fewer is behind.
        at: when it last went on, by the monotonic clock.
        outside: how many are waiting for something that tells nothing of its progress, a download say.
    """

    where: str = "starting"
    beats: int = 0
    meetings: int = 0
    at: float = 0.0
    outside: int = 0


OWN = Heartbeat(at=time.monotonic())


def beat(where: str) -> None:
    """Note that the process has gone on, and what it does now."""
    OWN.where = where
    _go_on()


def meet() -> None:
    """Note that it has come to the next place at which all ranks meet."""
    OWN.meetings += 1
    _go_on()


def _go_on() -> None:
    OWN.beats += 1
    OWN.at = time.monotonic()


@contextmanager
def working_outside(where: str) -> Iterator[None]:
    """Meanwhile the process counts as going on: others, which have time-outs of their own, work for it."""
    beat(where)
    OWN.outside += 1
    try:
        yield
    finally:
        OWN.outside -= 1
        _go_on()


def still_outside() -> None:
    """Note, in its stead, that a process that works outside goes on."""
    if OWN.outside:
        _go_on()
