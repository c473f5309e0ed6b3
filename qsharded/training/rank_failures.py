"""When one rank fails alone: the others end soon, and the cause is told once.

A rank that fails says so in the store at which the ranks found each other, and leaves without a farewell in any
process group, which could wait for the others. Those may sit in a collective. gloo's fails when a rank leaves; NCCL's
may not for minutes, so a thread looks at the store. What they run into is a consequence, and is not told.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from qsharded.distributed.world import World
from qsharded.utils import signals

_ANSWER_S = 10  # from a store that answers in milliseconds
_AFTER_THE_FIRST_S = 2.0  # torchrun reports the first rank that left as the cause, and by then ends the others


class Notice:
    """How the first rank left that did not finish, for all to read."""

    def __init__(self) -> None:
        # A connection of its own: the group's is locked while the main thread waits for something there.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER_S))
        self._key = f"qsharded/left/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def post(self, how: str) -> bool:
        """Say how this rank leaves; False where another was first."""
        mine = f"{how} {os.environ['RANK']}"
        try:
            return self._store.compare_set(self._key, "", mine).decode() == mine
        except RuntimeError:  # the store has left with its rank
            return True

    def read(self) -> str:
        """How the first one left; "" where none did."""
        try:
            return self._store.get(self._key).decode().split()[0] if self._store.check([self._key]) else ""
        except RuntimeError:
            return ""


@contextmanager
def one_cause(prog: str, world: World) -> Iterator[None]:
    """Have the other ranks know of this one's failure, and this one keep silent about what theirs leads to.

    Raises:
        SystemExit: in place of an error that another rank's failure led to.
    """
    if world.mesh is None:
        yield
        return
    notice = Notice()
    signals.watch_ranks(notice.read, notice.post)
    try:
        yield
    except SystemExit as end:
        if end.code:
            notice.post(signals.failed(end.code if isinstance(end.code, int) else 1))
        raise
    except Exception as error:
        if not notice.post(signals.failed(getattr(error, "exit_status", 1))):
            _follow(notice.read())
        signals.watch_ranks(lambda: "", lambda _: None)  # this rank tells the cause, however long that takes
        if not _is_of_a_collective(error):
            raise
        _say_lost(prog, world, error)
        raise SystemExit(1) from None


def _follow(how: str) -> NoReturn:
    """Leave as the rank that left first, without a word of this one's own error."""
    time.sleep(_AFTER_THE_FIRST_S)
    status = signals.failure_status(how or signals.failed(1))
    if status is None:
        signals.follow(how)
    raise SystemExit(status)


def _is_of_a_collective(error: Exception) -> bool:
    """gloo's errors are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _say_lost(prog: str, world: World, error: Exception) -> None:
    first_line = str(error).partition("\n")[0]
    print(
        f"{prog}: error (rank {world.rank}): another rank ended, or can no longer be reached, without a word; "
        f"torchrun's report says which, and its signal (SIGKILL is often a lack of host memory): {first_line}",
        file=sys.stderr,
        flush=True,
    )
