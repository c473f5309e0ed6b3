"""Commands as real processes, for tests of what signals and failures do to them."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.harness import free_port

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120


class Command:
    """A running process whose output can be waited for."""

    def __init__(self, words: Sequence[object], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    def wait_for(self, text: str) -> None:
        """Wait until a line with ``text`` was printed."""
        with self._more:
            assert self._more.wait_for(lambda: any(text in line for line in self.lines), PATIENCE_S), self.lines

    def end(self) -> int:
        """Wait for the end; returns the exit status."""
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running: {self.lines}") from None
        self._reader.join()
        return status

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


def start_ranks(words: Sequence[object], world_size: int = 2) -> list[Command]:
    """The ranks of a run as torchrun starts them, but with nobody who ends one when another fails."""
    port = str(free_port())
    return [
        Command(
            words,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(world_size)
    ]


def script(folder: Path, text: str) -> Path:
    """A Python file that prepares a command, and runs it."""
    path = folder / "command.py"
    path.write_text(text)
    return path
