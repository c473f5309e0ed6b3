"""``report.html``, written anew at each save and at the end, beside the training: its failure is a warning.

``report.png`` is for the end alone, as drawing it keeps Python from the training for a second.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from qsharded.report import figures, png
from qsharded.report.page import page
from qsharded.report.run_files import PNG_FILE, REPORT_FILE, Run
from qsharded.utils.durable_files import write_whole


class RunReport:
    """Writes a run's page from its files, in a thread; where ``is_main`` is false every method does nothing.

    Leaving the context writes it once more, whatever ended the run.
    """

    def __init__(self, output_dir: Path, is_main: bool, with_png: bool = False) -> None:
        self._output_dir, self._is_main, self._with_png = output_dir, is_main, with_png
        self._thread = ThreadPoolExecutor(1, "report")
        self._pending: Future[None] | None = None
        self._is_due = self._has_failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._is_due and self._is_main:
            self._write(with_png=self._with_png)

    def has_steps(self) -> None:
        """A step is done: from now on there is something to report."""
        self._is_due = True

    def write_soon(self) -> None:
        """Have the page written of what the run's files say now, or a little later."""
        if self._is_main and (self._pending is None or self._pending.done()):
            self._pending = self._thread.submit(self._write)

    def _write(self, with_png: bool = False) -> None:
        """No page is worth a run: whatever is wrong, the training goes on."""
        try:
            run = Run.read(self._output_dir)
            write_whole(self._output_dir / REPORT_FILE, page(run).encode())
            if with_png:
                write_whole(self._output_dir / PNG_FILE, png.draw([figures.loss_plot(run), *figures.plots(run)]))
        except Exception as error:
            if not self._has_failed and self._output_dir.is_dir():  # one that is gone is told of by others
                print(f"warning: no {REPORT_FILE}: {error}", file=sys.stderr)
            self._has_failed = True
