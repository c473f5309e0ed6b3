"""What is in files, as a hash, remembered so that large ones are read for it once.

A file is taken to be the same while its path, inode, size and times are: the kernel sets the time of the last change,
which no program can set back. One that was changed within the last seconds is not remembered, since it could change
again without a trace in its times.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path

from qsharded.utils.durable_files import write_whole

_PART = 8 << 20  # that a thread hashes at a time
_SETTLED_S = 3.0
_AT_ONCE = 8


def content_hashes(paths: Sequence[Path], memory: Path) -> list[str]:
    """:func:`content_hash` of each, several at once: hashing leaves the interpreter to others."""
    with ThreadPoolExecutor(_threads()) as pool:
        return list(pool.map(content_hash, paths, repeat(memory)))


def content_hash(path: Path, memory: Path | None = None) -> str:
    """SHA-256 of those of a file's parts, in hexadecimal: several threads hash a large file.

    Args:
        memory: folder in which hashes are remembered; None: none are.

    Raises:
        OSError: the file cannot be read, or ``memory`` not made.
    """
    path = path.resolve()
    if memory is None:
        return _hash(path)
    note = memory / (hashlib.sha256(str(path).encode()).hexdigest()[:24] + ".json")
    state = _state(path)
    if (known := _read(note)) and known["state"] == state:
        return str(known["hash"])
    found = _hash(path)
    if time.time() - path.stat().st_ctime > _SETTLED_S and _state(path) == state:
        memory.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another run may be writing it, and it saves time only
            write_whole(note, json.dumps({"path": str(path), "state": state, "hash": found}).encode())
    return found


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(note: Path) -> dict[str, object] | None:
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and known.keys() >= {"state", "hash"} else None


def _hash(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        starts = range(0, os.fstat(file.fileno()).st_size, _PART)
        part_hash = partial(_part_hash, file.fileno())
        if len(starts) <= 1:
            return _joint(map(part_hash, starts))
        with ThreadPoolExecutor(_threads()) as threads:
            return _joint(threads.map(part_hash, starts))


def _part_hash(file: int, start: int) -> bytes:
    return hashlib.sha256(os.pread(file, _PART, start)).digest()


def _joint(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _threads() -> int:
    return min(_AT_ONCE, len(os.sched_getaffinity(0)))
