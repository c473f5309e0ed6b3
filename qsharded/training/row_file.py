"""A file of rows, a line of JSON each, that belong to steps of a run: one that goes on drops those of later steps."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qsharded.report.run_files import read_metrics
from qsharded.utils.durable_files import AppendedFile, Displaced, write_whole
from qsharded.utils.strict_json import without_nan


class RowFile:
    """Rows are on the disk when they are added; what a full disk keeps out follows when there is room again.

    Args:
        path: written anew, but for the rows of the steps done; its folder is made.
        first_step: the steps already done.
        warn: is told once that the disk is full.
    """

    def __init__(self, path: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._warn, self._is_full = warn, False
        self.kept = [row for row in _rows(path) if row["step"] <= first_step] if first_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(map(_line, self.kept)).encode())
        self._file = AppendedFile(path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, in which a figure that is not finite is null.

        Raises:
            Displaced: as :meth:`refuse_displaced`.
        """
        try:
            self._file.add(_line(row).encode())
            self._is_full = False
        except Displaced:
            raise
        except OSError as error:  # the rows wait in memory for room: no reason to end the training
            if not self._is_full:
                self._warn(f"warning: {error}; the rows follow when there is room again")
            self._is_full = True

    def refuse_displaced(self) -> None:
        """Raise Displaced where the file is no longer where it was opened: its folder was moved or deleted."""
        self._file.refuse_displaced()

    def close(self) -> None:
        """What still waits for room is lost."""
        self._file.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.exists() else []


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(row), allow_nan=False) + "\n"
