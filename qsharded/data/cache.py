"""The cache of tokenized datasets: each in a folder whose name says what it was made from.

The name is a hash of the rows' files, the tokenizer, its chat templates, how rows are read, and the code that does it.
So nothing in the cache is ever wrong, and what changes is made anew beside what was there; nothing is deleted. A folder
gets its name when it is complete; until then it ends in ``.part``, and the next run that needs it goes on with it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import qsharded
from qsharded.data.examples import Dataset
from qsharded.data.fill import Fill, Interrupted
from qsharded.data.fill_progress import Enough, read_note
from qsharded.data.growing import WINDOW, Growing
from qsharded.data.load import Reading
from qsharded.data.row_source import RowSource
from qsharded.data.stored import StoredExamples
from qsharded.data.tokenizer import Tokenizer
from qsharded.data.tokenizing import fill_by_processes
from qsharded.utils.durable_files import sync_folder, write_whole

# Datasets of less are tokenized where they are needed: in less time than processes for it take to start.
SMALL_BYTES = 4 << 20


def default_folder() -> Path:
    """``qsharded/data`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsharded" / "data"


@dataclass(frozen=True)
class DataCache:
    """Datasets, tokenized once by ``tokenizer`` and read as ``reading`` says.

    Attributes:
        folder: of the cache; made where there is none.
        shows_progress: on standard error.
        enough: what is needed of each dataset; None: all.
    """

    folder: Path
    tokenizer: Tokenizer
    reading: Reading
    shows_progress: bool = True
    enough: Enough | None = None

    def dataset(self, name: str, source: RowSource) -> Dataset:
        """The examples of ``source``, which the user calls ``name``: from the cache, or else put there first.

        Processes that ask for the same at the same time wait for the one that was first.

        Raises:
            ValueError: a malformed row, or nothing to learn.
            OSError: the cache cannot be written; the message says what to do.
        """
        kept = self.folder / self._key(source)
        with _locked(kept.with_suffix(".lock"), self.folder):
            if (found := _read(kept)) is None:
                self._fill(name, source, kept)
                found = _read(kept)
        assert found is not None, "it has just been written"
        return found

    def start(self, name: str, source: RowSource) -> Growing:
        """As :meth:`dataset`, but what is there can be read before all is. One process of a node calls this.

        Raises:
            ValueError, OSError: as :meth:`dataset`, of a small one; of others :meth:`Growing.window` raises it.
        """
        found = self.growing(name, source)
        found.failed.unlink(missing_ok=True)
        if 0 < source.nbytes < SMALL_BYTES:
            self.dataset(name, source)
        elif _read(found.kept) is None:
            # A daemon: a run that has taken its steps does not wait for more rows. What was noted of them stays.
            threading.Thread(target=self._fill_behind, args=(name, source, found), daemon=True, name="rows").start()
        return found

    def growing(self, name: str, source: RowSource) -> Growing:
        """What :meth:`start` gives in another process of this node, which has called it."""
        return Growing(name, self.folder / self._key(source))

    def _fill_behind(self, name: str, source: RowSource, found: Growing) -> None:
        try:
            self.dataset(name, source)
        except (ValueError, OSError) as error:
            write_whole(found.failed, str(error).encode())

    def _key(self, source: RowSource) -> str:
        made_from = [source.identity(self.folder / "files"), self.tokenizer.identity(), asdict(self.reading), _code()]
        if self.enough:
            made_from.append(asdict(self.enough))
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]

    def _fill(self, name: str, source: RowSource, kept: Path) -> None:
        part = kept.with_suffix(".part")
        part.mkdir(exist_ok=True)
        small = 0 < source.nbytes < SMALL_BYTES
        workers = 1 if small else len(os.sched_getaffinity(0))
        shown = self.shows_progress and not small
        noted = WINDOW if self.enough else sys.maxsize
        fill = Fill(name, source, self.tokenizer, self.reading, part, workers, shown, self.enough, noted)
        try:
            fill.run() if small else fill_by_processes(fill)
        except Interrupted:
            raise
        except ValueError:
            shutil.rmtree(part)  # of no use: other rows, or another way to read them, have another name
            raise
        shutil.rmtree(kept, ignore_errors=True)  # a damaged one
        part.rename(kept)
        sync_folder(self.folder)


def _read(folder: Path) -> Dataset | None:
    """The dataset in ``folder``; None where there is none, or it is damaged."""
    try:
        note = read_note(folder)
        return Dataset.from_json(note["dataset"], StoredExamples(folder, note["rows"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        print(f"warning: {folder} is damaged and made anew: {error}", file=sys.stderr)
        return None


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    """One process at a time. The system gives the lock back when the process ends, whatever ended it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        _lock(file, path)
    except OSError as error:
        raise OSError(
            f"the data cache {folder} cannot be used: {error}; give --data-cache a folder that can be written and "
            "whose files can be locked, as on a local disk"
        ) from error
    with file:
        yield


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that tokenizes the same rows into {path.parent}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


@cache
def _code() -> list[Any]:
    """The version of all that turns rows into ids: our modules' own text, for not every change of it has a version."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    text = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()
    return [qsharded.__version__, text, *(metadata.version(name) for name in ("tokenizers", "jinja2"))]
