"""A run that makes no progress ends, and says which rank keeps it: a hang costs what the machines cost.

A rank that waits for another makes no progress either, so a hang is one of all ranks: each says in the store at which
the ranks found each other how often it has gone on. A rank that has not looks whether any other has. Nothing here asks
a rank to do something: one that was stopped, or waits for a dead file system, is told by its silence.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from qsharded.config import TrainConfig
from qsharded.distributed.world import World
from qsharded.training.hang_report import RankStatus, main_frame, said_of, write_stacks
from qsharded.utils import heartbeat
from qsharded.utils.exit_codes import HANG

_LONGEST_POLL_S = 5.0
_POLLS = 20  # in the time-out
_SILENT_POLLS = 4  # without a word, after which a rank does not answer
_STORE_S = timedelta(seconds=60)
_NCCLS_OWN = timedelta(minutes=10)


def collective_timeout(config: TrainConfig) -> timedelta | None:
    """Longer than the watchdog waits, so that its line is what a user reads; PyTorch's own where there is none."""
    return max(_NCCLS_OWN, 2 * timedelta(minutes=config.hang_timeout)) if config.hang_timeout else None


@contextmanager
def watched(config: TrainConfig, world: World) -> Iterator[None]:
    """Meanwhile a hang of all ranks ends the process with exit status HANG (``--hang-timeout``). Every rank enters."""
    if not config.hang_timeout:
        yield
        return
    finished = threading.Event()
    board = None if world.mesh is None else Board(world)
    watch = Watchdog(config, world, board, finished)
    threading.Thread(target=watch.run, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        faulthandler.cancel_dump_traceback_later()


class Board:
    """What all ranks say of themselves, in the store. Its calls can block for ever where the store's host was stopped:
    so a thread of its own makes them, and :attr:`read` and :attr:`called` are what it has found."""

    def __init__(self, world: World) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=_STORE_S)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._keys = [f"qsharded/rank/{start}/{rank}" for rank in range(world.size)]
        self._hang, self._rank = f"qsharded/hang/{start}", world.rank
        self.read: dict[int, RankStatus] = {}
        self.reads = 0
        self.called = False  # whether a rank has found a hang
        self.first = True  # whether that was this one

    def exchange(self, own: RankStatus, look: bool) -> None:
        """Say ``own``, and where ``look`` read what the others say."""
        self._store.set(self._keys[self._rank], json.dumps(asdict(own)))
        if look:
            found = self._store.multi_get(self._keys)
            self.read = {rank: RankStatus(**json.loads(said)) for rank, said in enumerate(found)}
        self.called = self._store.check([self._hang])
        self.reads += 1

    def call(self) -> None:
        """Have all ranks know of a hang."""
        mine = str(self._rank)
        self.first = self._store.compare_set(self._hang, "", mine).decode() == mine
        self.called = True


class Watchdog:
    """The thread that looks after this rank.

    Args:
        board: of all ranks; None for a process alone.
        finished: when set, the thread ends.
    """

    def __init__(self, config: TrainConfig, world: World, board: Board | None, finished: threading.Event) -> None:
        self._config, self._world, self._board, self._finished = config, world, board, finished
        self._timeout = config.hang_timeout * 60
        self._poll = min(_LONGEST_POLL_S, self._timeout / _POLLS)
        self._posts = 0
        self._beats: dict[int, int] = {}  # of each rank, as seen last
        self._posted: dict[int, tuple[int, float]] = {}  # the last new word of each, and when it was seen
        self._any_at = time.monotonic()  # when any rank was last seen to go on

    def run(self) -> None:
        """Until finished, or a hang."""
        if self._board:
            threading.Thread(target=self._exchange, args=(self._board,), name="board", daemon=True).start()
        while not self._finished.wait(self._poll):
            heartbeat.still_outside()
            # for a main thread that keeps Python's lock, under which this one cannot run
            faulthandler.dump_traceback_later(self._timeout * 2, exit=True, file=sys.__stderr__ or 2)
            if self._board and self._board.called:
                self._leave(silently=True)
            self._look()
            if time.monotonic() - self._any_at >= self._timeout:
                self._leave(silently=False)

    def _exchange(self, board: Board) -> None:
        while not self._finished.wait(self._poll):
            self._posts += 1
            own = heartbeat.OWN
            status = RankStatus(self._posts, own.beats, own.meetings, own.where, main_frame())
            try:
                board.exchange(status, look=self._is_late())
            except RuntimeError:
                return  # the store has left with its rank, which rank_failures tells

    def _is_late(self) -> bool:
        return time.monotonic() - heartbeat.OWN.at > self._timeout / 10

    def _look(self) -> None:
        """See whether any rank has gone on."""
        self._any_at = max(self._any_at, heartbeat.OWN.at)
        now = time.monotonic()
        for rank, status in (self._board.read if self._board else {}).items():
            if self._beats.get(rank) != status.beats:
                self._beats[rank], self._any_at = status.beats, now
            if self._posted.get(rank, (None,))[0] != status.posts:
                self._posted[rank] = (status.posts, now)

    def _leave(self, *, silently: bool) -> None:
        folder = write_stacks(Path(self._config.output_dir), self._world.rank)
        is_first = not silently and self._called()
        if is_first:
            self._say(folder)
        time.sleep(_SILENT_POLLS * self._poll)  # for the others, whom torchrun ends when the first one leaves
        os._exit(HANG)

    def _called(self) -> bool:
        """Have the others know; False where another rank was first."""
        if self._board is None:
            return True
        caller = threading.Thread(target=self._board.call, daemon=True)
        caller.start()
        caller.join(self._poll)
        return self._board.first

    def _say(self, folder: Path) -> None:
        text = (
            f"{self._config.prog}: error (rank {self._world.rank}): no progress of any rank for "
            f"{self._config.hang_timeout:g} minutes (--hang-timeout): {self._ranks()}. The stacks of the ranks that "
            f"can run are in {folder}. Go on with --resume-from-checkpoint auto\n"
        )
        os.write(2, text.encode())

    def _ranks(self) -> str:
        own = heartbeat.OWN
        mine = RankStatus(0, own.beats, own.meetings, own.where, main_frame())
        known = {**(self._board.read if self._board else {}), self._world.rank: mine}
        if self._board and not self._answers():
            return f"{said_of({self._world.rank: mine}, set())}; the store that the ranks share does not answer, " + (
                "which is rank 0's, or torchrun's"
            )
        return said_of(known, {rank for rank in range(self._world.size) if self._is_silent(rank)})

    def _answers(self) -> bool:
        """Whether the store has answered lately: this rank's own word comes back with the others'."""
        return not self._is_old(self._world.rank)

    def _is_silent(self, rank: int) -> bool:
        return rank != self._world.rank and self._is_old(rank)

    def _is_old(self, rank: int) -> bool:
        seen = self._posted.get(rank)
        return seen is None or time.monotonic() - seen[1] > _SILENT_POLLS * self._poll
