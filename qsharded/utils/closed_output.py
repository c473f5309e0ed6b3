"""Standard output whose reader is gone, as in ``qsharded preview ... | head``."""

import os
import signal
import sys
from typing import NoReturn


def end_quietly() -> NoReturn:
    """Leave with the status of a program that the signal for it ended. (The signal itself would end downloads too.)"""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # for the flush as the interpreter leaves
    raise SystemExit(128 + signal.SIGPIPE) from None
