"""One run at a time in an output folder: a second one would delete the checkpoints of the first.

The lock is a file that names the process that holds it. On the same machine it is stale once that process is gone. A
process elsewhere cannot be looked at: it touches its lock every few seconds, and one that is not touched is stale.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.training.writable_output import missing_folders, remove_empty
from qsharded.utils.process_identity import ProcessIdentity

LOCK_FILE = "run.lock"
_TOUCH_S = 5.0
_SILENT_S = 90.0  # a network file system may show for a minute what was there before


@contextmanager
def output_locked(folder: Path, world: World) -> Iterator[None]:
    """Hold the lock of ``folder`` (``--output-dir``). Every rank enters this; the main rank has the lock.

    A folder that cannot be written to gets none: what the run would write there it refuses by itself.

    Raises:
        ValueError: another run holds it; its process is named. On every rank.
    """
    made = missing_folders(folder) if world.is_main else []
    found_by_main(world, partial(_take, folder))
    finished = threading.Event()
    if world.is_main:
        threading.Thread(target=_touch, args=(folder / LOCK_FILE, finished), name="output lock", daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        if world.is_main:
            _release(folder)
            remove_empty(made)


def _take(folder: Path) -> None:
    own = folder / f"{LOCK_FILE}.{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(_own() | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}))
    except OSError:
        return
    try:
        while not _linked(own, folder / LOCK_FILE):
            _remove_stale(folder)
    finally:
        own.unlink()


def _own() -> dict[str, object]:
    return {"process": ProcessIdentity.of(os.getpid()).to_json()}


def _linked(own: Path, lock: Path) -> bool:
    """Whether ``own`` got the lock's name, which one process alone can."""
    try:
        os.link(own, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: of two that start in the same millisecond, both may go on
        if lock.exists():
            return False
        lock.write_bytes(own.read_bytes())
    return True


def _remove_stale(folder: Path) -> None:
    """Remove the lock that is there, if its holder is gone.

    Raises:
        ValueError: it is not.
    """
    lock = folder / LOCK_FILE
    try:
        said = lock.read_bytes()
    except FileNotFoundError:
        return
    if _is_held(lock, said):
        raise ValueError(_refusal(folder, said))
    aside = folder / f"{LOCK_FILE}.{uuid4().hex}"
    with suppress(FileNotFoundError):  # another run has removed it
        lock.rename(aside)
        if aside.read_bytes() != said:  # it was a new one, of a run that was quicker
            _linked(aside, lock)
        aside.unlink()


def _is_held(lock: Path, said: bytes) -> bool:
    holder = _holder(said)
    runs = holder.runs() if holder else None
    return _is_touched(lock, said) if runs is None else runs


def _is_touched(lock: Path, said: bytes) -> bool:
    """Whether its holder, on another machine, shows itself within the time that a living one takes at most.

    Held against what was seen before, as two machines' clocks differ.
    """
    print(f"{lock} is of another machine: looking for up to {_SILENT_S:g} s whether its run lives", flush=True)
    seen, deadline = _touched_at(lock), time.monotonic() + _SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(_TOUCH_S, 1.0))
        now = _touched_at(lock)
        if now is None:
            return False
        if now != seen:
            return True
    return False


def _touched_at(lock: Path) -> int | None:
    try:
        return lock.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _touch(lock: Path, finished: threading.Event) -> None:
    while not finished.wait(_TOUCH_S):
        with suppress(OSError):
            if _is_own(lock):
                os.utime(lock)


def _is_own(lock: Path) -> bool:
    return _holder(lock.read_bytes()) == ProcessIdentity.of(os.getpid())


def _release(folder: Path) -> None:
    with suppress(OSError):
        if _is_own(folder / LOCK_FILE):
            (folder / LOCK_FILE).unlink()


def _read(said: bytes) -> dict[str, object]:
    try:
        read = json.loads(said)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _holder(said: bytes) -> ProcessIdentity | None:
    return ProcessIdentity.from_json(_read(said).get("process"))


def _refusal(folder: Path, said: bytes) -> str:
    holder = _holder(said)
    who = f"process {holder.pid} on {holder.host}, since {_read(said).get('since')}" if holder else "another process"
    return (
        f"--output-dir {folder} is in use by another run: {who}. Wait for it, stop it, or choose another folder; if it "
        f"is known to be gone, delete {folder / LOCK_FILE}"
    )
